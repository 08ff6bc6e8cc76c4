"""The selective scan from the first token to the last; see `selective_scan.py`.

A thread has two channels and a few of their N numbers, in registers; those of a channel are spread
over lanes of a warp, that add up what they have of y. Per token a multiprocessor can do one
exponential per thread in the time of eight other instructions, which are what there is to save:
two channels share what is loaded of B and C, and all tokens of an unrolled step are loaded before
anything is stored, for the compiler keeps loads behind stores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu.linear_scan import PADDING, START, tile_marks
from ops.kernels.gpu.threads import PARAMS, THREADS, run_threads


class Tiling(NamedTuple):
  """How time is cut, and how many tokens a thread does at once."""

  tokens: int
  stages: int  # tiles that are fetched ahead
  unroll: int


def states(N: int) -> int:
  """Numbers of a channel in one thread; few, so that warps have others to wait beside."""
  return 4 if N <= 32 else 8


def channels(N: int) -> int:
  """Of one program."""
  return 2 * THREADS * states(N) // N


def tokens_kept(x, dt, N: int) -> int:
  """Tokens for each state that is kept for the gradients; what these make again must fit."""
  return 16 if x.dtype == dt.dtype == jnp.bfloat16 and N <= 32 else 8


def beyond(T: int, tokens: int, is_whole: bool, reverse: bool, simulated: bool) -> int:
  """Tokens to add before the first and after the last.

  The copy engine clips tiles that reach beyond the last token, but not where a tile `is_whole` rows
  of the array, one piece of memory, and it does not store from before the first.
  """
  return tokens if simulated or (T % tokens and (reverse or is_whole)) else 0


def outputs(x, dt, A, B, C, D, state, marks, *, reverse, save=False, tiling=None, interpret=None):
  """y [B T D], the final state [B N D], and with `save` the states before every
  `tokens_kept` tokens [B chunks N D] in the dtype of `x`.

  Args:
    x, dt: bfloat16 or float32 [B T D].
    A: float32 [B N D], times log2(e).
    B, C: float32 [B T N], zero at padding.
    D: float32 [B D].
    state: float32 [B N D].
    marks: int32 [B T] of `linear_scan.py`, or None.
    reverse: time runs from the right.
  """
  (batch, T, width), N = x.shape, A.shape[1]
  every = tokens_kept(x, dt, N)
  tiling = tiling or Tiling(4 * every, 2, 4)
  tokens, W, simulated = tiling.tokens, channels(N), interpret is not None
  tiles = -(-T // tokens)
  stages, marked, kept = min(tiling.stages, tiles), marks is not None, tokens // every
  margin = beyond(T, tokens, width == W, reverse, simulated)
  if marked:
    marks = tile_marks(marks, tiles, tokens, reverse)
  if margin:
    x, dt, B, C = (jnp.pad(z, ((0, 0), (margin, margin), (0, 0))) for z in (x, dt, B, C))
  program = functools.partial(
    _outputs, N=N, tiling=tiling, descending=reverse, save=every if save else 0
  )

  def kernel(x_hbm, dt_hbm, B_hbm, C_hbm, A_hbm, D_hbm, state_hbm, *refs):
    refs = iter(refs)
    marks_hbm = next(refs) if marked else None
    y_hbm, final_hbm = next(refs), next(refs)
    kept_hbm = next(refs) if save else None
    row, lanes = lax.axis_index("batch"), pl.ds(lax.axis_index("block") * W, W)

    def place(tile):
      return pl.ds(margin + (T - (tile + 1) * tokens if reverse else tile * tokens), tokens)

    def run(x_s, dt_s, B_s, C_s, A_s, D_s, state_s, marks_s, y_s, kept_s, full, ready):
      def fetch(tile, slot):
        here, arrived = place(tile), full.at[slot]
        plgpu.copy_gmem_to_smem(x_hbm.at[row, here, lanes], x_s.at[slot], arrived)
        plgpu.copy_gmem_to_smem(dt_hbm.at[row, here, lanes], dt_s.at[slot], arrived)
        plgpu.copy_gmem_to_smem(B_hbm.at[row, here], B_s.at[slot], arrived)
        plgpu.copy_gmem_to_smem(C_hbm.at[row, here], C_s.at[slot], arrived)
        if marked:
          plgpu.copy_gmem_to_smem(marks_hbm.at[row, tile], marks_s.at[slot], arrived)

      plgpu.copy_gmem_to_smem(A_hbm.at[row, :, lanes], A_s, ready)
      plgpu.copy_gmem_to_smem(D_hbm.at[row, lanes], D_s, ready)
      plgpu.copy_gmem_to_smem(state_hbm.at[row, :, lanes], state_s, ready)
      for tile in range(stages):
        fetch(jnp.int32(tile), tile)
      plgpu.barrier_wait(ready)

      @pl.loop(jnp.int32(0), jnp.int32(tiles))
      def _(tile):
        slot, turn = lax.rem(tile, jnp.int32(stages)), lax.rem(tile, jnp.int32(2))
        plgpu.barrier_wait(full.at[slot])
        plgpu.wait_smem_to_gmem(1 + bool(save), wait_read_only=True)
        run_threads(
          program,
          x_s.at[slot], dt_s.at[slot], B_s.at[slot], C_s.at[slot], A_s, D_s, state_s, y_s.at[turn],
          *([kept_s.at[turn]] if save else []), *([marks_s.at[slot]] if marked else []),
          simulated=simulated,
        )  # fmt: skip
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s.at[turn], y_hbm.at[row, place(tile), lanes])
        if save:
          some = pl.ds(tile * kept, kept)
          plgpu.copy_smem_to_gmem(kept_s.at[turn], kept_hbm.at[row, some, :, lanes])
        pl.when(tile + stages < tiles)(lambda: fetch(tile + stages, slot))

      plgpu.copy_smem_to_gmem(state_s, final_hbm.at[row, :, lanes])
      plgpu.wait_smem_to_gmem(0)

    ring = lambda count, *shape, dtype=x.dtype: plgpu.SMEM((count, *shape), dtype)
    pl.run_scoped(
      run,
      ring(stages, tokens, W), ring(stages, tokens, W, dtype=dt.dtype),
      ring(stages, tokens, N, dtype=jnp.float32), ring(stages, tokens, N, dtype=jnp.float32),
      plgpu.SMEM((N, W), jnp.float32), plgpu.SMEM((W,), jnp.float32),
      plgpu.SMEM((N, W), jnp.float32),
      ring(stages, tokens, dtype=jnp.int32) if marked else None,
      ring(2, tokens, W), ring(2, kept, N, W) if save else None,
      plgpu.Barrier(num_arrivals=4 + marked, num_barriers=stages), plgpu.Barrier(num_arrivals=3),
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  out_type = [struct(x.shape, x.dtype), struct(state.shape, jnp.float32)]
  if save:
    out_type.append(struct((batch, tiles * kept, N, width), x.dtype))
  y, *rest = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(-(-width // W), batch),
    grid_names=("block", "batch"),
    interpret=interpret,
    compiler_params=PARAMS,
  )(x, dt, B, C, A, D, state, *([marks] if marked else []))
  return y[:, margin : margin + T], *rest


class Lane:
  """Which channels and states a thread has."""

  def __init__(self, threads, N: int):
    self.threads, self.N, self.width, self.states = threads, N, channels(N), states(N)
    self.parts = N // self.states  # threads that share channels, 4 or 8
    pairs = 32 // self.parts  # in a warp
    lane = threads.index % 32
    self.warp, self.part = threads.index // 32, lane // pairs
    self.column = (self.warp * pairs + lane % pairs) * 2
    self.is_upper = lane // 16 == 1
    # The channel that `total` leaves, in several threads. All store the same: a condition would be
    # a branch, across which the compiler moves nothing.
    self.own = threads.where(self.is_upper, self.column + 1, self.column)

  def pairs(self, memory):
    """[N W] -> [states][2], the channel first that `total` leaves."""
    place = memory.at(self.part * (self.states * self.width) + self.column)
    return [place.load_pair(self.is_upper, n * self.width) for n in range(self.states)]

  def store_pairs(self, memory, numbers):
    place = memory.at(self.part * (self.states * self.width) + self.column)
    for n, pair in enumerate(numbers):
      place.store_pair(pair, self.is_upper, n * self.width)

  def of_token(self, row):
    """[N] -> [states], the same for all channels."""
    place = row.at(self.part * self.states)
    return [number for n in range(0, self.states, 4) for number in place.load(n, 4)]

  def of_channels(self, row):
    """[W] -> [2], the channel first that `total` leaves."""
    return row.at(self.column).load_pair(self.is_upper)

  def total(self, pair):
    """The sum over all states for the first of the two channels."""
    threads = self.threads
    total = pair[0] + threads.exchange(pair[1], 16)
    for distance in (8, 4):
      if distance >= 32 // self.parts:
        total = total + threads.exchange(total, distance)
    return total


def _outputs(threads, x, dt, B, C, A, D, state, y, *rest, N, tiling, descending, save):
  """y of a tile, and the state after it."""
  lane, where, W = Lane(threads, N), threads.where, channels(N)
  kept, (marks,) = rest[0] if save else None, (*rest[bool(save) :], None)[:1]
  rates = lane.pairs(A)
  (skip,) = D.at(lane.own).load()
  sign = -1 if descending else 1
  flat = lambda h: [number for pair in h for number in pair]
  paired = lambda h: [list(pair) for pair in zip(h[::2], h[1::2])]

  def step(i, h):
    h = paired(h)
    row = i * (sign * tiling.unroll) + (tiling.tokens - 1 if descending else 0)
    loaded, results = [], []
    for token in range(tiling.unroll):
      at = lambda memory, size, token=token: memory.at(row * size).at(sign * token * size)
      loaded.append((
        lane.of_channels(at(x, W)), lane.of_channels(at(dt, W)),
        lane.of_token(at(B, N)), lane.of_token(at(C, N)),
        at(marks, 1).load()[0] if marks is not None else None,
      ))  # fmt: skip
    for x_t, dt_t, B_t, C_t, mark in loaded:
      if mark is not None:
        x_t, dt_t = ([where(mark == PADDING, 0, z) for z in pair] for pair in (x_t, dt_t))
        h = [[where(mark == START, 0, z) for z in pair] for pair in h]
      h, y_t = advance(threads, h, x_t, dt_t, rates, B_t), [threads.constant(0.0)] * 2
      for n in range(len(rates)):
        y_t = [threads.multiply_add(h[n][c], C_t[n], y_t[c]) for c in range(2)]
      y_t = threads.multiply_add(skip, x_t[0], lane.total(y_t))
      if mark is not None:
        y_t = where(mark == PADDING, 0, y_t)
      results.append(y_t)
    for token, y_t in enumerate(results):
      place = y.at(row * W).at(sign * token * W).at(lane.own)
      place.store([y_t])
    return flat(h)

  h = flat(lane.pairs(state))
  if save:
    steps = save // tiling.unroll

    def piece(i, h):
      lane.store_pairs(kept.at(i * (N * W)), paired(h))
      return threads.loop(steps, lambda j, h: step(i * steps + j, h), h)

    h = threads.loop(tiling.tokens // save, piece, h)
  else:
    h = threads.loop(tiling.tokens // tiling.unroll, step, h)
  lane.store_pairs(state, paired(h))


def advance(threads, h, x, dt, rates, B):
  """h_t [states][2] from h_{t-1}."""
  u = [p * q for p, q in zip(dt, x)]
  return [
    [
      threads.multiply_add(threads.exp2(dt[c] * rates[n][c]), h[n][c], u[c] * B[n])
      for c in range(2)
    ]
    for n in range(len(rates))
  ]
