"""`newton_scan` on Hopper GPUs: one token after the other, in one kernel, which no launch delays.

The kernels are in `newton_loop.py`, imported when they run: older versions of jax lack what they
use. Cells are the user's own, as long as their channels never mix: `newton_cell.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import newton_cell
from ops.kernels.gpu.decode_step import no_hopper
from ops.kernels.gpu.scalar_decay import folding_mapped_axes
from ops.newton_solve import Report


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
  try:
    _channel_cell(cell, params, x, initial_state)
  except newton_cell.Refusal as refusal:
    return str(refusal)
  return None


def run(cell, options, params, tokens, state):
  """All states [B T ...] and a `Report`, which has nothing to say: there is nothing to solve."""
  channel_cell = _channel_cell(cell, params, tokens.x, state)
  (B, *_, D), T = state.shape, jax.tree.leaves(tokens.x)[0].shape[1]
  by_channel = [
    jnp.broadcast_to(leaf.reshape(-1, D if leaf.shape[-1:] == (D,) else 1), (size, D))
    for leaf, size in _sizes(params, D)
  ]
  flat = jnp.concatenate([jnp.zeros((0, D), jnp.float32), *by_channel])
  xs = [leaf.reshape(B, T, -1, D) for leaf in jax.tree.leaves(tokens.x)]
  kinds = None if tokens.real is None else _kinds(tokens)
  flat = jnp.broadcast_to(flat, (B, *flat.shape))
  h = scan(channel_cell, flat, state.reshape(B, -1, D), kinds, xs)
  zero = lambda dtype: jnp.zeros((), dtype)
  return h.reshape(B, T, *state.shape[1:]), Report(*map(zero, (jnp.float32, jnp.int32, bool)))


def _channel_cell(cell, params, x, state):
  one = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype)
  first = jax.ShapeDtypeStruct((1, *state.shape[1:]), state.dtype)
  return newton_cell.trace(cell.step, params, first, jax.tree.map(one, x))


def _sizes(params, D):
  """The arrays in `params`, and how many numbers of a channel each has."""
  for leaf in jax.tree.leaves(params):
    yield leaf, math.prod(leaf.shape[:-1] if leaf.shape[-1:] == (D,) else leaf.shape)


def _kinds(tokens):
  """int32 [B T + some] for `newton_loop`."""
  from ops.kernels.gpu import newton_loop

  kinds = jnp.where(tokens.real, newton_loop.START * tokens.start, newton_loop.PADDING)
  T = kinds.shape[1]
  return jnp.pad(kinds.astype(jnp.int32), ((0, 0), (0, -T % 4 + newton_loop.KINDS)))


def scan(cell, params, state, kinds, xs, interpret=None):
  """All states [B T M D] of a `ChannelCell`, with gradients.

  Args:
    params: float32 [B P D], those of one channel along P.
    state: float32 [B M D].
    kinds: of tokens, as in `newton_loop.loop`; None is one document without padding.
    xs: a list of float32 [B T X D].
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  from ops.kernels.gpu.newton_loop import CHANNELS

  D = state.shape[-1]
  whole = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -D % CHANNELS)])
  if D % CHANNELS:
    params, state, *xs = map(whole, (params, state, *xs))
  return _scan(cell, interpret, params, state, kinds, *xs)[..., :D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(cell, interpret, params, state, kinds, *xs):
  from ops.kernels.gpu import newton_loop

  def run(params, state, kinds, *xs):
    return newton_loop.loop(cell, params, state, kinds, xs, interpret=interpret)

  return folding_mapped_axes(run)(params, state, kinds, *xs)


def _scan_forward(cell, interpret, *arrays):
  h = _scan(cell, interpret, *arrays)
  return h, (arrays, h)


def _scan_backward(cell, interpret, residuals, g):
  from ops.kernels.gpu import newton_loop

  def run(params, state, kinds, h, g, *xs):
    gradients = newton_loop.loop_gradients(
      cell, params, state, kinds, xs, h, g, interpret=interpret
    )
    return *gradients[:2], *gradients[2]

  (params, state, kinds, *xs), h = residuals
  dparams, dstate, *dxs = folding_mapped_axes(run)(params, state, kinds, h, g, *xs)
  return dparams, dstate, None, *dxs


_scan.defvjp(_scan_forward, _scan_backward)
