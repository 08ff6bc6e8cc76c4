"""The :tiny experiments on every mesh of eight devices: their losses are those of one device.

Each kind of block is trained on four meshes, among them one whose devices all share time and one
that splits three ways, and each of the twenty meshes trains two kinds in one model. Every
experiment on every mesh is five hundred programs to compile, hours of a small machine:

    RECURRAX_EVERY_MESH=1 python -m pytest tests/experiments/test_factorisations.py

with the implementations that a user gets, where the usual selection takes those that compile soon.
"""

import functools
import importlib
import itertools
import os

import jax
import numpy as np
import pytest

from experiments import sharding
from experiments.tasks import make_task
from tests.experiments.small import Run, make_batch
from tests.quick_compilation import quick_compilation as quick_compilation
from tests.test_configs import NAMES, make_quick

EVERY = "RECURRAX_EVERY_MESH" in os.environ
STEPS = 10
# Sizes of data, fsdp, tensor, seq.
MESHES = [
  mesh for mesh in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES)) if np.prod(mesh) == 8
]
TIME_ONLY = (1, 1, 1, 8)
THREE_WAYS = ((2, 2, 1, 2), (2, 1, 2, 2), (1, 2, 2, 2))
OTHERS = [mesh for mesh in MESHES if mesh not in (TIME_ONLY, *THREE_WAYS)]
# An experiment, and the kinds of block of which its model is made here, () for its own.
PAIRS = [
  ("austen_hybrid", ("mamba", "sliding_attention")),
  ("mamba2_lm", ("mamba2", "attention")),
  ("gla_lm", ("gla", "slstm")),
  ("retnet_lm", ("retnet", "gru")),
  ("deltanet_lm", ("deltanet", "elman")),
  ("gated_deltanet_lm", ("gated_deltanet", "lstm")),
  ("austen_kda", ("kda", "paralstm")),
  ("austen_plstm", ("plstm", "paragru")),
]
TASKS = [
  ("plstm_rays", ("plstm_p", "plstm_d", "attention"), TIME_ONLY),
  ("plstm_rays", ("plstm_p", "plstm_d", "attention"), (1, 2, 2, 2)),
  ("plstm_rays", ("plstm_p", "plstm_d", "attention"), (2, 2, 2, 1)),
  ("plstm_arrow", (), (2, 1, 2, 2)),
  ("plstm_parity", (), (1, 2, 1, 4)),
  ("pararnn_parity", (), TIME_ONLY),
]


def selection():
  """(experiment, pattern, mesh) of all cases."""
  if EVERY:
    experiments = [(name, ()) for name in NAMES if not name.endswith("defaults")]
    experiments += [("quickstart", ("elman", "gru", "lstm", "slstm"))]
    return [(*experiment, mesh) for experiment in experiments for mesh in MESHES]
  cases = []
  for place, experiment in enumerate(PAIRS):
    meshes = (TIME_ONLY, THREE_WAYS[place % 3], OTHERS[place], OTHERS[-1 - place])
    cases += [(*experiment, mesh) for mesh in meshes]
  return cases + TASKS


def make(name, pattern, mesh=(1, 1, 1, 1)):
  """The :tiny experiment on a mesh."""
  config = importlib.import_module(f"configs.{name}").get_config("tiny")
  if pattern:
    config.model.pattern, config.model.L = pattern, len(pattern)
  if not EVERY:
    make_quick(config)
  for axis, size in zip(sharding.AXES, mesh):
    config.mesh[axis] = size
  return Run(config)


def train(run, before):
  """The losses of ten steps, each on another batch where the rows are text."""
  task, state, losses = make_task(run.config), run.place(before), []
  rows, length = run.config.train.batch_size, run.config.data.T
  text = "segment_ids" in task.arrays
  with run.on_mesh():
    for n in range(STEPS):
      batch = make_batch(n, rows, length) if text else task.example_batch()
      state, metrics = run.donating_step(state, sharding.place_batch(run.mesh, batch))
      losses.append(float(metrics["loss"]))
  return losses, state


@functools.cache
def single(name, pattern):
  """The state before, and the losses, on one device."""
  run = make(name, pattern)
  state = run.start()
  return state, train(run, state)[0]


def test_every_kind_of_block_and_every_mesh_is_tried():
  tried = [(kind, mesh) for _, pattern, mesh in selection() for kind in pattern]
  assert {mesh for _, mesh in tried} == set(MESHES) and len(MESHES) == 20
  if not EVERY:
    for _, pattern in PAIRS:
      for kind in pattern:
        assert len({mesh for tried_kind, mesh in tried if tried_kind == kind}) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name, pattern, mesh", selection())
def test_losses_are_those_of_one_device(name, pattern, mesh, capfd, record_property):
  before, expected = single(name, pattern)
  assert len(set(expected)) == STEPS
  run = make(name, pattern, mesh)
  capfd.readouterr()
  losses, state = train(run, before)
  # XLA says so where it copies whole arrays to every device for want of a better way.
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
  record_property("largest difference", float(np.abs(np.subtract(losses, expected)).max()))
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
  # It was really spread: of its matrices each device holds a part.
  _, fsdp, tensor, _ = mesh
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    if "in_proj" in jax.tree_util.keystr(path):
      assert leaf.addressable_shards[0].data.size * fsdp * tensor == leaf.size
