"""`linear_attention` in chunks: scores inside a chunk, a state from chunk to chunk.

With b the sum of gates from the chunk's start, to its end e, and S the state before the chunk:

  A_ij  = q_i . k_j exp(sum of gates between)                     i >= j     `decayed_scores.py`
  V'    = V, or with the delta rule (I + diag(beta) P)^-1 diag(beta) (V - (K exp(b)) S),
          P_ij = k_i . k_j exp(sum of gates between)              i > j      `triangular.py`
  O     = (Q exp(b)) S + A V'
  S'    = exp(b_C) S + (K exp(e))^T V'

Several chunks make a segment. All that does not depend on the state is done for a segment at once;
for gradients, the states between segments are kept and the rest is computed again. Time and memory
are linear in T.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.decayed_scores import pair_decays, scalar_scores, sum_gates, vector_scores
from ops.segments import where_mask
from ops.triangular import solve, unit_lower_inverse

DEFAULT_CHUNK = 64  # tokens
# Tokens whose chunks are computed together: what a CPU's caches hold; elsewhere, few launches.
SEGMENT_ON_CPU, SEGMENT = 256, 4096


def chunked(tokens, state, chunk_size, precision):
  """Outputs [B T H M V] and the final state [B H M K V]."""
  T = tokens.v.shape[1]
  size = min(chunk_size or DEFAULT_CHUNK, _power_of_two(T))
  chunks = -(-T // size)
  together = SEGMENT_ON_CPU if dispatch.platform() == "cpu" else SEGMENT
  segments = -(-chunks // max(1, together // size))
  per_segment = -(-chunks // segments)
  arrays = _split(tokens, size, segments * per_segment)
  arrays = jax.tree.map(lambda x: x.reshape(segments, per_segment, *x.shape[1:]), arrays)
  step = jax.checkpoint(functools.partial(_segment, precision, True), prevent_cse=False)
  state, o = jax.lax.scan(step, state, arrays)
  return _join(o.reshape(-1, *o.shape[2:]), size, T), state


def parallel(tokens, state, precision):
  """The quadratic form: the whole sequence is one chunk."""
  T = tokens.v.shape[1]
  state, o = _segment(precision, False, state, _split(tokens, T, 1))
  return _join(o, T, T), state


def _power_of_two(n):
  return 1 << (n - 1).bit_length()


def _split(tokens, size, chunks):
  """A dict of [chunks B H ... C ...]: the chunk's positions last but one, or last for scalars.

  Each chunk is padded to a power of two with tokens that leave the state as it is.
  """
  pad = chunks * size - tokens.v.shape[1]
  more = _power_of_two(size) - size

  def split(x, mode):
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    x = jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)
    return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3), mode=mode)

  heads_first = lambda x, heads: (
    None if x is None else jnp.moveaxis(split(x, "constant"), 2, 2 + heads)
  )
  g = tokens.log_decay
  if g is None:
    g = jnp.zeros(tokens.v.shape[:4], tokens.v.dtype)
  arrays = {
    "q": heads_first(tokens.q, 1),
    "k": heads_first(tokens.k, 1),
    "v": heads_first(tokens.v, 2),
    "g": heads_first(g if g.ndim == 5 else g[..., None], 2),
    "beta": heads_first(tokens.beta, 2),
  }
  if tokens.segments is not None:
    document = split(tokens.segments.document, "edge")
    before = jnp.concatenate([jnp.zeros_like(document[:1, :, -1]), document[:-1, :, -1]])
    arrays |= {"document": document, "before": before}
  return arrays


def _join(o, size, T):
  """[chunks B H M C V] -> [B T H M V]."""
  o = jnp.moveaxis(o[..., :size, :], (0, 4), (1, 2))
  return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :T]


def _segment(precision, invert, state, arrays):
  """The state after some chunks [n B H ...], and their outputs [n B H M C V].

  With `invert`, the delta rule's systems are inverted beforehand, all at once, which makes the loop
  over chunks short; one large system is solved as it stands.
  """
  contract = functools.partial(jnp.einsum, precision=precision)
  q, k, v, beta = (arrays[name] for name in ("q", "k", "v", "beta"))
  C = v.shape[-2]
  sums = sum_gates(arrays["g"])
  causal = np.tril(np.ones((C, C), bool))
  alive = at_end = carried = None  # which positions, and states, belong to one document
  if "document" in arrays:
    document, before = arrays["document"][:, :, None, None], arrays["before"]
    causal = causal & (document[..., :, None] == document[..., None, :])
    alive = (document == before[..., None, None, None])[..., None]
    at_end = (document == document[..., -1:])[..., None]
    carried = arrays["document"][:, :, -1] == before
  if sums.from_start.shape[-1] == 1:
    decays = jnp.where(causal, pair_decays(sums), 0)
    scores = lambda x: scalar_scores(x, k, decays, precision)
  else:
    scores = lambda x: jnp.where(causal, vector_scores(x, k, sums, precision), 0)
  read = functools.partial(_read, contract)
  from_start, to_end = jnp.exp(sums.from_start), jnp.exp(sums.to_end)
  across = from_start[..., -1, :, None]
  masked = lambda mask, x: x if mask is None else jnp.where(mask, x, 0)

  def advance(S, across, carried, write):
    kept = S if carried is None else where_mask(carried, S)
    return across * kept + write

  if beta is None:
    writes = _write(contract, k, to_end, masked(at_end, v))

    def step(S, chunk):
      return advance(S, *chunk), S

    state, before = jax.lax.scan(step, state, (across, carried, writes))
  else:
    A = beta[..., None] * jnp.where(~np.eye(C, dtype=bool), scores(k), 0)
    inverse = jax.lax.stop_gradient(unit_lower_inverse(A)) if invert else None

    def step(S, chunk):
      k, v, beta, A, inverse, from_start, to_end, across, carried, alive, at_end = chunk
      residual = beta[..., None] * (v - masked(alive, read(k, from_start, S)))
      v = solve(A, inverse, residual)
      write = _write(contract, k, to_end, masked(at_end, v))
      return advance(S, across, carried, write), (S, v)

    chunks = (k, v, beta, A, inverse, from_start, to_end, across, carried, alive, at_end)
    state, (before, v) = jax.lax.scan(step, state, chunks)
  o = masked(alive, read(q, from_start, before)) + _by_head(
    contract, "...ij,...jv->...iv", scores(q), v
  )
  return state, o


def _read(contract, x, decay, S):
  """(x decay)^T S for x [... H C K], decay [... H M C 1 or K], S [... H M K V]: [... H M C V]."""
  if decay.shape[-1] == 1:
    return decay * _to_heads(contract("...ik,...kv->...iv", x, _to_columns(S)), S.shape[-3])
  return _by_head(contract, "...ik,...kv->...iv", x[..., None, :, :] * decay, S)


def _write(contract, x, decay, v):
  """sum_C (x decay) v^T for v [... H M C V]: [... H M K V]."""
  if decay.shape[-1] == 1:
    return _to_heads(contract("...ik,...iv->...kv", x, _to_columns(decay * v)), v.shape[-3])
  return _by_head(contract, "...ik,...iv->...kv", x[..., None, :, :] * decay, v)


# On CPUs jaxlib 0.10.2 may crash in products of more than six axes: M is part of another one
# meanwhile.


def _to_columns(x):
  """[... M K V] -> [... K MV]: the heads that share a key are columns beside each other."""
  x = jnp.moveaxis(x, -3, -2)
  return x.reshape(*x.shape[:-2], -1)


def _to_heads(x, M):
  """[... K MV] -> [... M K V]."""
  return jnp.moveaxis(x.reshape(*x.shape[:-1], M, -1), -2, -3)


def _by_head(contract, equation, x, y):
  """A product for each of [... H M] heads."""
  merge = lambda x: x.reshape(*x.shape[:-4], -1, *x.shape[-2:])
  product = contract(equation, merge(x), merge(y))
  return product.reshape(*x.shape[:-2], *product.shape[-2:])
