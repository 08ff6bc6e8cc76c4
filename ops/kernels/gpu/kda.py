"""`linear_attention` with the delta rule and a decay per row of the state, on Hopper GPUs (KDA).

All that knows the gates is done beforehand, for every chunk at once (`kda_operands.py`); the scan
over chunks has plain products (`kda_forward.py`). The gradients follow the same plan: a scan from
the right (`kda_backward.py`), then every chunk at once (`kda_gradients.py`).
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import delta_rule, scalar_decay
from ops.kernels.gpu.vector_decay import documents_by_chunk
from ops.segments import where_mask

CHUNK = scalar_decay.CHUNK
TERMS = 2  # bfloat16 numbers for one of the inverse: see `delta_rule.py`


def supports(*, q, v, log_decay, beta, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if beta is None or log_decay is None or log_decay.ndim != 4:
    return "it has the delta rule with one decay per row of the state only"
  return delta_rule.supports(q=q, v=v, log_decay=None, beta=beta, **arguments)


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""
  heads = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
  q, k, v = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k, heads(tokens.v)))
  g, beta = (heads(x).astype(jnp.float32) for x in (tokens.log_decay, tokens.beta))
  flat = state.astype(jnp.float32).reshape(v.shape[0], v.shape[2], *state.shape[3:])
  document = None if tokens.segments is None else tokens.segments.document
  o, flat = attend(q, k, v, g, beta, flat, document, scale)
  return o.reshape(tokens.v.shape), flat.reshape(state.shape)


def attend(q, k, v, log_decay, beta, state, document, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T Hq K], [B T H V]; H is a multiple of Hq.
    log_decay: float32 [B T H K], finite.
    beta: float32 [B T H].
    state: float32 [B H K V].
    document: int32 [B T], the number of documents that have started, from 0; None is one.
    scale: multiplies q.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  T = q.shape[1]
  pad = -T % CHUNK
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
  arrays = q, k, v, log_decay, beta, state, document
  o, state, *saved = scalar_decay.folding_mapped_axes(call)(*arrays)
  return (o, state), (q, k, log_decay, beta, document, *saved)


def _attend_backward(scale, interpret, residuals, cotangents):
  call = functools.partial(backward, scale=scale, interpret=interpret)
  return *scalar_decay.folding_mapped_axes(call)(*residuals, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(q, k, v, log_decay, beta, state, document, *, scale, save=False, interpret=None):
  """Outputs, the final state, and with `save` what `backward` takes."""
  from ops.kernels.gpu import kda_forward, kda_operands

  steps = away_from_zero(beta).transpose(0, 2, 1)
  documents = documents_by_chunk(document)
  operands = kda_operands.operands(q, k, log_decay, steps, documents, scale, TERMS, interpret)
  before = jnp.swapaxes(state, 2, 3)
  o, state, *saved = kda_forward.outputs(*operands, v, before, save, interpret)
  return o, jnp.swapaxes(state, 2, 3), *([*operands, *saved] if save else [])


def backward(q, k, log_decay, beta, document, *saved, scale, interpret=None):
  """Gradients of q, k, v, log_decay, beta and the state, from what `forward` saved."""
  from ops.kernels.gpu import kda_backward, kda_gradients

  *operands, before, written, do, dstate = saved
  dv, dstate, after = kda_backward.state_gradients(
    *operands, do, jnp.swapaxes(dstate, 2, 3), interpret
  )
  carry = operands[3]
  dq, dk, dg, product = kda_gradients.gradients(
    q,
    k,
    log_decay,
    do,
    dv,
    written,
    carry,
    before,
    after,
    documents_by_chunk(document),
    scale,
    interpret,
  )
  if document is not None:
    # There is no state to decay where a document starts.
    dg = where_mask(document == scalar_decay.document_before(document, 1), dg)
  if k.shape[2] != do.shape[2]:
    group = lambda x: x.reshape(*k.shape[:3], -1, k.shape[3]).astype(jnp.float32).sum(3)
    dq, dk = group(dq).astype(q.dtype), group(dk).astype(k.dtype)
  dbeta = -product.transpose(0, 2, 1) / away_from_zero(beta) ** 2
  return dq, dk, dv, dg, dbeta, jnp.swapaxes(dstate, 2, 3)


def away_from_zero(beta):
  """`beta`, by which the gradients are divided: instead of 0 it writes 1e-12 of a value."""
  return jnp.where(jnp.abs(beta) < 1e-12, 1e-12, beta)
