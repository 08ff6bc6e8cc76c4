"""The Hopper kernel of `linear_scan`: a walk over time in tiles, and what is done to each.

One program has a few channels. Its tiles are fetched well ahead of it, which is what keeps the
memory busy. In a tile, groups of threads have ROWS tokens each: every group finds the map that its
tokens are, then which state it begins with, then its states:

  c <- a_t c + b_t                               forward, h_t = c
  d = e_t + c,  db_t = d,  da_t = d h_before,    from the other end, e_t = dL/dh_t
  c <- a_t d

The state before the first token stands in for the h that is not there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import heuristics
from ops.kernels.gpu.linear_scan import PADDING, PLAIN, START, tile_marks
from ops.kernels.gpu.threads import PARAMS, run_threads

ROWS = 16  # tokens of a thread in a tile
WIDTHS = (64, 32, 16)  # channels of a program
MEMORY = 100 * 2**10  # bytes of shared memory, two programs on a multiprocessor


class Tiling(NamedTuple):
  """The shape of the tiles of a program, and how many are fetched ahead."""

  width: int  # channels
  stages: int

  @property
  def groups(self) -> int:
    return 256 // self.width  # of threads that have two channels each

  @property
  def tokens(self) -> int:
    return ROWS * self.groups


def choose_tiling(B: int, D: int, tile_bytes: int, result_bytes: int) -> Tiling:
  """As wide as leaves every multiprocessor a program; bytes are of one token and channel."""
  multiprocessors = heuristics.here().multiprocessors
  fills = lambda width: B * -(-D // width) >= 0.9 * multiprocessors
  width = next((width for width in WIDTHS if fills(width)), WIDTHS[-1])
  stages = (MEMORY // (256 * ROWS) - 2 * result_bytes) // tile_bytes
  return Tiling(width, max(2, min(stages, 3)))  # on an H100 more are slower


def walk(
  program: Callable, arrays: Sequence[jax.Array], before: Sequence[int], dtypes, carry, first,
  marks, reverse: bool, backward: bool, tiling: Tiling | None, interpret,
):  # fmt: skip
  """Runs `program` on every tile of `arrays` [B T D], one after the other.

  Args:
    program: a thread program, `states` or `gradients`.
    before: for each array, by how many tokens its tiles lie before the others' in time.
    dtypes: of the results.
    carry: float32 [B D], what the first tile begins with.
    first: float32 [B D], the state before all tokens.
    marks: int32 [B T] or None.
    reverse: time runs from the right.
    backward: tiles are done against time.

  Returns:
    The results [B T D], and the carry of the last tile.
  """
  B, T, D = arrays[0].shape
  bytes_of = lambda types: sum(jnp.dtype(dtype).itemsize for dtype in types)
  tiling = tiling or choose_tiling(B, D, bytes_of(x.dtype for x in arrays), bytes_of(dtypes))
  width, stages, tokens = tiling.width, tiling.stages, tiling.tokens
  tiles = -(-T // tokens)
  stages = min(stages, tiles)
  simulated, results = interpret is not None, len(dtypes)
  marked = marks is not None or T % tokens != 0
  if marked:
    marks = jnp.full((B, T), PLAIN) if marks is None else marks
    marks = tile_marks(marks, tiles, tokens, reverse)
  program = functools.partial(program, tiling=tiling, descending=reverse != backward, marked=marked)

  # The copy engine clips tiles that reach beyond the last token, but not where a tile is one piece
  # of memory, and it does not store from before the first.
  margin = tokens if simulated or (T % tokens and (reverse or width == D)) else 0
  if margin:
    arrays = [jnp.pad(x, ((0, 0), (margin, margin), (0, 0))) for x in arrays]
  row = max(width, 32)  # channels, for copies are of 128 bytes; those beyond `width` are not used

  def kernel(*refs):
    refs = iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]
    inputs, edges_hbm, marks_hbm = take(len(arrays)), take(2), take(marked)
    outputs, (final_hbm,) = take(results), take(1)
    batch, block = lax.axis_index("batch"), lax.axis_index("block")
    channels = pl.ds(block * width, width)

    def place(step):
      tile = tiles - 1 - step if backward else step
      return tile, margin + (T - (tile + 1) * tokens if reverse else tile * tokens)

    def run(tiles_s, marks_s, outputs_s, edges_s, ends_s, full, ready):
      def fetch(step, slot):
        tile, start = place(step)
        for ref, tile_s, shift in zip(inputs, tiles_s, before):
          rows = pl.ds(start + shift if reverse else start - shift, tokens)
          plgpu.copy_gmem_to_smem(ref.at[batch, rows, channels], tile_s.at[slot], full.at[slot])
        if marked:
          plgpu.copy_gmem_to_smem(marks_hbm[0].at[batch, tile], marks_s.at[slot], full.at[slot])

      # Rows: a carry, the state before all tokens, the other carry; tiles take turns.
      for n, edge_hbm in enumerate(edges_hbm):
        edge = edge_hbm.at[batch, pl.ds(block * width, row)]
        plgpu.copy_gmem_to_smem(edge, edges_s.at[n], ready)
      for step in range(stages):
        fetch(jnp.int32(step), step)
      plgpu.barrier_wait(ready)

      @pl.loop(jnp.int32(0), jnp.int32(tiles))
      def _(step):
        slot, turn = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
        tile, start = place(step)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wait_smem_to_gmem(results, wait_read_only=True)
        run_threads(
          program,
          *[tile_s.at[slot] for tile_s in tiles_s],
          *[output_s.at[turn] for output_s in outputs_s],
          edges_s.at[2 * turn], edges_s.at[2 - 2 * turn], edges_s.at[1], ends_s,
          *([marks_s.at[slot]] if marked else []),
          flag=tile, simulated=simulated,
        )  # fmt: skip
        plgpu.commit_smem()
        for output, output_s in zip(outputs, outputs_s):
          plgpu.copy_smem_to_gmem(
            output_s.at[turn], output.at[batch, pl.ds(start, tokens), channels]
          )
        pl.when(step + stages < tiles)(lambda: fetch(step + stages, slot))

      last = edges_s.at[tiles % 2 * 2, pl.ds(0, width)]
      plgpu.copy_smem_to_gmem(last, final_hbm.at[batch, channels])
      plgpu.wait_smem_to_gmem(0)

    ring = lambda count, dtype: plgpu.SMEM((count, tokens, width), dtype)
    pl.run_scoped(
      run,
      [ring(stages, x.dtype) for x in arrays],
      plgpu.SMEM((stages, max(tokens, 32)), jnp.int32) if marked else None,
      [ring(2, dtype) for dtype in dtypes],
      plgpu.SMEM((3, row), jnp.float32),
      plgpu.SMEM((tiling.groups, 2, width), jnp.float32),
      plgpu.Barrier(num_arrivals=len(arrays) + marked, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2),
    )  # fmt: skip

  *out, final = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct((B, T + 2 * margin, D), dtype) for dtype in dtypes]
    + [jax.ShapeDtypeStruct((B, -(-D // width) * width), jnp.float32)],
    grid=(-(-D // width), B),
    grid_names=("block", "batch"),
    interpret=interpret,
    compiler_params=PARAMS,
  )(*arrays, carry, first, *([marks] if marked else []))
  return [x[:, margin : margin + T] for x in out], final[:, :D]


def states(
  threads, a_tile, b_tile, h_tile, carry, carry_after, first, ends, marks=None, *, tiling,
  descending, marked,
):  # fmt: skip
  """The states of a tile."""
  where = threads.where
  own = _Own(threads, tiling, descending, marks)
  a, b = own.load(a_tile), own.load(b_tile)
  for i, mark in enumerate(own.marks):
    a[i] = [where(mark == PADDING, 1, x) for x in a[i]]
    b[i] = [where(mark == PADDING, 0, x) for x in b[i]]

  def step(i, channel, state, fresh):
    if fresh is not None:
      state = where(fresh, 0, state)
    return threads.multiply_add(a[i][channel], state, b[i][channel])

  state = own.begin(carry, ends, a, step)
  for i in range(ROWS):
    state = [step(i, n, c, own.fresh(i)) for n, c in enumerate(state)]
    own.at(h_tile, i).store(state)
  own.end(carry_after, state)


def gradients(
  threads, a_tile, e_tile, h_tile, da_tile, db_tile, carry, carry_after, first, ends, marks=None,
  *, tiling, descending, marked,
):  # fmt: skip
  """The gradients of a tile, from the last token to the first."""
  where = threads.where
  own = _Own(threads, tiling, descending, marks)
  a, e = own.load(a_tile), own.load(e_tile)
  for i, mark in enumerate(own.marks):
    a[i] = [where(mark == PADDING, 1, x) for x in a[i]]
    e[i] = [where(mark == PADDING, 0, x) for x in e[i]]

  def step(i, channel, carry, fresh):
    carry = a[i][channel] * (carry + e[i][channel])
    return carry if fresh is None else where(fresh, 0, carry)

  carry = own.begin(carry, ends, a, step)
  is_first = (threads.flag == 0) & (own.group == tiling.groups - 1)
  for i in range(ROWS):
    before = own.at(h_tile, i).load(count=2)
    if i == ROWS - 1:
      before = [where(is_first, x, y) for x, y in zip(first.at(own.column).load(count=2), before)]
    d = [x + c for x, c in zip(e[i], carry)]
    da = [x * h for x, h in zip(d, before)]
    db = d
    if marks is not None:
      da = [where(own.marks[i] == PLAIN, x, 0) for x in da]
      db = [where(own.marks[i] == PADDING, 0, x) for x in db]
    own.at(da_tile, i).store(da)
    own.at(db_tile, i).store(db)
    carry = [step(i, n, c, own.fresh(i)) for n, c in enumerate(carry)]
  own.end(carry_after, carry)


class _Own:
  """What a thread has of a tile: ROWS tokens, in the order in which they are done, two channels."""

  def __init__(self, threads, tiling: Tiling, descending: bool, marks):
    lanes = tiling.width // 2
    self.threads, self.tiling = threads, tiling
    self.group, self.column = threads.index // lanes, threads.index % lanes * 2
    first, self.sign = self.group * ROWS, 1
    if descending:
      first, self.sign = first * -1 + (tiling.tokens - 1), -1
    self.corner = first * tiling.width + self.column
    self.marks = []
    if marks is not None:
      row = marks.at(first)
      self.marks = [row.load(self.sign * i)[0] for i in range(ROWS)]

  def at(self, tile, i):
    return tile.at(self.corner).at(self.sign * i * self.tiling.width)

  def load(self, tile):
    return [self.at(tile, i).load(count=2) for i in range(ROWS)]

  def fresh(self, i):
    return self.marks[i] == START if self.marks else None

  def begin(self, carry, ends, a, step: Callable):
    """The numbers that the thread begins with."""
    threads, width = self.threads, self.tiling.width
    factor = [threads.constant(1.0)] * 2
    total = [threads.constant(0.0)] * 2
    for i in range(ROWS):
      total = [step(i, n, x, self.fresh(i)) for n, x in enumerate(total)]
      factor = [x * y for x, y in zip(factor, a[i])]
      if self.marks:
        factor = [threads.where(self.fresh(i), 0, x) for x in factor]
    mine = ends.at(self.group * (2 * width) + self.column)
    mine.store(factor)
    mine.store(total, width)
    threads.wait_for_all()
    numbers = carry.at(self.column).load(count=2)
    begin = numbers
    theirs = ends.at(self.column)
    for group in range(self.tiling.groups - 1):
      factor, total = (theirs.load(2 * width * group + n * width, 2) for n in range(2))
      following = [threads.multiply_add(*x) for x in zip(factor, numbers, total)]
      if self.marks:
        # A factor of 0 forgets; times NaN it would not.
        following = [threads.where(x == 0, y, z) for x, y, z in zip(factor, total, following)]
      numbers = following
      begin = [threads.where(self.group == group + 1, x, y) for x, y in zip(numbers, begin)]
    return begin

  def end(self, carry_after, numbers):
    """Hands the last group's numbers to the next tile."""
    carry_after.at(self.column).store(numbers, where=self.group == self.tiling.groups - 1)
