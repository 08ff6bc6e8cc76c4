"""`linear_attention` with the delta rule and one decay per head, or none, on Hopper GPUs.

The kernels are in `delta_rule_forward.py`; gates and their limits are those of `scalar_decay.py`.
Where a key comes again and again with beta = 2, each token reflects the state and nothing is
forgotten: rounding the inverse of a chunk's system to bfloat16 then costs .4 of the outputs' size.
It is kept as the sum of two such numbers.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import scalar_decay

CHUNK = 64  # tokens: the rows of one wgmma
FLOOR = -63.0


def supports(*, q, v, beta, segment_ids, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if beta is None:
    return "it has the delta rule only"
  if segment_ids is not None:
    return "it knows no segment_ids with the delta rule"
  if q.shape[2] != v.shape[2]:
    heads = f"q has {q.shape[2]} and v {v.shape[2]}"
    return f"it has no grouped heads with the delta rule, {heads}"
  return scalar_decay.supports(q=q, v=v, beta=None, segment_ids=None, **arguments)


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T H 1 V] in bfloat16 and the final state [B H 1 K V]."""
  q, k = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k))
  v = tokens.v[:, :, :, 0].astype(jnp.bfloat16)
  beta = tokens.beta[..., 0].astype(jnp.float32)
  log_decay = jnp.zeros_like(beta) if tokens.log_decay is None else tokens.log_decay[..., 0]
  o, state = attend(q, k, v, log_decay.astype(jnp.float32), beta, state[:, :, 0], scale)
  return o[:, :, :, None], state[:, :, None]


def attend(q, k, v, log_decay, beta, state, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T H K], [B T H V].
    log_decay, beta: float32 [B T H].
    state: float32 [B H K V].
    scale: multiplies q.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  T = q.shape[1]
  pad = -T % CHUNK
  # A token of zeros without decay leaves the state as it is.
  whole = lambda x: jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) if pad else x
  o, state = _attend(*map(whole, (q, k, v, log_decay, beta)), state, scale, interpret)
  return o[:, :T], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, log_decay, beta, state, scale, interpret):
  return forward(q, k, v, log_decay, beta, state, scale, interpret=interpret)


def _attend_forward(q, k, v, log_decay, beta, state, scale, interpret):
  o, state, *saved = forward(q, k, v, log_decay, beta, state, scale, save=True, interpret=interpret)
  return (o, state), (q, k, log_decay, beta, *saved)


def _attend_backward(scale, interpret, residuals, cotangents):
  return backward(*residuals, *cotangents, scale, interpret=interpret)


_attend.defvjp(_attend_forward, _attend_backward)


def gate_sums(log_decay):
  """float32 [B H T]: `log_decay` [B T H] summed from each chunk's start."""
  B, T, H = log_decay.shape
  g = jnp.maximum(log_decay, FLOOR).reshape(B, T // CHUNK, CHUNK, H)
  return jnp.cumsum(g, axis=2).reshape(B, T, H).transpose(0, 2, 1)


def forward(q, k, v, log_decay, beta, state, scale, stages=2, terms=2, save=False, interpret=None):
  """Outputs, the final state, and with `save` what `backward` takes."""
  from ops.kernels.gpu import delta_rule_forward, delta_rule_inverse

  sums = gate_sums(log_decay)
  steps = away_from_zero(beta).transpose(0, 2, 1)
  inverses = delta_rule_inverse.inverses(k, sums, steps, terms, interpret)
  before = jnp.swapaxes(state, 2, 3)
  o, state, *saved = delta_rule_forward.outputs(
    q, k, v, sums, inverses, before, scale, stages, save, interpret
  )
  return o, jnp.swapaxes(state, 2, 3), *([inverses, *saved] if save else [])


def away_from_zero(beta):
  """`beta`, by which the gradients are divided: what is lost of a value is 1e-6 of it."""
  return jnp.where(jnp.abs(beta) < 1e-6, 1e-6, beta)


def backward(
  q, k, log_decay, beta, inverses, before, written, do, dstate, scale, stages=2, interpret=None
):
  """Gradients of q, k, v, log_decay, beta and the state, from what `forward` saved."""
  from ops.kernels.gpu import delta_rule_backward as kernels

  B, T, H, _ = q.shape
  sums = gate_sums(log_decay)
  dv, dstate, after = kernels.state_gradients(
    q, k, do, sums, inverses, jnp.swapaxes(dstate, 2, 3), scale, stages, interpret
  )
  dq, dk, parts = kernels.gradients(q, k, do, dv, written, sums, before, after, scale, interpret)
  db, constant, product = jnp.moveaxis(parts.sum(2).reshape(B, H, 3, T // CHUNK, CHUNK), 2, 0)
  to_end = jnp.flip(jnp.cumsum(jnp.flip(db, 3), 3), 3)
  dg = (to_end + constant.sum(3, keepdims=True)).reshape(B, H, T).transpose(0, 2, 1)
  dbeta = product.reshape(B, H, T).transpose(0, 2, 1) / away_from_zero(beta) ** 2
  dstate = jnp.swapaxes(dstate, 2, 3)
  return dq, dk, dv, jnp.where(log_decay < FLOOR, 0, dg), dbeta, dstate
