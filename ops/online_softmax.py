"""Softmax attention over blocks of keys, one after the other, without the scores of all pairs.

    o_t = sum_j exp(s_tj) v_j / sum_j exp(s_tj),      s_tj = q_t . k_j / sqrt(K)

Both sums are kept relative to the largest score so far, and shrink when a larger one comes. The
gradient needs no more than log sum_j exp(s_tj) of each query to make the weights of a block again.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867); Rabe
and Staats, "Self-attention does not need O(n^2) memory", 2021 (arXiv:2112.05682).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

SCORES = 2**24  # of one head and row that exist at a time, unless a block is very short
LOWEST = -1e30  # what the largest score so far starts from


class Places(NamedTuple):
  """Where tokens are: integers [B T], or [1 T] where they are the same in every row."""

  position: Array  # counts the real tokens of a row
  document: Array  # its number; padding has a negative one, which is another for queries and keys


class Keys(NamedTuple):
  """A block of keys and values."""

  kv: Array  # [B S Hq K+V]: each key followed by its value
  at: Places


class Sums(NamedTuple):
  """What queries have gathered, float32 or float64; M = H / Hq queries share a key."""

  largest: Array  # [B Hq M T], of their scores
  weight: Array  # [B Hq M T], the sum of exp(score - largest)
  values: Array  # [B Hq M T V], the sum of exp(score - largest) v


def seen(queries: Places, keys: Places, window: int | None) -> Array:
  """Which pairs meet, bool [B T S]: causal, within the window and within a document."""
  distance = queries.position[:, :, None] - keys.position[:, None, :]
  meet = (distance >= 0) & (queries.document[:, :, None] == keys.document[:, None, :])
  return meet if window is None else meet & (distance < window)


def start(q: Array, kv: Array) -> Sums:
  """The sums of queries [B T H K] before any key."""
  (B, T, H, K), Hq = q.shape, kv.shape[2]
  wide, shape = jnp.promote_types(q.dtype, jnp.float32), (B, Hq, H // Hq, T)
  values = jnp.zeros((*shape, kv.shape[3] - K), wide)
  return Sums(jnp.full(shape, LOWEST, wide), jnp.zeros(shape, wide), values)


def add(sums: Sums, q: Array, at: Places, keys: Keys, window: int | None) -> Sums:
  """The sums with a block of keys more; what no query sees costs nothing."""

  def step(sums, keys):
    meet = seen(at, keys.at, window)

    def more():
      k, v = _split(q, keys.kv)
      scores = jnp.where(meet[:, None, None], _scores(q, k), LOWEST)
      largest = jnp.maximum(sums.largest, jax.lax.stop_gradient(scores.max(axis=-1)))
      weights = jnp.where(meet[:, None, None], jnp.exp(scores - largest[..., None]), 0)
      shrink = jnp.exp(sums.largest - largest)
      values = _product("bgmts,bsgv->bgmtv", weights.astype(v.dtype), v)
      return Sums(
        largest,
        sums.weight * shrink + weights.sum(axis=-1),
        sums.values * shrink[..., None] + values,
      )

    return jax.lax.cond(meet.any(), more, lambda: sums), None

  return jax.lax.scan(step, sums, _blocks(keys, q.shape[1]))[0]


def finish(sums: Sums) -> tuple[Array, Array]:
  """The outputs [B T H V], zero where a query has seen no key, and log sum_j exp(s_tj), [B Hq M T],
  float32 or float64."""
  weight = jnp.where(sums.weight > 0, sums.weight, 1)
  o = jnp.moveaxis(sums.values / weight[..., None], 3, 1)
  return o.reshape(*o.shape[:2], -1, o.shape[-1]), sums.largest + jnp.log(weight)


class Pull(NamedTuple):
  """What every block's gradient needs."""

  q: Array
  at: Places
  log_total: Array  # second result of `finish`
  do: Array  # [B T H V]
  inner: Array  # do . o, [B Hq M T]


def pull(q: Array, at: Places, o: Array, log_total: Array, do: Array) -> Pull:
  """From the results of `finish` and the cotangent of the outputs."""
  wide = log_total.dtype
  inner = jnp.sum(do.astype(wide) * o.astype(wide), axis=-1)
  inner = jnp.moveaxis(inner, 1, 2).reshape(log_total.shape)
  return Pull(q, at, log_total, do.astype(q.dtype), inner)


def gradients(given: Pull, dq: Array, keys: Keys, window: int | None) -> tuple[Array, Array]:
  """`dq` [B T H K] with what a block adds to it, and the block's own d(kv), of dq's dtype."""
  q, at, log_total, do, inner = given
  do = do.reshape(*do.shape[:2], *log_total.shape[1:3], -1)
  queries = q.reshape(*do.shape[:4], -1)

  def step(dq, keys):
    meet = seen(at, keys.at, window)

    def more():
      k, v = _split(q, keys.kv)
      mask = meet[:, None, None]
      weights = jnp.where(mask, jnp.exp(_scores(q, k) - log_total[..., None]), 0)
      d_weights = _product("btgmv,bsgv->bgmts", do, v)
      d_scores = jnp.where(mask, weights * (d_weights - inner[..., None]), 0) * q.shape[-1] ** -0.5
      weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)
      d_keys = _product("bgmts,btgmk->bsgk", d_scores, queries)
      d_values = _product("bgmts,btgmv->bsgv", weights, do)
      d_queries = _product("bgmts,bsgk->btgmk", d_scores, k).reshape(q.shape)
      return dq + d_queries, jnp.concatenate([d_keys, d_values], axis=-1)

    return jax.lax.cond(meet.any(), more, lambda: (dq, jnp.zeros(keys.kv.shape, dq.dtype)))

  dq, d_blocks = jax.lax.scan(step, dq, _blocks(keys, q.shape[1]))
  return dq, jnp.moveaxis(d_blocks, 0, 1).reshape(keys.kv.shape)


def _split(q, kv):
  return kv[..., : q.shape[-1]], kv[..., q.shape[-1] :]


def _product(letters, x, y):
  return jnp.einsum(letters, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _scores(q, k):
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  return _product("btgmk,bsgk->bgmts", q, k) * q.shape[-1] ** -0.5


def _blocks(keys: Keys, T: int) -> Keys:
  """Cut along S, [n ...], so that T queries have few scores at a time."""
  S = keys.kv.shape[1]
  limit = min(S, max(128, SCORES // T))
  size = next(size for size in range(limit, 0, -1) if S % size == 0)
  size = S if size < limit // 4 else size  # no good divisor
  cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
  return jax.tree.map(cut, keys)
