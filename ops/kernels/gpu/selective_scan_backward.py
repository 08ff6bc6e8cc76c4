"""The gradients of the selective scan, from the last token to the first; see `selective_scan.py`.

In pieces of as many tokens as there are to each state that was kept: the states between are made
again, into shared memory, and then read from the last to the first. With e_t = dL/dy_t, from the
other end,

  dC_t = sum_D e_t h_t     d <- d + e_t C_t     dB_t = sum_D u_t d     du_t = sum_N d B_t
  d <- a_t d    w = d h_{t-1}    ddt_t = x_t du_t + sum_N w A    dx_t = dt_t du_t + D e_t
  dA += w dt_t    dD += e_t x_t

Sums over N are of lanes as in the forward pass. Those over D are of 32 lanes for 2 N numbers per
token: the tensor cores do them. What is found for the channels of a program is added by XLA, always
in the same order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu.linear_scan import PADDING, START, tile_marks
from ops.kernels.gpu.selective_scan_forward import (
  Lane,
  advance,
  beyond,
  channels,
  states,
  tokens_kept,
)
from ops.kernels.gpu.threads import PARAMS, THREADS, run_threads

LN_2 = 0.6931471805599453
WARPS = THREADS // 32


def gradients(
  x, dt, A, B, C, D, before, marks, dy, dstate, *, reverse, stages=2, unroll=2, interpret=None
):
  """Of x, dt, A, B, C, D and the state, the last two float32 [B D] and [B N D].

  Args:
    x, dt, A, B, C, D, marks: as in `outputs` of the forward pass.
    before: [B chunks N D], the states that it kept.
    dy: [B T D] in the dtype of `x`.
    dstate: float32 [B N D].
  """
  (batch, T, width), N = x.shape, A.shape[1]
  tokens, W, simulated = tokens_kept(x, dt, N), channels(N), interpret is not None
  chunks, blocks = -(-T // tokens), -(-width // W)
  stages, marked = min(stages, chunks), marks is not None
  margin = beyond(T, tokens, width == W, reverse, simulated)
  if marked:
    marks = tile_marks(marks, chunks, tokens, reverse)
  if margin:
    x, dt, dy, B, C = (jnp.pad(z, ((0, 0), (margin, margin), (0, 0))) for z in (x, dt, dy, B, C))
  program = functools.partial(
    _gradients, N=N, tokens=tokens, unroll=unroll, descending=reverse,
    exact=x.dtype == jnp.float32,
  )  # fmt: skip
  lost = (
    chunks * tokens - T if reverse else 0
  )  # of the sums of whole chunks, before the first token
  float32 = functools.partial(plgpu.SMEM, dtype=jnp.float32)

  def kernel(x_hbm, dt_hbm, dy_hbm, B_hbm, C_hbm, before_hbm, A_hbm, D_hbm, state_hbm, *refs):
    refs = iter(refs)
    marks_hbm = next(refs) if marked else None
    dx_hbm, ddt_hbm, sums_hbm, dA_hbm, dD_hbm, dstate_hbm = refs
    row, block = lax.axis_index("batch"), lax.axis_index("block")
    lanes = pl.ds(block * W, W)

    def place(chunk, first=margin):
      return pl.ds(first + (T - (chunk + 1) * tokens if reverse else chunk * tokens), tokens)

    def run(arrays, marks_s, A_s, D_s, d_s, dA_s, dD_s, results, history_s, full, ready):
      def fetch(step, slot):
        chunk = chunks - 1 - step
        here = place(chunk)
        sources = [z.at[row, here, lanes] for z in (x_hbm, dt_hbm, dy_hbm)]
        sources += [z.at[row, here] for z in (B_hbm, C_hbm)]
        sources += [before_hbm.at[row, chunk, :, lanes]]
        for source, array in zip(sources, arrays):
          plgpu.copy_gmem_to_smem(source, array.at[slot], full.at[slot])
        if marked:
          plgpu.copy_gmem_to_smem(marks_hbm.at[row, chunk], marks_s.at[slot], full.at[slot])

      plgpu.copy_gmem_to_smem(A_hbm.at[row, :, lanes], A_s, ready)
      plgpu.copy_gmem_to_smem(D_hbm.at[row, lanes], D_s, ready)
      plgpu.copy_gmem_to_smem(state_hbm.at[row, :, lanes], d_s, ready)
      for step in range(stages):
        fetch(jnp.int32(step), step)
      plgpu.barrier_wait(ready)
      run_threads(functools.partial(_clear, N=N), dA_s, dD_s, simulated=simulated)

      @pl.loop(jnp.int32(0), jnp.int32(chunks))
      def _(step):
        slot, turn = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
        plgpu.barrier_wait(full.at[slot])
        plgpu.wait_smem_to_gmem(3, wait_read_only=True)
        run_threads(
          program,
          *[array.at[slot] for array in arrays], *[result.at[turn] for result in results],
          A_s, D_s, d_s, dA_s, dD_s, history_s,
          *([marks_s.at[slot]] if marked else []),
          simulated=simulated,
        )  # fmt: skip
        plgpu.commit_smem()
        here = place(chunks - 1 - step)
        targets = dx_hbm.at[row, here, lanes], ddt_hbm.at[row, here, lanes]
        for result, target in zip(
          results, (*targets, sums_hbm.at[block, row, place(chunks - 1 - step, lost)])
        ):
          plgpu.copy_smem_to_gmem(result.at[turn], target)
        pl.when(step + stages < chunks)(lambda: fetch(step + stages, slot))

      plgpu.copy_smem_to_gmem(dA_s, dA_hbm.at[row, :, lanes])
      plgpu.copy_smem_to_gmem(dD_s, dD_hbm.at[row, lanes])
      plgpu.copy_smem_to_gmem(d_s, dstate_hbm.at[row, :, lanes])
      plgpu.wait_smem_to_gmem(0)

    tile = lambda count, dtype: plgpu.SMEM((count, tokens, W), dtype)
    pl.run_scoped(
      run,
      [
        tile(stages, x.dtype), tile(stages, dt.dtype), tile(stages, dy.dtype),
        float32((stages, tokens, N)), float32((stages, tokens, N)),
        plgpu.SMEM((stages, N, W), before.dtype),
      ],
      plgpu.SMEM((stages, max(tokens, 32)), jnp.int32) if marked else None,
      float32((N, W)), float32((W,)), float32((N, W)), float32((N, W)), float32((W,)),
      [tile(2, x.dtype), tile(2, dt.dtype), float32((2, tokens, 2 * N))],
      float32((tokens, 2 * states(N) * THREADS)),
      plgpu.Barrier(num_arrivals=6 + marked, num_barriers=stages),
      plgpu.Barrier(num_arrivals=3),
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  dx, ddt, sums, dA, dD, dstate = plgpu.kernel(
    kernel,
    out_type=[
      struct(x.shape, x.dtype), struct(x.shape, dt.dtype),
      struct((blocks, batch, chunks * tokens, 2 * N), jnp.float32), struct(A.shape, jnp.float32),
      struct((batch, blocks * W), jnp.float32), struct(dstate.shape, jnp.float32),
    ],
    grid=(blocks, batch),
    grid_names=("block", "batch"),
    interpret=interpret,
    compiler_params=PARAMS,
  )(x, dt, dy, B, C, before, A, D, dstate, *([marks] if marked else []))  # fmt: skip
  dC, dB = jnp.split(jnp.sum(sums, axis=0)[:, lost : lost + T], 2, axis=2)
  whole = slice(margin, margin + T)
  return dx[:, whole], ddt[:, whole], dA * LN_2, dB, dC, dD[:, :width], dstate


def _clear(threads, dA, dD, *, N):
  lane, zero = Lane(threads, N), threads.constant(0.0)
  lane.store_pairs(dA, [[zero, zero]] * lane.states)
  dD.at(lane.column).store([zero, zero])


def _gradients(
  threads, x, dt, dy, B, C, before, dx, ddt, sums, A, D, d, dA, dD, history, marks=None,
  *, N, tokens, unroll, descending, exact,
):  # fmt: skip
  lane, where, W = Lane(threads, N), threads.where, channels(N)
  rates, (skip,) = lane.pairs(A), D.at(lane.own).load()
  own_history, slot, count = history.at(threads.index * 4), 2 * lane.states * THREADS, lane.states
  flat = lambda h: [number for pair in h for number in pair]
  paired = lambda h: [list(pair) for pair in zip(h[::2], h[1::2])]

  def token(t):
    """What there is of the token number `t` in the order of the scan, and its row."""
    row = t * -1 + (tokens - 1) if descending else t
    read = lambda memory: lane.of_channels(memory.at(row * W))
    x_t, dt_t, e_t, mark = read(x), read(dt), read(dy), None
    if marks is not None:
      mark = marks.at(row).load()[0]
      is_padding = mark == PADDING
      x_t, dt_t, e_t = ([where(is_padding, 0, z) for z in pair] for pair in (x_t, dt_t, e_t))
    return row, x_t, dt_t, e_t, lane.of_token(B.at(row * N)), lane.of_token(C.at(row * N)), mark

  def remember(i, h):
    remembered = []
    for _, x_t, dt_t, _, B_t, _, mark in [token(i * 4 + t) for t in range(4)]:
      remembered.append(h)
      if mark is not None:
        h = [where(mark == START, 0, z) for z in h]
      h = flat(advance(threads, paired(h), x_t, dt_t, rates, B_t))
    for t, numbers in enumerate(remembered):
      for n in range(0, 2 * count, 4):
        own_history.at((i * 4 + t) * slot).store(numbers[n : n + 4], n * THREADS)
    return h

  def recall(t):
    place = own_history.at(t * slot)
    return [z for n in range(0, 2 * count, 4) for z in place.load(n * THREADS, 4)]

  after = threads.loop(tokens // 4, remember, flat(lane.pairs(before)))
  group = threads.index % 32 // 4
  ones = [where(group == n, threads.constant(1.0), 0) for n in range(count)]
  none = threads.constant(0.0)

  def steps(i, numbers):
    after, d, dA = (paired(numbers[2 * count * n :][: 2 * count]) for n in range(3))
    places = [i * -unroll + (tokens - 1 - n) for n in range(unroll)]
    loaded, results, dD = [(token(t), paired(recall(t))) for t in places], [], numbers[-1]
    for one, h in loaded:
      d, dA, result = step(one, after, h, d, dA)
      after, (_, x_t, _, e_t, *_) = h, one
      dD = threads.multiply_add(e_t[0], x_t[0], dD)
      results.append(result)
    # Sums go where other threads of the warp remembered, and read by now.
    threads.wait_for_warp()
    for t, ((row, *_), _), (dx_t, ddt_t, total) in zip(places, loaded, results):
      dx.at(row * W).at(lane.own).store([dx_t])
      ddt.at(row * W).at(lane.own).store([ddt_t])
      _store_sums(threads, lane, history.at(t * slot).at(lane.warp * 128), total)
    return [*flat(after), *flat(d), *flat(dA), dD]

  def step(one, after, h, d, dA):
    """One token, from the states after it and before."""
    _, x_t, dt_t, e_t, B_t, C_t, mark = one
    d, dA = list(d), list(dA)
    both = lambda p, q: threads.multiply_add(p[0], q[0], p[1] * q[1])
    u, du, rate = [p * q for p, q in zip(dt_t, x_t)], [none] * 2, [none] * 2
    total = [none] * 4
    for n in range(count):
      for_C = both(e_t, after[n])
      d[n] = [threads.multiply_add(e_t[c], C_t[n], d[n][c]) for c in range(2)]
      for_B = both(u, d[n])
      du = [threads.multiply_add(d[n][c], B_t[n], du[c]) for c in range(2)]
      d[n] = [threads.exp2(dt_t[c] * rates[n][c]) * d[n][c] for c in range(2)]
      w = [d[n][c] * h[n][c] for c in range(2)]
      if mark is not None:
        d[n], w = ([where(mark == START, 0, z) for z in pair] for pair in (d[n], w))
      dA[n] = [threads.multiply_add(w[c], dt_t[c], dA[n][c]) for c in range(2)]
      rate = [threads.multiply_add(w[c], rates[n][c], rate[c]) for c in range(2)]
      pieces = [(for_C, for_B)]
      if exact:
        short = [threads.short(z) for z in pieces[0]]
        pieces = [short, [p - q for p, q in zip(pieces[0], short)]]
      for piece in pieces:
        total = threads.product((ones[n], none, none, ones[n]), piece, total)
    du, rate = lane.total(du), lane.total(rate)
    ddt_t = threads.multiply_add(x_t[0], du, rate * LN_2)
    if mark is not None:
      ddt_t = where(mark == PADDING, 0, ddt_t)
    return d, dA, (threads.multiply_add(dt_t[0], du, skip * e_t[0]), ddt_t, total)

  numbers = [*after, *flat(lane.pairs(d)), *flat(lane.pairs(dA)), dD.at(lane.own).load()[0]]
  numbers = threads.loop(tokens // unroll, steps, numbers)
  lane.store_pairs(d, paired(numbers[2 * count : 4 * count]))
  lane.store_pairs(dA, paired(numbers[4 * count : 6 * count]))
  dD.at(lane.own).store([numbers[-1]])
  threads.wait_for_all()
  together = min(4, tokens * 2 * N // THREADS)  # so that no thread has a place beyond the last
  for first in range(0, tokens * 2 * N, together * THREADS):
    place = threads.index * together + first
    row, column = place // (2 * N), place % (2 * N)
    t = row * -1 + (tokens - 1) if descending else row
    summed = [none] * together
    for warp in range(WARPS):
      found = history.at(t * slot + column).load(warp * 128, together)
      summed = [p + q for p, q in zip(summed, found)]
    sums.at(place).store(summed)


def _store_sums(threads, lane, parts, total):
  """The warp's share of dC and dB, from `total` of [dC or dB of a state] x [8 groups of lanes]."""
  state, quarter = threads.index % 32 // 4, threads.index % 4
  per_part = total if lane.parts == 8 else [total[0] + total[1], total[2] + total[3]]
  in_part = len(per_part) // 2
  # Rows that are no state go to the spare half of the place, without a branch, each to its own.
  first = quarter * (in_part * lane.states) + state % lane.states + state // lane.states * 64
  for n, number in enumerate(per_part):
    place = parts.at(first).at(n // in_part * lane.N + n % in_part * lane.states)
    place.store([number])
