"""`linear_attention` with one decay per head, or none, on Hopper GPUs: gates, tilings, gradients.

The kernels are in `scalar_decay_forward.py` and `scalar_decay_backward.py`. They are imported when
they run: older versions of jax lack what they use.

Gates enter as sums within a chunk of 64 tokens, and pairs as differences of such sums. A sum over a
very strong decay would leave few digits to the gates beside it, so that none counts for more than
63: what is left of a state then, 4e-28 of it, is nothing beside the next token, and sums stay below
4096, where differences are good to 5e-4, finer than the operands' own 4e-3. Where a document starts
there is nothing to decay: a gate of -128 there makes exactly 0 of all that lies before it.

Where B H is less than the GPU has multiprocessors, the sequence is cut in segments: a first kernel
finds what each adds to the state, all at once, and their states follow one from the other.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels.gpu import heuristics
from ops.segments import where_mask

CHUNK = 64  # tokens: the rows of one wgmma
WIDTHS = (64, 128)  # K and V for which there are tilings
FLOOR = -63.0
NOTHING = -128.0  # its exponential is 0 in float32


def supports(*, q, k, v, log_decay, beta, scale, chunk_size, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `linear_attention` on these arguments; None if they can."""
  reason = heuristics.no_hopper()
  if reason is not None:
    return reason
  if beta is not None:
    return "it has no delta rule"
  if log_decay is not None and log_decay.ndim == 4:
    return "it has one decay per head, log_decay has one per row of the state"
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
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""
  heads = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
  q, k, v = (x.astype(jnp.bfloat16) for x in (tokens.q, tokens.k, heads(tokens.v)))
  if tokens.log_decay is None:
    log_decay = jnp.zeros(v.shape[:3], jnp.float32)
  else:
    log_decay = heads(tokens.log_decay).astype(jnp.float32)
  document = None if tokens.segments is None else tokens.segments.document
  flat = state.astype(jnp.float32).reshape(v.shape[0], v.shape[2], *state.shape[3:])
  o, flat = attend(q, k, v, log_decay, flat, document, scale)
  return o.reshape(tokens.v.shape), flat.reshape(state.shape)


def attend(q, k, v, log_decay, state, document, scale, interpret=None):
  """o [B T H V] and the final state for any T, with gradients.

  Args:
    q, k, v: bfloat16 [B T Hq K], [B T H V]; H is a multiple of Hq.
    log_decay: float32 [B T H].
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


def folding_mapped_axes(function: Callable) -> Callable:
  """`function` of arrays [B ...]; under vmap the mapped axis becomes part of B."""
  folding = jax.custom_batching.custom_vmap(function)

  @folding.def_vmap
  def _(size, mapped, *arrays):
    def fold(x, is_mapped):
      x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    out = folding(*jax.tree.map(fold, arrays, tuple(mapped)))
    unfolded = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)
    return unfolded, jax.tree.map(lambda _: True, out)

  return folding


def sums_of_gates(log_decay, document):
  """[B H T]: `log_decay` [B T H] summed from the start of each chunk, the token's own included."""
  B, T, H = log_decay.shape
  gates = jnp.maximum(log_decay, FLOOR)
  if document is not None:
    gates = where_mask(document == document_before(document, 1), gates, NOTHING)
  sums = jnp.cumsum(gates.reshape(B, T // CHUNK, CHUNK, H), axis=2)
  return sums.reshape(B, T, H).transpose(0, 2, 1)


def document_before(document, tokens: int):
  """[B N]: the document of the token before each piece of so many tokens; 0 before the first."""
  return jnp.pad(document[:, :-1][:, tokens - 1 :: tokens], ((0, 0), (1, 0)))


def choose_tiling(heads: int, chunks: int, V: int):
  """For `heads` sequences, over all of the batch."""
  from ops.kernels.gpu.scalar_decay_forward import Tiling

  here = heuristics.here()
  segments = max(1, here.multiprocessors // heads)
  if V == 64 or (segments > 1 and chunks // segments < here.scalar_wide):
    # Narrow blocks, before segments so short that finding their states costs more than it gains.
    programs = heads * (V // 64)
    return Tiling(here.segments(programs, chunks, here.scalar_narrow), 3, 64)
  return Tiling(segments, 2 if segments > 1 else 3, 128)


def forward(
  q, k, v, log_decay, state, document=None, *, scale, tiling=None, save=False, interpret=None
):
  """Outputs, the final state, and with `save` the states before every chunk."""
  from ops.kernels.gpu import scalar_decay_forward as kernels

  (B, T, H), V = v.shape[:3], v.shape[3]
  gates = sums_of_gates(log_decay, document)
  tiling, per_segment = cut(tiling or choose_tiling(B * H, T // CHUNK, V), T // CHUNK)
  starts = [state]
  if tiling.segments > 1:
    before = tiling._replace(segments=tiling.segments - 1)
    added = kernels.boundary_states(k, v, gates, per_segment, before, interpret=interpret)
    decays = decays_of_segments(gates, per_segment)
    for i in range(tiling.segments - 1):
      starts.append(decays[:, :, i, None, None] * starts[-1] + added[:, :, i])
  starts = jnp.stack(starts, axis=2)
  return kernels.outputs(q, k, v, gates, starts, scale, per_segment, tiling, save, interpret)


def backward(
  q, k, v, log_decay, document, before, do, dstate, *, scale, tiling=None, interpret=None
):
  """Gradients of q, k, v, log_decay and the state, from the states before every chunk."""
  from ops.kernels.gpu import scalar_decay_backward as kernels
  from ops.kernels.gpu import scalar_decay_forward as scans

  (B, T, H), Hq, V = v.shape[:3], q.shape[2], v.shape[3]
  gates = sums_of_gates(log_decay, document)
  here = heuristics.here()
  segments = here.segments(B * H, T // CHUNK, here.scalar_backward)
  tiling, per_segment = cut(tiling or scans.Tiling(segments, 2, V), T // CHUNK)
  ends = [dstate]
  if tiling.segments > 1:
    after = tiling._replace(segments=tiling.segments - 1)
    added = scans.boundary_states(
      q, do, gates, per_segment, after, scale=scale, interpret=interpret
    )
    decays = decays_of_segments(gates, per_segment)
    for i in range(tiling.segments - 1, 0, -1):
      ends.append(decays[:, :, i, None, None] * ends[-1] + added[:, :, i - 1])
  ends = jnp.stack(ends[::-1], axis=2)
  dq, dk, dv, parts, dstate = kernels.gradients(
    q, k, v, do, gates, before, ends, scale, per_segment, interpret
  )
  if Hq != H:
    group = lambda x: x.reshape(B, T, Hq, H // Hq, -1).astype(jnp.float32).sum(3).astype(x.dtype)
    dq, dk = group(dq), group(dk)
  db, constant = jnp.moveaxis(parts.sum(2).reshape(B, H, 2, -1, CHUNK), 2, 0)
  dg = _sum_from_each_on(db, constant.sum(3, keepdims=True), document)
  dg = jnp.where(log_decay < FLOOR, 0, dg.reshape(B, H, T).transpose(0, 2, 1))
  if document is not None:
    dg = where_mask(document == document_before(document, 1), dg)
  return dq, dk, dv, dg, dstate


def cut(tiling, chunks: int):
  """`tiling` with as many segments as are not empty, and the chunks of each."""
  per_segment = -(-chunks // tiling.segments)
  return tiling._replace(segments=-(-chunks // per_segment)), per_segment


def decays_of_segments(gates, per_segment: int):
  """[B H S]: what is left of a state after each segment of so many chunks."""
  ends = gates[:, :, CHUNK - 1 :: CHUNK]
  ends = jnp.pad(ends, ((0, 0), (0, 0), (0, -ends.shape[2] % per_segment)))
  return jnp.exp(ends.reshape(*ends.shape[:2], -1, per_segment).sum(3))


def _sum_from_each_on(db, constant, document):
  """[B H N C]: sums of `db` to the end of the chunk, or the token's document, what comes then."""
  B, _, N, C = db.shape
  if document is None:
    return jnp.flip(jnp.cumsum(jnp.flip(db, 3), 3), 3) + constant
  document = document.reshape(B, 1, N, C)
  later = jnp.tril(document[:, 0, :, :, None] == document[:, 0, :, None, :])
  # No difference of sums: another document's numbers would leave their rounding behind.
  sums = jnp.einsum("bnij,bhni->bhnj", later.astype(db.dtype), db, precision="highest")
  return sums + jnp.where(document == document[..., -1:], constant, 0)
