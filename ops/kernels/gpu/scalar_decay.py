"""`linear_attention` with one decay per head, or none, on Hopper GPUs: gates, tilings, gradients.

The kernels are in `scalar_decay_forward.py` and `scalar_decay_backward.py`. They are imported when
they run: older versions of jax lack what they use.

Gates enter as sums within a chunk of 64 tokens, and pairs as differences of such sums. A sum over a
very strong decay would leave few digits to the gates beside it, so that none counts for more than
63: what is left of a state then, 4e-28 of it, is nothing beside the next token, and sums stay below
4096, where differences are good to 5e-4, finer than the operands' own 4e-3.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch

CHUNK = 64  # tokens: the rows of one wgmma
WIDTHS = (64, 128)  # K and V for which there are tilings
FLOOR = -63.0
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
MULTIPROCESSORS = 132


def supports(
  *, q, k, v, log_decay, beta, scale, segment_ids, chunk_size, **arguments
) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if dispatch.platform() != "gpu":
    return f"it is for Hopper GPUs, this is a {dispatch.platform()}"
  if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
    return f"it needs jax 0.11, this is {jax.__version__}"
  kind = (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind
  if not any(name in kind for name in HOPPER):
    return f"it is for Hopper GPUs, this is {kind}"
  if beta is not None:
    return "it has no delta rule"
  if log_decay is not None and log_decay.ndim == 4:
    return "it has one decay per head, log_decay has one per row of the state"
  if segment_ids is not None:
    return "it knows no segment_ids"
  if q.shape[2] != v.shape[2]:
    return f"it has no grouped heads, q has {q.shape[2]} and v {v.shape[2]}"
  if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
    return f"it takes bfloat16, q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
  if q.shape[3] not in WIDTHS or v.shape[3] not in WIDTHS:
    return f"K and V are {q.shape[3]} and {v.shape[3]}, it knows {WIDTHS}"
  if not isinstance(scale, (int, float, type(None))):
    return "scale is an array, it takes a number"
  if chunk_size not in (None, CHUNK):
    return f"chunk_size is {chunk_size}, it has chunks of {CHUNK}"
  return None


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T H 1 V] in bfloat16 and the final state [B H 1 K V]."""
  q, k = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k))
  v = tokens.v[:, :, :, 0].astype(jnp.bfloat16)
  if tokens.log_decay is None:
    log_decay = jnp.zeros(v.shape[:3], jnp.float32)
  else:
    log_decay = tokens.log_decay[..., 0].astype(jnp.float32)
  o, state = attend(q, k, v, log_decay, state[:, :, 0], scale)
  return o[:, :, :, None], state[:, :, None]


def attend(q, k, v, log_decay, state, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T H K], [B T H V].
    log_decay: float32 [B T H].
    state: float32 [B H K V].
    scale: multiplies q.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  T = q.shape[1]
  pad = -T % CHUNK
  # A token of zeros without decay leaves the state as it is.
  whole = lambda x: jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) if pad else x
  o, state = _attend(*map(whole, (q, k, v, log_decay)), state, scale, interpret)
  return o[:, :T], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, log_decay, state, scale, interpret):
  return forward(q, k, v, log_decay, state, scale, interpret=interpret)[:2]


def _attend_forward(q, k, v, log_decay, state, scale, interpret):
  o, state, before = forward(q, k, v, log_decay, state, scale, save_every=1, interpret=interpret)
  return (o, state), (q, k, v, log_decay, before)


def _attend_backward(scale, interpret, residuals, cotangents):
  return backward(*residuals, *cotangents, scale, interpret=interpret)


_attend.defvjp(_attend_forward, _attend_backward)


def gate_sums(log_decay):
  """float32 [B H T]: `log_decay` [B T H] summed from each chunk's start."""
  B, T, H = log_decay.shape
  g = jnp.maximum(log_decay, FLOOR).reshape(B, T // CHUNK, CHUNK, H)
  return jnp.cumsum(g, axis=2).reshape(B, T, H).transpose(0, 2, 1)


def forward(
  q, k, v, log_decay, state, scale, tiling=None, states_tiling=None, save_every=0, interpret=None
):
  """Outputs, the final state, and with `save_every` the states before every n-th chunk."""
  from ops.kernels.gpu import scalar_decay_forward as kernels

  (B, T, H), V = q.shape[:3], v.shape[3]
  chunks = T // CHUNK
  if tiling is None:
    wanted = max(1, MULTIPROCESSORS // (B * H))
    tiling = kernels.Tiling(min(wanted, -(-chunks // 8)), 3, V)
  per_segment = -(-chunks // tiling.segments)
  if save_every:
    per_segment = -(-per_segment // save_every) * save_every
  segments = -(-chunks // per_segment)
  tiling = tiling._replace(segments=segments)
  sums = gate_sums(log_decay)
  starts = [state]
  if segments > 1:
    tiling_before = (states_tiling or tiling)._replace(segments=segments - 1)
    (added,) = kernels.boundary_states(
      k, v, sums, None, per_segment, tiling_before, interpret=interpret
    )
    ends = sums[:, :, CHUNK - 1 :: CHUNK][:, :, : per_segment * (segments - 1)]
    decays = jnp.exp(jnp.sum(ends.reshape(B, H, segments - 1, per_segment), 3))[..., None, None]
    for i in range(segments - 1):
      starts.append(decays[:, :, i] * starts[-1] + added[:, :, i])
  starts = jnp.stack(starts, axis=2)
  return kernels.outputs(q, k, v, sums, starts, scale, per_segment, tiling, save_every, interpret)


def backward(q, k, v, log_decay, before, do, dstate, scale, tiling=None, interpret=None):
  """Gradients of q, k, v, log_decay and the state, from the states `before` each chunk."""
  from ops.kernels.gpu import scalar_decay_backward as kernels
  from ops.kernels.gpu import scalar_decay_forward as scans

  B, T, H, _ = q.shape
  sums = gate_sums(log_decay)
  tiling = tiling or scans.Tiling(1, 4, 64)
  dstates, after = scans.boundary_states(
    q, do, sums, dstate[:, :, None], T // CHUNK, tiling, scale=scale, save=True,
    interpret=interpret,
  )  # fmt: skip
  dq, dk, dv, gates = kernels.gradients(q, k, v, do, sums, before, after, scale, interpret)
  db, constant = jnp.moveaxis(gates.sum(2).reshape(B, H, 2, T // CHUNK, CHUNK), 2, 0)
  to_end = jnp.flip(jnp.cumsum(jnp.flip(db, 3), 3), 3)
  dg = (to_end + constant.sum(3, keepdims=True)).reshape(B, H, T).transpose(0, 2, 1)
  return dq, dk, dv, jnp.where(log_decay < FLOOR, 0, dg), dstates[:, :, 0]
