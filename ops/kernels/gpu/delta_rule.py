"""`linear_attention` with the delta rule and one decay per head, or none, on Hopper GPUs.

Four kernels: every chunk's system is solved (`delta_rule_inverse.py`), the state goes from chunk to
chunk and makes the outputs (`delta_rule_forward.py`), its gradient comes back the same way
(`delta_rule_backward.py`), and every chunk has its gradients (`delta_rule_gradients.py`). Gates and
their limits are those of `scalar_decay.py`.

Where a key comes again and again with beta = 2, each token reflects the state and nothing is
forgotten: rounding the inverse of a chunk's system to bfloat16 then costs .4 of the outputs' size.
It is kept as the sum of two such numbers. What it multiplies, and what is written, is rounded once:
there the state is good to some hundredths of its size.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import scalar_decay
from ops.kernels.gpu.delta_rule_gates import chunk_gates
from ops.kernels.gpu.scalar_decay import CHUNK, FLOOR, folding_mapped_axes
from ops.segments import where_mask

WIDTHS = (64, 128)  # K and V that fit into shared memory
LONGEST = 65_535 * CHUNK  # tokens: CUDA counts no more programs along an axis


def supports(*, q, v, beta, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if beta is None:
    return "it has the delta rule only"
  reason = scalar_decay.supports(q=q, v=v, beta=None, **arguments)
  if reason is None and not {q.shape[3], v.shape[3]} <= set(WIDTHS):
    return f"K and V are {q.shape[3]} and {v.shape[3]}, it knows {WIDTHS} with the delta rule"
  if reason is None and q.shape[1] > LONGEST:
    return f"T is {q.shape[1]}, it takes up to {LONGEST} tokens with the delta rule"
  return reason


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
  pad = -T % (2 * CHUNK)  # the kernels take chunks by twos
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
  return (o, state), (q, k, log_decay, document, *saved)


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

  gates = chunk_gates(log_decay, beta, document)
  inverses = delta_rule_inverse.inverses(k, gates, terms, interpret)
  before = jnp.swapaxes(state, 2, 3)
  o, state, *saved = delta_rule_forward.outputs(
    q, k, v, gates, inverses, before, scale, stages, save, interpret
  )
  return o, jnp.swapaxes(state, 2, 3), *([gates, inverses, *saved] if save else [])


def backward(
  q, k, log_decay, document, gates, inverses, before, written, do, dstate, *, scale, stages=3,
  interpret=None,
):  # fmt: skip
  """Gradients of q, k, v, log_decay, beta and the state, from what `forward` saved."""
  from ops.kernels.gpu import delta_rule_backward, delta_rule_gradients

  (B, T, H), Hq = do.shape[:3], q.shape[2]
  dv, dstate, after = delta_rule_backward.state_gradients(
    q, k, do, gates, inverses, jnp.swapaxes(dstate, 2, 3), scale, stages, interpret
  )
  dq, dk, sums = delta_rule_gradients.gradients(
    q, k, do, dv, written, gates, before, after, scale, interpret
  )
  if Hq != H:
    group = lambda x: x.reshape(B, T, Hq, H // Hq, -1).astype(jnp.float32).sum(3).astype(x.dtype)
    dq, dk = group(dq), group(dk)
  dg, dbeta = jnp.moveaxis(sums, (2, 3), (0, 2))
  dg = jnp.where(log_decay < FLOOR, 0, dg)
  if document is not None:
    # There is no state to decay where a document starts.
    dg = where_mask(document == scalar_decay.document_before(document, 1), dg)
  return dq, dk, dv, dg, dbeta, jnp.swapaxes(dstate, 2, 3)
