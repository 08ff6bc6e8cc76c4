"""Buffers between a warpgroup that loads and those that read, in the scan over chunks.

What a step reads first is handed back first: its next load has begun long before the step ends.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic


class Ring(NamedTuple):
  """Buffers of what is fetched together, for one warpgroup that reads it.

  `fetch(step, slot, full)` starts as many copies as `full` has arrivals, each arriving there.
  """

  stages: int
  fetch: Callable
  full: jax.Array
  consumed: jax.Array

  def slot(self, step):
    return lax.rem(step, jnp.int32(self.stages))

  def wait(self, step):
    """The slot of a step, once it is full."""
    plgpu.barrier_wait(self.full.at[self.slot(step)])
    return self.slot(step)

  def release(self, slot):
    """Hands the slot back, for a later step."""
    plgpu.barrier_arrive(self.consumed.at[slot])


def barriers(stages: int, copies: int):
  """For a ring whose slots get so many copies."""
  return [plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (copies, 1)]


def run(steps: int, rings: Sequence[Ring], readers: Sequence[Callable], interpret: bool):
  """Warpgroup n runs `readers[n]()`, the last one loads; all rings are read at every step."""
  thread = lax.axis_index("thread")
  several = len(readers) > 1 and not interpret
  budget = min((mosaic.REGISTERS - mosaic.LOADER_REGISTERS) // len(readers) // 8 * 8, 240)

  for n, reader in enumerate(readers):

    @pl.when(thread == n)
    def _(reader=reader):
      if several:
        plgpu.set_max_registers(budget, action="increase")
      reader()

  @pl.when(thread == len(readers))
  def _():
    if several:
      plgpu.set_max_registers(mosaic.LOADER_REGISTERS, action="decrease")

    @pl.loop(jnp.int32(0), jnp.int32(steps))
    def _(step):
      for ring in rings:
        slot = ring.slot(step)
        again = functools.partial(plgpu.barrier_wait, ring.consumed.at[slot])
        pl.when(step >= ring.stages)(again)
        ring.fetch(step, slot, ring.full.at[slot])

    # Every release is waited for: the interpreter takes one that is not for a mistake.
    for ring in rings:
      for step in range(max(steps - ring.stages, 0), steps):
        plgpu.barrier_wait(ring.consumed.at[step % ring.stages])
