"""`linear_attention` over a tree of tokens: each continues the path from the root through its
ancestors. All of a draft is scored in one call, as speculative decoding needs.

What a chunk does with "j comes before i" is done with "j is an ancestor of i": the exponent between
them is the sum of the gates of the ancestors of i, i included, that j does not have, j included.
Wu et al., "STree: Speculative Tree Decoding for Hybrid State-Space Models", 2025
(arXiv:2505.14969), for scalar decays; the delta rule and vector decays follow in the same way.
"""

import jax
import jax.numpy as jnp

from ops.segments import where_mask
from ops.triangular import solve


def tree_attention(tokens, state, mask, accepted, emit_states, precision):
  """Outputs [B T H M V], the state after token `accepted` [B] and those after the last
  `emit_states` tokens [B m H M K V], or None."""
  contract = lambda equation, *arrays: jnp.einsum(equation, *arrays, precision=precision)
  B, T = tokens.v.shape[:2]
  mask = jnp.broadcast_to(mask, (B, T, T)) | jnp.eye(T, dtype=bool)
  reads_state = jnp.ones((B, T), bool)
  if tokens.segments is not None:
    document = tokens.segments.document
    mask &= document[:, :, None] == document[:, None, :]
    reads_state = document == 0
  heads_first = lambda x, axis: jnp.moveaxis(x, 1, axis)
  q, k = heads_first(tokens.q, 2), heads_first(tokens.k, 2)  # [B H T K]
  v = heads_first(tokens.v, 3)  # [B H M T V]
  g = tokens.log_decay
  if g is None:
    g = jnp.zeros(tokens.v.shape[:4], v.dtype)
  g = heads_first(g if g.ndim == 5 else g[..., None], 3)  # [B H M T 1 or K]

  passed = (mask[:, :, None, :] & ~mask[:, None, :, :]).astype(v.dtype)  # [B i j l]
  exact = jax.lax.Precision.HIGHEST
  between = jnp.exp(jnp.einsum("bijl,bhmlk->bhmijk", passed, g, precision=exact))
  between = jnp.where(mask[:, None, None, :, :, None], between, 0)
  from_root = jnp.einsum("bil,bhmlk->bhmik", mask.astype(v.dtype), g, precision=exact)
  from_root = where_mask(reads_state, jnp.moveaxis(jnp.exp(from_root), 3, 1))
  from_root = jnp.moveaxis(from_root, 1, 3)
  weigh = lambda x: jnp.broadcast_to(x, (*x.shape[:-1], k.shape[-1]))
  scores = lambda x: contract("bhik,bhjk,bhmijk->bhmij", x, k, weigh(between))
  read = lambda x: contract("bhik,bhmik,bhmkv->bhmiv", x, weigh(from_root), state)
  if tokens.beta is not None:
    beta = heads_first(tokens.beta, 3)[..., None]
    A = jnp.where(jnp.tril(jnp.ones((T, T), bool), -1), beta * scores(k), 0)
    v = solve(A, None, beta * (v - read(k)))
  o = read(q) + contract("bhmij,bhmjv->bhmiv", scores(q), v)

  def states_after(nodes):  # [B m]
    rows = jnp.take_along_axis(weigh(between), nodes[:, None, None, :, None, None], axis=3)
    kept = jnp.take_along_axis(weigh(from_root), nodes[:, None, None, :, None], axis=3)
    written = contract("bhmnjk,bhjk,bhmjv->bnhmkv", rows, k, v)
    return written + jnp.moveaxis(kept, 3, 1)[..., None] * state[:, None]

  final = states_after(jnp.broadcast_to(accepted, (B,))[:, None])[:, 0]
  states = None
  if emit_states:
    states = states_after(jnp.broadcast_to(jnp.arange(T - emit_states, T), (B, emit_states)))
  return jnp.moveaxis(o, 3, 1), final, states
