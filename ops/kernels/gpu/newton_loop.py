"""The loop of a nonlinear recurrence over all tokens in one kernel, and its gradients in another.

  h_t = f(h_{t-1}, x_t)          l_t = g_t + (df/dh at t+1)^T l_{t+1},   dx_t = (df/dx at t)^T l_t

A thread owns a channel, its state and its parameters in registers; a warpgroup of them walks over
the tokens, which another one fetches, some at a time, into a ring in shared memory. A step takes as
long as the chain of operations from state to state. The gradients' chain is short: everything but
l is there beforehand.

The first piece of the sequence takes what is left over by whole tiles of tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.newton import CHANNELS, PADDING, START
from ops.kernels.gpu.newton_cell import ChannelCell

TILE = 8  # tokens fetched together
GROUP = 4  # of them, written out one after the other in the gradients
KINDS = 32  # fetched with them: no copy is of fewer than 128 bytes
STAGES = 4  # tiles in shared memory
PARAMS = plgpu.CompilerParams(
  approx_math=True,
  lowering_semantics=plgpu.LoweringSemantics.Lane,
  # No thread reads what another writes, but for what is fetched.
  unsafe_no_auto_barriers=True,
)


class _Tiles:
  """A sequence in tiles: one of the first `head` tokens, from 1 to a tile, and whole ones."""

  def __init__(self, T: int):
    self.size = min(TILE, T)
    self.whole = (T - 1) // self.size
    self.head = T - self.whole * self.size

  def start(self, n):
    """The first token of tile n, of which the first has n = 0."""
    return jnp.where(n == 0, 0, self.head + (n - 1) * self.size)


def loop(cell: ChannelCell, params, state, kinds, xs, *, maps: bool = False, interpret=None):
  """All states, float32 [B T M D]; with `maps` also the derivatives of the last ones with respect
  to the state before the first token, [B M M D] (new, old).

  Args:
    params: float32 [B P D], D a multiple of `CHANNELS`.
    state: float32 [B M D], before the first token.
    kinds: of tokens, `padded`; None is all 0.
    xs: a list of float32 [B T X D].
  """
  (B, T, _, D), (P, M) = xs[0].shape, (params.shape[1], state.shape[1])
  tiles, count = _Tiles(T), len(xs)

  def kernel(params_hbm, state_hbm, kinds_hbm, *refs):
    xs_hbm, h_hbm, maps_hbm = refs[:count], refs[count], refs[count + 1 :]
    batch, here = lax.axis_index("batch"), _channels()
    own = [params_hbm[batch, i, here] for i in range(P)]

    def run(tokens_s, kinds_s, full, consumed):
      sources = [(x_hbm, tiles.start) for x_hbm in xs_hbm]
      fetch = _fetcher(sources, tokens_s, kinds_hbm, kinds_s, full, tiles.start)

      def advance(kind, x, h, product):
        """The next state, and what was `product` before this token."""
        before, old = _reset(kind, h), _reset(kind, product)
        if not maps:
          new, product = cell.step(own, before, x), ()
        else:
          new, J = cell.push(own, before, x)
          product = [
            sum(J[i][k] * old[k * M + j] for k in range(M)) for i in range(M) for j in range(M)
          ]
        carry = *new, *product
        carry = carry if kind is None else _select(kind == PADDING, (*h, *old), carry)
        return tuple(map(_by_thread, carry))

      def read(wait, release):
        def token(n, slot, i, carry):
          kind = None if kinds is None else kinds_s[slot, i]
          carry = advance(kind, _numbers(tokens_s, slot, i), carry[:M], carry[M:])
          for m in range(M):
            h_hbm[batch, tiles.start(n) + i, m, here] = carry[m]
          return carry

        def whole(n, carry):
          slot = wait(n)
          for i in range(tiles.size):
            carry = token(n, slot, i, carry)
          release(slot)
          return carry

        carry = tuple(state_hbm[batch, m, here] for m in range(M))
        if maps:
          unit = [float(i == j) for i in range(M) for j in range(M)]
          carry += tuple(_by_thread(jnp.full(CHANNELS, x, jnp.float32)) for x in unit)
        slot = wait(jnp.int32(0))
        carry = lax.fori_loop(0, tiles.head, lambda i, c: token(0, slot, i, c), carry)
        release(slot)
        carry = lax.fori_loop(1, tiles.whole + 1, whole, carry)
        for i, number in enumerate(carry[M:]):
          maps_hbm[0][batch, i // M, i % M, here] = number

      steps = jnp.int32(tiles.whole + 1)
      mosaic.load_and_read(steps, STAGES, 1, fetch, read, full, consumed, interpret is not None)

    _with_ring(run, tiles.size, xs, kinds)

  shapes = [(B, T, M, D), (B, M, M, D)] if maps else [(B, T, M, D)]
  out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  results = _launch(kernel, "newton_loop", out, B, D, interpret)(
    params if P else None, state, kinds, *xs
  )
  return results if maps else results[0]


def loop_gradients(
  cell: ChannelCell,
  params,
  state,
  kinds,
  xs,
  h,
  g,
  later,
  *,
  only_state: bool = False,
  interpret=None,
):
  """Gradients of the state [B M D], of params [B P D] and of xs, from those of all states; or
  with `only_state` that one alone.

  Args:
    h, g: float32 [B T M D], what `loop` returned and its cotangents; the rest is as there.
    later: float32 [B M D], what reaches the last states from behind them.
  """
  (B, T, _, D), (P, M) = xs[0].shape, (params.shape[1], state.shape[1])
  tiles, count = _Tiles(T), len(xs)

  def kernel(params_hbm, state_hbm, kinds_hbm, later_hbm, *refs):
    tokens_hbm, (dstate_hbm, *others_hbm) = refs[: count + 2], refs[count + 2 :]
    dparams_hbm, dxs_hbm = others_hbm[: P > 0], others_hbm[P > 0 :]
    batch, here = lax.axis_index("batch"), _channels()
    own = [params_hbm[batch, i, here] for i in range(P)]
    first = [state_hbm[batch, m, here] for m in range(M)]

    def run(tokens_s, kinds_s, full, consumed):
      *xs_s, g_s, before_s = tokens_s
      start = lambda step: tiles.start(tiles.whole - step)
      sources = [(x_hbm, start) for x_hbm in tokens_hbm[:-1]]
      # The states that the tokens met.
      sources.append((tokens_hbm[-1], lambda step: jnp.maximum(start(step) - 1, 0)))
      fetch = _fetcher(sources, tokens_s, kinds_hbm, kinds_s, full, start)

      def read(wait, release):
        def token(step, slot, i, before, carry):
          l, sums = carry
          kind = None if kinds is None else kinds_s[slot, i]
          l = [ours + later for ours, later in zip(_numbers([g_s], slot, i), l)]
          x = _numbers(xs_s, slot, i)
          dparams, dh, dx = cell.pull_back(own, _reset(kind, before), x, l)
          if kind is not None:
            zeros = lambda numbers: [jnp.zeros_like(number) for number in numbers]
            padding = kind == PADDING
            dparams, dx = (_select(padding, zeros(d), d) for d in (dparams, dx))
            dh = _select(padding, l, _reset(kind, dh))
          carry = tuple(map(_by_thread, dh)), tuple(s + d for s, d in zip(sums, dparams))
          at = start(step) + i
          for dx_hbm, d in zip(dxs_hbm, _split(dx, [x.shape[2] for x in xs])):
            for n, number in enumerate(d):
              dx_hbm[batch, at, n, here] = number
          return carry

        def whole(step, carry):
          slot, group = wait(step), GROUP if tiles.size % GROUP == 0 else 1

          def tokens(n, carry):
            for place in range(group):
              i = tiles.size - 1 - n * group - place
              carry = token(step, slot, i, _numbers([before_s], slot, i), carry)
            return carry

          carry = lax.fori_loop(0, tiles.size // group, tokens, carry)
          release(slot)
          return carry

        def later_token(n, carry):
          i = tiles.head - 1 - n
          return token(last, slot, i, _numbers([before_s], slot, i - 1), carry)

        nothing = _by_thread(jnp.zeros(CHANNELS, jnp.float32))
        carry = tuple(later_hbm[batch, m, here] for m in range(M)), (nothing,) * P
        last = jnp.int32(tiles.whole)
        carry = lax.fori_loop(0, last, whole, carry)
        slot = wait(last)
        carry = lax.fori_loop(0, tiles.head - 1, later_token, carry)
        dstate, dparams = token(last, slot, 0, first, carry)
        release(slot)
        for m in range(M):
          dstate_hbm[batch, m, here] = dstate[m]
        for i in range(0 if only_state else P):
          dparams_hbm[0][batch, i, here] = dparams[i]

      mosaic.load_and_read(
        jnp.int32(tiles.whole + 1), STAGES, 1, fetch, read, full, consumed, interpret is not None
      )

    _with_ring(run, tiles.size, [*xs, g, h], kinds)

  others = [] if only_state else [x.shape for x in ([params] if P else []) + list(xs)]
  out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (state.shape, *others)]
  dstate, *others = _launch(kernel, "newton_loop_gradients", out, B, D, interpret)(
    params if P else None, state, kinds, later, *xs, g, h
  )
  if only_state:
    return dstate
  return dstate, others[0] if P else params, others[P > 0 :]


def padded(kinds):
  """int32 [B T], or None, as the kernels take it."""
  if kinds is None:
    return None
  return jnp.pad(kinds, ((0, 0), (0, -kinds.shape[1] % 4 + KINDS)))


def _channels():
  """Those of this program."""
  return pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)


def _with_ring(run, size, tokens, kinds):
  """Calls `run(tokens_s, kinds_s, full, consumed)` with rings of tiles in shared memory."""
  ring = lambda x: plgpu.SMEM((STAGES, size, x.shape[2], CHANNELS), jnp.float32)
  rings = [ring(x) for x in tokens]
  kinds_ring = None if kinds is None else plgpu.SMEM((STAGES, KINDS), jnp.int32)
  copies = len(rings) + (kinds is not None)

  pl.run_scoped(
    lambda kinds_s, full, consumed, *tokens_s: run(tokens_s, kinds_s, full, consumed),
    kinds_ring,
    plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
    *rings,
    collective_axes="thread",
  )  # fmt: skip


def _fetcher(sources, tokens_s, kinds_hbm, kinds_s, full, start):
  """`fetch(step, slot)`; sources are arrays [B T N D] and the first token of each step."""
  batch, here = lax.axis_index("batch"), _channels()

  def fetch(step, slot):
    for (source, first), target in zip(sources, tokens_s):
      rows = pl.ds(first(step), target.shape[1])
      plgpu.copy_gmem_to_smem(source.at[batch, rows, :, here], target.at[slot], full.at[slot])
    if kinds_hbm is not None:
      rows = pl.ds(start(step), KINDS)
      plgpu.copy_gmem_to_smem(kinds_hbm.at[batch, rows], kinds_s.at[slot], full.at[slot])

  return fetch


def _numbers(tokens_s, slot, i):
  """A token's numbers of this thread's channel."""
  return [ref[slot, i, n] for ref in tokens_s for n in range(ref.shape[2])]


def _by_thread(number):
  """In a register of each thread, also where all are the same: what a loop carries."""
  return plgpu.layout_cast(number, plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def _reset(kind, h):
  return h if kind is None else _select(kind == START, [jnp.zeros_like(x) for x in h], h)


def _select(condition, chosen, other):
  return tuple(jnp.where(condition, x, y) for x, y in zip(chosen, other))


def _split(numbers, counts):
  numbers = list(numbers)
  return [[numbers.pop(0) for _ in range(count)] for count in counts]


def _launch(kernel, name, out_type, B, D, interpret):
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(D // CHANNELS, B),
    grid_names=("block", "batch"),
    num_threads=2,
    thread_name="thread",
    interpret=interpret,
    compiler_params=PARAMS,
    kernel_name=name,
  )
