"""Every experiment in configs/: consistent with the models, and its tiny form trains."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest

import configs
from experiments import sharding, train_step
from lm_models import lm
from tests.quick_compilation import quick_compilation as quick_compilation

NAMES = sorted(
  path.stem
  for path in pathlib.Path(configs.__file__).parent.glob("*.py")
  if path.stem != "__init__"
)


def get(name, arg=None):
  """The experiment's config."""
  return importlib.import_module(f"configs.{name}").get_config(arg)


def keys(config, prefix=""):
  """Dotted names of all fields."""
  found = set()
  for name in config:
    value = config.get_ref(name).get() if hasattr(config, "get_ref") else config[name]
    dotted = f"{prefix}{name}"
    found |= keys(value, f"{dotted}.") if hasattr(value, "keys") else {dotted}
  return found


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_the_same_fields_and_describes_a_model(name):
  groups = ["data", "model", "optim", "schedule", "mesh", "train", "eval", "checkpoint", "log"]
  for arg in (None, "", "tiny"):
    config = get(name, arg)
    assert set(groups) <= set(config)
    assert keys(config) == keys(get("defaults"))
    model = train_step.model_config(config)
    assert lm.parameter_count(model) > 1000
    assert config.train.batch_size % config.train.accumulate == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused(name):
  with pytest.raises(ValueError, match=r"unknown argument 'huge', there are \[.*'tiny'.*\]"):
    get(name, "huge")


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_holds_the_command(name):
  if name == "defaults":
    pytest.skip("not an experiment of its own")
  docstring = importlib.import_module(f"configs.{name}").__doc__
  assert f"python run.py --config=configs/{name}.py" in docstring


def as_plain(value):
  """Tuples however they are stored."""
  return tuple(value) if isinstance(value, list | tuple) else value


def test_the_fields_and_defaults_of_a_model_are_the_dataclass_ones():
  check_defaults(get("defaults").model, lm.Config, {"mixers"}, {})


@pytest.mark.parametrize("name", lm.MIXERS)
def test_fields_and_defaults_are_the_dataclasses(name):
  module, changed = lm.MIXERS[name]
  check_defaults(get("defaults").model[name], module.Config, {"D", "L", "dtype"}, changed)


def check_defaults(group, dataclass, elsewhere, changed):
  """Asserts that a group has the fields and defaults of its dataclass, but for those `changed`."""
  fields = {
    field.name: field.default
    for field in dataclasses.fields(dataclass)
    if field.name not in elsewhere
  }
  config = group.to_dict()
  mine = {name: as_plain(value) for name, value in config.items() if not isinstance(value, dict)}
  assert mine == {**fields, **changed}


def test_the_austen_models_are_of_one_size():
  counts = {
    name: lm.parameter_count(train_step.model_config(get(f"austen_{name}")))
    for name in ("mamba", "hybrid", "transformer")
  }
  assert max(counts.values()) / min(counts.values()) < 1.02, counts
  millions = counts["mamba"] / 1e6
  assert f"{millions:.1f}M parameters" in importlib.import_module("configs.austen_mamba").__doc__


def test_the_austen_models_see_the_same_batches():
  batches = [
    (config.data.to_dict(), config.train.batch_size, config.train.steps, config.train.seed)
    for config in (get(f"austen_{name}") for name in ("mamba", "hybrid", "transformer"))
  ]
  assert batches[0] == batches[1] == batches[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_form_takes_two_steps(name):
  config = get(name, "tiny")
  config.data.T = 4
  config.model.mamba.implementation = "recurrent"  # compiles fastest; the ops' tests compare them
  mesh = sharding.make_mesh({**config.mesh, "data": 1})
  step = train_step.make_step(config, mesh)
  state = train_step.initialise(config, mesh)
  generator = np.random.default_rng(0)
  shape = (config.train.batch_size, config.data.T)
  batch = {
    "inputs": generator.integers(0, 257, shape).astype(np.int32),
    "targets": generator.integers(0, 257, shape).astype(np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "continues": np.zeros(shape[0], bool),
  }
  losses = []
  for _ in range(2):
    state, metrics = step(state, sharding.place_batch(mesh, batch))
    losses.append(float(metrics["loss"]))
  # The same batch again: from a guess over the vocabulary to something better.
  assert abs(losses[0] - np.log(config.model.vocab_size)) < 0.3 and losses[1] < losses[0]
  assert int(metrics["skipped"]) == 0 and int(state.step) == 2
  assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), state.params))
