"""Experiments small enough to be compiled many times over, and batches for them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import defaults
from experiments import sharding, train_step

B, T, VOCABULARY = 8, 6, 24


def make_config(pattern=("mamba",), **fields):
  """The tiny experiment, tinier; fields are `group__name=value`."""
  config = defaults.get_config("tiny")
  config.data.T = T
  config.model.pattern = pattern
  config.model.L = len(pattern)
  config.model.D = 16
  config.model.vocab_size = VOCABULARY
  config.model.mamba.N = 2
  config.model.mamba.implementation = "recurrent"
  for name in ("mamba2", "gla", "retnet", "deltanet", "gated_deltanet", "kda", "plstm"):
    config.model[name].implementation = "recurrent"
  for attention in (config.model.attention, config.model.sliding_attention):
    attention.H, attention.K, attention.mlp_width = 8, 2, 16
  config.model.sliding_attention.window = 4
  config.mesh.data = 1
  config.train.batch_size = B
  config.schedule.name, config.schedule.warmup_steps = "constant", 0
  for name, value in fields.items():
    *groups, field = name.split("__")
    group = config
    for part in groups:
      group = group[part]
    group[field] = value
  return config


def make_batch(seed=0, rows=B, length=T, continues=None):
  """Rows that hold documents, some padded at the end, each row another number of real tokens."""
  generator = np.random.default_rng(seed)
  stream = generator.integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
  segment_ids = np.cumsum(generator.random((rows, length)) < 0.2, axis=1).astype(np.int32)
  real = np.arange(length) < length - np.arange(rows)[:, None] % 4
  return {
    "inputs": stream[:, :-1],
    "targets": stream[:, 1:],
    "segment_ids": np.where(real, segment_ids, -1).astype(np.int32),
    "continues": np.zeros(rows, bool) if continues is None else np.asarray(continues),
  }


class Run:
  """A config's step on its mesh; `step(state, batch)` leaves the state given as it was."""

  def __init__(self, config):
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh)
    with self.on_mesh():
      self.donating_step = train_step.make_step(config, self.mesh)

  def on_mesh(self):
    """The mesh, in force."""
    return jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext()

  def start(self):
    """The state before the first step."""
    with self.on_mesh():
      return train_step.initialise(self.config, self.mesh)

  def place(self, state):
    """A state from elsewhere, on this mesh."""
    shardings = train_step.shardings_of(train_step.abstract_state(self.config, self.mesh))
    return jax.device_put(jax.device_get(state), shardings)

  def step(self, state, batch):
    """One step; the state is copied before it is donated."""
    with self.on_mesh():
      copied = jax.tree.map(jnp.copy, state)
      return self.donating_step(copied, sharding.place_batch(self.mesh, batch))


def assert_equal(got, expected):
  """Trees of bitwise equal arrays."""
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(expected))
