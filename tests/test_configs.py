"""Every experiment in configs/: consistent with the models, and its tiny form trains."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest

import configs
from experiments import sharding, train_step
from experiments.tasks import make_task
from lm_models import lm, vision
from tests.quick_compilation import quick_compilation as quick_compilation

NAMES = sorted(
  path.stem
  for path in pathlib.Path(configs.__file__).parent.glob("*.py")
  if path.stem != "__init__"
)
AUSTEN = [name for name in NAMES if name.startswith("austen_")]


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


def make_quick(config):
  """Orders of every op what is traced and compiled fastest; the ops' tests compare them."""
  for kind in config.model.pattern:
    if "implementation" in config.model[kind]:
      config.model[kind].implementation = "recurrent"


def count(config):
  """Parameters of a config's model."""
  make_quick(config)
  return make_task(config).parameter_count()


def defaults_of(config):
  """The file in which all fields of an experiment are defined."""
  return "vision_defaults" if "patch" in config.model else "defaults"


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_the_same_fields_and_describes_a_model(name):
  groups = ["data", "model", "optim", "schedule", "mesh", "train", "eval", "checkpoint", "log"]
  for arg in (None, "", "tiny", *(["small"] if name in AUSTEN else [])):
    config = get(name, arg)
    assert set(groups) <= set(config)
    assert keys(config) == keys(get(defaults_of(config)))
    assert name == "vision_defaults" or make_task(config).model.repeats >= 1
    assert config.train.batch_size % config.train.accumulate == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused(name):
  with pytest.raises(ValueError, match=r"unknown argument 'huge', there are \[.*'tiny'.*\]"):
    get(name, "huge")


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_holds_the_command(name):
  if name.endswith("defaults"):
    pytest.skip("not an experiment of its own")
  docstring = importlib.import_module(f"configs.{name}").__doc__
  assert f"python run.py --config=configs/{name}.py" in docstring


def as_plain(value):
  """Tuples however they are stored."""
  return tuple(value) if isinstance(value, list | tuple) else value


def test_the_fields_and_defaults_of_a_model_are_the_dataclass_ones():
  check_defaults(get("defaults").model, lm.Config, {"mixers"}, {})
  check_defaults(get("vision_defaults").model, vision.Config, {"mixers"}, {})


@pytest.mark.parametrize("name", lm.MIXERS)
def test_fields_and_defaults_are_the_dataclasses(name):
  module, changed = lm.MIXERS[name]
  check_defaults(get("defaults").model[name], module.Config, {"D", "L", "dtype"}, changed)


@pytest.mark.parametrize("name", vision.MIXERS)
def test_fields_and_defaults_of_vision_mixers_are_the_dataclasses(name):
  module, changed = vision.MIXERS[name]
  group = get("vision_defaults").model[name]
  check_defaults(group, module.Config, {"D", "L", "dtype", "init_variance", *changed}, {})


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


@pytest.mark.parametrize("arg, millions", [(None, 4.1), ("small", 1.0)])
def test_the_austen_models_are_of_one_size(arg, millions):
  counts = {name: make_task(get(name, arg)).parameter_count() for name in AUSTEN}
  assert len(counts) >= 9
  assert max(counts.values()) / min(counts.values()) < 1.02, counts
  assert counts["austen_mamba"] / 1e6 == pytest.approx(millions, abs=0.05)
  assert "4.1M parameters" in importlib.import_module("configs.austen_mamba").__doc__


@pytest.mark.parametrize("arg", [None, "small"])
def test_the_austen_models_differ_in_nothing_but_the_model(arg):
  runs = []
  for name in AUSTEN:
    config = get(name, arg).to_dict()
    del config["model"]
    runs.append(config)
  assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize(
  "name, size, expected",
  [
    ("gla", "130m", 109_757_952),
    ("gla", "340m", 341_707_776),
    ("gla", "1b3", 1_365_514_240),
    ("deltanet", "130m", 109_697_280),
    ("deltanet", "340m", 341_594_112),
    ("deltanet", "1b3", 1_365_677_056),
    ("gated_deltanet", "130m", 107_309_628),
    ("gated_deltanet", "340m", 347_036_712),
    ("gated_deltanet", "1b3", 1_387_348_732),
    ("gated_deltanet", "340m_k128", 347_120_124),
    ("gated_deltanet", "kda_1b3", 1_390_941_568),
    ("retnet", "1b3", 1_351_727_104),
    ("mamba2", "130m", 128_989_632),
    ("mamba2", "370m", 368_346_624),
    ("mamba2", "780m", 780_161_280),
    ("mamba2", "1b3", 1_343_757_312),
    ("mamba2", "2b7", 2_702_599_680),
  ],
)
def test_the_sizes_of_the_language_models(name, size, expected):
  config = get(f"{name}_lm", size)
  assert count(config) == expected == formula(config.model)
  assert f"{expected:,}" in importlib.import_module(f"configs.{name}_lm").__doc__


def formula(model):
  """Parameters of a published model, counted by hand."""
  (name,), D = model.pattern, model.D
  c = model[name]
  if name == "mamba2":
    inner, H, BC = 2 * D, 2 * D // 64, 2 * c.N
    mixer = D * (2 * inner + BC + H) + 5 * (inner + BC) + 3 * H + inner + inner * D
    return model.vocab_size * D + D + model.L * (D + mixer)
  ratio = {"retnet": 2}.get(name, 4)
  mlp = 3 * D * 256 * -(-int(D * ratio * 2 / 3) // 256)
  if name == "gla":
    mixer = 4 * D * D + 16 * D + 17 * D // 2 + D // c.H
  elif name == "retnet":
    mixer = 8 * D * D + 2 * D // c.H
  elif name == "deltanet":
    mixer = 4 * D * D + 3 * 4 * D + D * c.H + D // c.H
  elif name == "gated_deltanet":
    keys, values = c.H * c.K, 2 * c.H * c.K
    mixer = D * (2 * keys + 3 * values) + 4 * (2 * keys + values) + 2 * D * c.H + 2 * c.H + 2 * c.K
  else:
    low_rank = 2 * (D * c.K + c.K * D) + D
    mixer = 4 * D * D + low_rank + 3 * 4 * D + D * c.H + c.H + D + c.K
  embeddings = model.vocab_size * D * (1 if model.tied else 2)
  return embeddings + D + model.L * (2 * D + mixer + mlp)


# The other language models are, at this size, the models on the Austen corpus.
TRAINED = [
  name for name in NAMES if name == "mamba_lm" or not name.endswith(("_lm", "vision_defaults"))
]


@pytest.mark.parametrize("name", TRAINED)
def test_the_tiny_form_takes_two_steps(name):
  config = get(name, "tiny")
  config.data.T = 4
  make_quick(config)
  mesh = sharding.make_mesh({**config.mesh, "data": 1})
  step = train_step.make_step(config, mesh)
  state = train_step.initialise(config, mesh)
  batch = make_task(config).example_batch()
  losses = []
  for _ in range(2):
    state, metrics = step(state, sharding.place_batch(mesh, batch))
    losses.append(float(metrics["loss"]))
  # The same batch again: from a guess over all answers to something better.
  answers = config.model.get("outputs") or config.model.vocab_size
  assert abs(losses[0] - np.log(answers)) < 0.3 and losses[1] < losses[0]
  assert int(metrics["skipped"]) == 0 and int(state.step) == 2
  assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), state.params))
