"""`linear_attention` with a decay for each row of the state on Hopper GPUs: tilings, gradients.

The kernels are in `vector_decay_states.py`, `vector_decay_forward.py` and
`vector_decay_backward.py`. They are imported when they run: older versions of jax lack what they
use.

Where B H is less than the GPU has multiprocessors, the sequence is cut in segments: a first kernel
finds what each adds to the state, all at once, and their states follow one from the other.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import heuristics, scalar_decay
from ops.kernels.gpu.scalar_decay import CHUNK, document_before, folding_mapped_axes


def supports(*, q, log_decay, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  if log_decay is None or log_decay.ndim != 4:
    return "it has one decay per row of the state, log_decay has not"
  return scalar_decay.supports(q=q, log_decay=None, **arguments)


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""
  heads = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
  q, k, v = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k, heads(tokens.v)))
  document = None if tokens.segments is None else tokens.segments.document
  flat = state.astype(jnp.float32).reshape(v.shape[0], v.shape[2], *state.shape[3:])
  o, flat = attend(q, k, v, heads(tokens.log_decay), flat, document, scale)
  return o.reshape(tokens.v.shape), flat.reshape(state.shape)


def attend(q, k, v, log_decay, state, document, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T Hq K], [B T H V]; H is a multiple of Hq.
    log_decay: [B T H K], bfloat16 or float32.
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
    q, k, v, log_decay = map(whole, (q, k, v, log_decay))
    document = None if document is None else whole(document, mode="edge")
  o, state = _attend(q, k, v, log_decay, state, document, scale, interpret)
  return o[:, :T], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(*arguments):
  return _attend_forward(*arguments, save=False)[0]


def _attend_forward(q, k, v, log_decay, state, document, scale, interpret, save=True):
  call = functools.partial(forward, scale=scale, save=save, interpret=interpret)
  o, state, *before = folding_mapped_axes(call)(q, k, v, log_decay, state, document)
  return (o, state), (q, k, v, log_decay, document, *before)


def _attend_backward(scale, interpret, residuals, cotangents):
  call = functools.partial(backward, scale=scale, interpret=interpret)
  return *folding_mapped_axes(call)(*residuals, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


def choose_tiling(heads: int, chunks: int, K: int, V: int):
  """For `heads` sequences, over all of the batch."""
  from ops.kernels.gpu.scalar_decay_forward import Tiling

  block_v = 128 if K == V == 128 else 64
  return Tiling(segments_for(heads * (V // block_v), chunks), 2, block_v)


def segments_for(programs: int, chunks: int) -> int:
  """Into how many pieces to cut the sequence, so that so many programs each fill the GPU."""
  here = heuristics.here()
  return here.segments(programs, chunks, here.vector)


def documents_by_chunk(document):
  """`document` [B T] as float32, the starts counted from each chunk's start."""
  if document is None:
    return None
  B, T = document.shape
  before = document_before(document, CHUNK)[:, :, None]
  return (document.reshape(B, -1, CHUNK) - before).reshape(B, T).astype(jnp.float32)


def forward(
  q, k, v, log_decay, state, document=None, *, scale, tiling=None, save=False, interpret=None
):
  """Outputs, the final state, and with `save` the states before every chunk."""
  from ops.kernels.gpu import vector_decay_forward, vector_decay_states

  (B, T, H), K, V = v.shape[:3], q.shape[3], v.shape[3]
  chunks = T // CHUNK
  tiling = tiling or choose_tiling(B * H, chunks, K, V)
  per_segment = -(-chunks // tiling.segments)
  segments = -(-chunks // per_segment)
  tiling = tiling._replace(segments=segments)
  documents = documents_by_chunk(document)
  starts = [state]
  if segments > 1:
    added, decays = vector_decay_states.boundary_states(
      k, v, log_decay, documents, per_segment, tiling._replace(segments=segments - 1),
      interpret=interpret,
    )  # fmt: skip
    for i in range(segments - 1):
      starts.append(decays[:, :, i, :, None] * starts[-1] + added[:, :, i])
  starts = jnp.stack(starts, axis=2)
  return vector_decay_forward.outputs(
    q, k, v, log_decay, documents, starts, scale, per_segment, tiling, save, interpret
  )


def backward(
  q, k, v, log_decay, document, before, do, dstate, *, scale, tiling=None, interpret=None
):
  """Gradients of q, k, v, log_decay and the state, from the states before every chunk.

  `tiling` cuts the sequence and says how its parts' gradients of states are found.
  """
  from ops.kernels.gpu import vector_decay_backward, vector_decay_states

  (B, T, H), (Hq, K), V = v.shape[:3], q.shape[2:], v.shape[3]
  chunks = T // CHUNK
  tiling = tiling or choose_tiling(B * H, chunks, K, V)
  tiling = tiling._replace(segments=min(tiling.segments, segments_for(B * H, chunks)))
  per_segment = -(-chunks // tiling.segments)
  segments = -(-chunks // per_segment)
  documents = documents_by_chunk(document)
  ends = [dstate]
  if segments > 1:
    added, decays = vector_decay_states.boundary_states(
      q, do, log_decay, documents, per_segment, tiling._replace(segments=segments - 1),
      scale=scale, skipped=1, interpret=interpret,
    )  # fmt: skip
    for i in reversed(range(segments - 1)):
      ends.append(decays[:, :, i, :, None] * ends[-1] + added[:, :, i])
  ends = jnp.stack(ends[::-1], axis=2)
  dq, dk, dv, dg, dstate = vector_decay_backward.gradients(
    q, k, v, do, log_decay, documents, before, ends, scale, per_segment, interpret=interpret
  )
  if Hq != H:
    group = lambda x: x.reshape(B, T, Hq, H // Hq, K).astype(jnp.float32).sum(3).astype(x.dtype)
    dq, dk = group(dq), group(dk)
  return dq, dk, dv, dg, dstate
