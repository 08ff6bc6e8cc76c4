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
from ops.kernels.gpu.delta_rule_gates import EVERY, chunk_gates
from ops.kernels.gpu.scalar_decay import CHUNK, FLOOR, folding_mapped_axes
from ops.segments import where_mask


def supports(*, beta, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if beta is None:
    return "it has the delta rule only"
  return scalar_decay.supports(beta=None, **arguments)


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""
  heads = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
  q, k, v = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k, heads(tokens.v)))
  beta = heads(tokens.beta).astype(jnp.float32)
  if tokens.log_decay is None:
    log_decay = jnp.zeros_like(beta)
  else:
    log_decay = heads(tokens.log_decay).astype(jnp.float32)
  document = None if tokens.segments is None else tokens.segments.document
  flat = state.astype(jnp.float32).reshape(v.shape[0], v.shape[2], *state.shape[3:])
  o, flat = attend(q, k, v, log_decay, beta, flat, document, scale)
  return o.reshape(tokens.v.shape), flat.reshape(state.shape)


def attend(q, k, v, log_decay, beta, state, document, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T Hq K], [B T H V]; H is a multiple of Hq.
    log_decay, beta: float32 [B T H].
    state: float32 [B H K V].
    document: int32 [B T], the number of documents that have started, from 0; None is one.
    scale: multiplies q.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  T = q.shape[1]
  pad = -T % (CHUNK * EVERY)
  if pad:
    whole = lambda x, **mode: jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), **mode)
    # A token of zeros without decay leaves the state as it is.
    q, k, v, log_decay, beta = map(whole, (q, k, v, log_decay, beta))
    document = None if document is None else whole(document, mode="edge")
  o, state = _attend(q, k, v, log_decay, beta, state, document, scale, interpret)
  return o[:, :T], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(*arguments):
  return _attend_forward(*arguments, save=False)[0]


def _attend_forward(q, k, v, log_decay, beta, state, document, scale, interpret, save=True):
  call = functools.partial(forward, scale=scale, save=save, interpret=interpret)
  o, state, *saved = folding_mapped_axes(call)(q, k, v, log_decay, beta, state, document)
  return (o, state), (q, k, log_decay, beta, document, *saved)


def _attend_backward(scale, interpret, residuals, cotangents):
  call = functools.partial(backward, scale=scale, interpret=interpret)
  return *folding_mapped_axes(call)(*residuals, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
  q, k, v, log_decay, beta, state, document=None, *, scale, stages=3, terms=2, save=False,
  interpret=None,
):  # fmt: skip
  """Outputs, the final state, and with `save` what `backward` takes."""
  from ops.kernels.gpu import delta_rule_forward, delta_rule_inverse

  gates = chunk_gates(log_decay, document)
  steps = away_from_zero(beta).transpose(0, 2, 1)
  inverses = delta_rule_inverse.inverses(k, gates, steps, terms, interpret)
  before = jnp.swapaxes(state, 2, 3)
  o, state, *saved = delta_rule_forward.outputs(
    q, k, v, gates, inverses, before, scale, stages, save, interpret
  )
  return o, jnp.swapaxes(state, 2, 3), *([inverses, *saved] if save else [])


def away_from_zero(beta):
  """`beta`, by which the gradients are divided: what is lost of a value is 1e-6 of it."""
  return jnp.where(jnp.abs(beta) < 1e-6, 1e-6, beta)


def backward(
  q, k, log_decay, beta, document, inverses, before, written, do, dstate, *, scale, stages=2,
  interpret=None,
):  # fmt: skip
  """Gradients of q, k, v, log_decay, beta and the state, from what `forward` saved."""
  from ops.kernels.gpu import delta_rule_backward, delta_rule_gradients

  (B, T, H), Hq = do.shape[:3], q.shape[2]
  gates = chunk_gates(log_decay, document)
  dv, dstate, after = delta_rule_backward.state_gradients(
    q, k, do, gates, inverses, jnp.swapaxes(dstate, 2, 3), scale, stages, interpret
  )
  dq, dk, parts = delta_rule_gradients.gradients(
    q, k, do, dv, written, gates, before, after, scale, interpret
  )
  if Hq != H:
    group = lambda x: x.reshape(B, T, Hq, H // Hq, -1).astype(jnp.float32).sum(3).astype(x.dtype)
    dq, dk = group(dq), group(dk)
  db, constant, product = jnp.moveaxis(parts.sum(2).reshape(B, H, 3, T // CHUNK, CHUNK), 2, 0)
  dg = scalar_decay._sum_from_each_on(db, constant.sum(3, keepdims=True), document)
  dg = jnp.where(log_decay < FLOOR, 0, dg.reshape(B, H, T).transpose(0, 2, 1))
  if document is not None:
    # There is no state to decay where a document starts.
    dg = where_mask(document == scalar_decay.document_before(document, 1), dg)
  dbeta = product.reshape(B, H, T).transpose(0, 2, 1) / away_from_zero(beta) ** 2
  return dq, dk, dv, dg, dbeta, jnp.swapaxes(dstate, 2, 3)
