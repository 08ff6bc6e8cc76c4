"""What the Mosaic GPU kernels share: layouts, products, and the loop of a loader and its readers.

It needs jax 0.11: import it inside functions only.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
# For kernels that order all of a warpgroup's accesses to shared memory themselves.
BARE = dataclasses.replace(PARAMS, unsafe_no_auto_barriers=True)
LOADER_REGISTERS = 40
REGISTERS = 504  # per column of 128 threads, all warpgroups of a multiprocessor together


def zeros(*shape: int) -> jax.Array:
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def along_rows(x: jax.Array, width: int) -> jax.Array:
  """[N] -> [N width], one value per row."""
  return lax.broadcast_in_dim(x, (x.shape[0], width), [0])


def along_columns(x: jax.Array, height: int) -> jax.Array:
  """[N] -> [height N], one value per column."""
  return lax.broadcast_in_dim(x, (height, x.shape[0]), [1])


def product(shape, left, right, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
  """left @ right in float32; `meanwhile` is done while the tensor cores work."""

  def body(accumulator):
    plgpu.wgmma(accumulator, left, right)
    meanwhile()
    return accumulator[...]

  return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def product_and(shape, left, right, meanwhile: Callable):
  """left @ right in float32, and what `meanwhile` makes while the tensor cores work."""

  def body(accumulator):
    plgpu.wgmma(accumulator, left, right)
    made = meanwhile()
    return accumulator[...], made

  return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def products(shape, terms) -> jax.Array:
  """The sum of left @ right over the terms (left, right) in float32."""

  def body(accumulator):
    for left, right in terms:
      plgpu.wgmma(accumulator, left, right)
    return accumulator[...]

  return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def accumulate(interpret: bool, *terms) -> list[jax.Array]:
  """start + left @ right for each of the terms (start, left, right), issued together.

  The interpreter knows no accumulator with a start.
  """
  if interpret:
    return [start + product(start.shape, left, right) for start, left, right in terms]

  def body(accumulators):
    for accumulator, (_, left, right) in zip(accumulators, terms):
      plgpu.wgmma(accumulator, left, right)

  starts = tuple(plgpu.ACC.init(start) for start, _, _ in terms)
  return list(pl.run_state(body)(starts))


def accumulate_sums(*terms) -> list[jax.Array]:
  """start + the sum of left @ right for each of the terms (start, [(left, right), ...])."""

  def body(accumulators):
    for accumulator, (_, pairs) in zip(accumulators, terms):
      for left, right in pairs:
        plgpu.wgmma(accumulator, left, right)

  starts = tuple(plgpu.ACC.init(start) for start, _ in terms)
  return list(pl.run_state(body)(starts))


def products_and(shape, terms, meanwhile: Callable):
  """The sum of left @ right over the terms, and what `meanwhile` makes meanwhile."""

  def body(accumulator):
    for left, right in terms:
      plgpu.wgmma(accumulator, left, right)
    made = meanwhile()
    return accumulator[...], made

  return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def accumulate_and(interpret: bool, start, terms, meanwhile: Callable):
  """start + the sum of left @ right over the terms, and what `meanwhile` makes meanwhile."""
  if interpret:
    made = meanwhile()
    return start + sum(product(start.shape, left, right) for left, right in terms), made

  def body(accumulator):
    accumulator[...] = start
    for left, right in terms:
      plgpu.wgmma(accumulator, left, right)
    made = meanwhile()
    return accumulator[...], made

  return pl.run_scoped(body, plgpu.ACC(start.shape, jnp.float32))


def sums_together(interpret: bool, shape, groups, meanwhile: Callable = lambda: None):
  """For each group (start or None, [(left, right), ...]) the sum of start and the products, issued
  together; and what `meanwhile` makes meanwhile."""
  if interpret:
    made, results = meanwhile(), []
    for start, terms in groups:
      total = sum(product(shape, left, right) for left, right in terms)
      results.append(total if start is None else start + total)
    return results, made

  def body(*accumulators):
    for accumulator, (start, terms) in zip(accumulators, groups):
      if start is not None:
        accumulator[...] = start
      for left, right in terms:
        plgpu.wgmma(accumulator, left, right)
    made = meanwhile()
    return [accumulator[...] for accumulator in accumulators], made

  return pl.run_scoped(body, *[plgpu.ACC(shape, jnp.float32)] * len(groups))


def load_and_read(
  steps: jax.Array,
  stages: int,
  readers: int,
  fetch: Callable,
  read: Callable,
  full,
  consumed,
  interpret: bool,
  share_registers: bool = True,
):
  """The last warpgroup fetches tiles into a ring of buffers, the others read them.

  Args:
    steps: how many tiles there are, int32.
    stages: buffers in the ring.
    readers: warpgroups that read; one more is the loader.
    fetch: `fetch(step, slot)` starts the copies into a buffer, each arriving at `full[slot]`.
    read: `read(wait, release)` is the readers' program; `wait(step)` returns the slot once it is
      full, `release(slot)` hands it back.
    share_registers: the readers get equally many; otherwise they set their own.
  """
  thread = lax.axis_index("thread")

  @pl.when(thread < readers)
  def _():
    if not interpret and readers > 1 and share_registers:
      budget = (REGISTERS - LOADER_REGISTERS) // readers // 8 * 8
      plgpu.set_max_registers(min(budget, 240), action="increase")

    def wait(step):
      slot = lax.rem(step, jnp.int32(stages))
      plgpu.barrier_wait(full.at[slot])
      return slot

    read(wait, lambda slot: plgpu.barrier_arrive(consumed.at[slot]))

  @pl.when(thread == readers)
  def _():
    if not interpret and readers > 1:
      plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    for step in range(stages):
      pl.when(step < steps)(lambda step=step: fetch(jnp.int32(step), step))

    @pl.loop(jnp.int32(stages), steps)
    def _(step):
      slot = lax.rem(step, jnp.int32(stages))
      plgpu.barrier_wait(consumed.at[slot])
      fetch(step, slot)

    # Every release is waited for: the interpreter takes one that is not for a mistake.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
      plgpu.barrier_wait(consumed.at[lax.rem(step, jnp.int32(stages))])
