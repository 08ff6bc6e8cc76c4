"""`newton_scan` on Hopper GPUs: one token after the other in one kernel, which no launch delays;
where channels are few, over segments of the sequence at once.

The kernels are in `newton_loop.py`, imported when they run: older versions of jax lack what they
use; segments are in `newton_segments.py`. Cells are the user's own, as long as their channels never
mix: `newton_cell.py`.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import newton_cell
from ops.kernels.gpu.heuristics import no_hopper
from ops.kernels.gpu.scalar_decay import folding_mapped_axes
from ops.newton_solve import Report

CHANNELS = 128  # of a program: its threads
START, PADDING = 1, 2  # what a token may be, beside 0


def supports(*, cell, params, x, initial_state, parts, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `newton_scan` on these arguments; None if they can."""
  reason = no_hopper()
  if reason:
    return reason
  if parts > 1:
    return "time is split over devices, it goes through all of it on one"
  if cell.structure == "dense":
    return "it has a thread for each channel, the cell is dense: channels mix"
  if initial_state.dtype != jnp.float32:
    return f"it works in float32, the state is {initial_state.dtype}"
  shared = shards.refusal(B=initial_state.shape[0], D=initial_state.shape[-1])
  if shared:
    return shared
  try:
    _channel_cell(cell, params, x, initial_state)
  except newton_cell.Refusal as refusal:
    return str(refusal)
  return None


def run(cell, options, params, tokens, state):
  """All states [B T ...] and a `Report` of how well segments fit together, zero for one."""
  channel_cell = _channel_cell(cell, params, tokens.x, state)
  (B, *_, D), T = state.shape, jax.tree.leaves(tokens.x)[0].shape[1]
  rows = [leaf.reshape(-1, D if leaf.shape[-1:] == (D,) else 1) for leaf in jax.tree.leaves(params)]
  spread = [jnp.broadcast_to(row, (row.shape[0], D)) for row in rows]
  flat = jnp.concatenate([jnp.zeros((0, D), jnp.float32), *spread])
  xs = [leaf.reshape(B, T, -1, D) for leaf in jax.tree.leaves(tokens.x)]
  kinds = None
  if tokens.real is not None:
    kinds = jnp.where(tokens.real, tokens.start * START, PADDING).astype(jnp.int32)
  flat = jnp.broadcast_to(flat, (B, *flat.shape))
  shapes = "B P D", "B M D", "B T", "B T X D"
  h, misfit, count = shards.on_shards(
    functools.partial(scan, channel_cell), shapes, ("B T M D", "B D", "B D"),
    (flat, state.reshape(B, -1, D), kinds, xs), B=B, D=D,
  )  # fmt: skip
  report = Report(jnp.max(misfit), jnp.max(count), jnp.zeros((), bool))
  return h.reshape(B, T, *state.shape[1:]), jax.lax.stop_gradient(report)


def _channel_cell(cell, params, x, state):
  one = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype)
  first = jax.ShapeDtypeStruct((1, *state.shape[1:]), state.dtype)
  return newton_cell.trace(cell.step, params, first, jax.tree.map(one, x))


def scan(cell, params, state, kinds, xs, segments=None, interpret=None):
  """All states [B T M D] of a `ChannelCell`, with gradients; of segments that are solved together,
  by how much they do not fit [B D], and how often they ran [B D].

  Args:
    params: float32 [B P D], those of one channel along P.
    state: float32 [B M D].
    kinds: int32 [B T], 0 but where a token is the `START` of a document or `PADDING`; None is 0.
    xs: a list of float32 [B T X D].
    segments: of the sequence; None chooses.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  D = state.shape[-1]
  whole = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -D % CHANNELS)])
  if D % CHANNELS:
    params, state, *xs = map(whole, (params, state, *xs))
  h, misfit, count = _scan(cell, segments, interpret, params, state, kinds, *xs)
  return h[..., :D], misfit[..., :D], count[..., :D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(*arguments):
  return _scan_forward(*arguments)[0]


def _scan_forward(cell, segments, interpret, params, state, kinds, *xs):
  from ops.kernels.gpu import newton_loop, newton_segments

  def run(params, state, kinds, *xs):
    (B, T), D = xs[0].shape[:2], xs[0].shape[3]
    S = segments or newton_segments.choose_segments(B, T, D)
    if S > 1:
      return newton_segments.states(cell, params, state, kinds, xs, S, interpret)
    h = newton_loop.loop(cell, params, state, newton_loop.padded(kinds), xs, interpret=interpret)
    return h, jnp.zeros((B, D)), jnp.zeros((B, D), jnp.int32), None, None

  *results, starts, maps = folding_mapped_axes(run)(params, state, kinds, *xs)
  return tuple(results), ((params, state, kinds, *xs), results[0], starts, maps)


def _scan_backward(cell, segments, interpret, residuals, cotangents):
  from ops.kernels.gpu import newton_loop, newton_segments

  def run(params, state, kinds, h, g, starts, maps, *xs):
    if starts is None:
      kinds, later = newton_loop.padded(kinds), jnp.zeros_like(state)
      dstate, dparams, dxs = newton_loop.loop_gradients(
        cell, params, state, kinds, xs, h, g, later, interpret=interpret
      )
    else:
      dstate, dparams, dxs = newton_segments.gradients(
        cell, params, kinds, xs, h, g, starts, maps, interpret
      )
    return dparams, dstate, *dxs

  (params, state, kinds, *xs), h, starts, maps = residuals
  call = folding_mapped_axes(run)
  dparams, dstate, *dxs = call(params, state, kinds, h, cotangents[0], starts, maps, *xs)
  return dparams, dstate, None, *dxs


_scan.defvjp(_scan_forward, _scan_backward)
