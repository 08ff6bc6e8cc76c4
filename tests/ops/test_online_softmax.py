"""Attention over blocks of keys against the softmax of all of them, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import online_softmax
from ops.online_softmax import Keys, Places

B, T, S, H, HQ, K, V = 2, 5, 384, 4, 2, 3, 6


def case(dtype=float):
  """Queries amid 384 keys of two documents, one query that sees nothing, scores of many sizes."""
  draw = np.random.default_rng(0).normal
  q = draw(size=(B, T, H, K)) * np.array([1, 30, 3, 0, 100])[:, None, None]
  kv = draw(size=(B, S, HQ, K + V))
  document = np.where(np.arange(S) < 100, 0, 1)
  position = np.array([[90, 383, 99, 100, 250]] * B)
  queries = Places(jnp.asarray(position), jnp.asarray([[0, 1, -2, 1, 1]] * B))
  keys = Places(jnp.arange(S)[None], jnp.asarray(document)[None])
  return jnp.asarray(q, dtype), jnp.asarray(kv, dtype), queries, keys


def direct(q, kv, seen):
  """The softmax of all scores at once; autodiff makes its gradients."""
  k, v = (jnp.repeat(x, H // HQ, axis=2) for x in (kv[..., :K], kv[..., K:]))
  scores = jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5
  weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None])
  return jnp.einsum("bhts,bshv->bthv", jnp.where(seen[:, None], weights, 0), v)


def blockwise(q, kv, queries, keys, window, do):
  block = Keys(kv, keys)
  sums = online_softmax.add(online_softmax.start(q, kv), q, queries, block, window)
  o, log_total = online_softmax.finish(sums)
  given = online_softmax.pull(q, queries, o, log_total, do)
  return o, *online_softmax.gradients(given, jnp.zeros_like(q), block, window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("scores", [1, 2**24])  # blocks of 128 keys, and of all
def test_equals_the_softmax_of_all_scores(window, scores, monkeypatch):
  monkeypatch.setattr(online_softmax, "SCORES", scores)
  with jax.enable_x64(True):
    q, kv, queries, keys = case()
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    seen = (distance >= 0) & (distance < (window or S))
    seen &= queries.document[:, :, None] == keys.document[:, None, :]
    o, pull = jax.vjp(lambda q, kv: direct(q, kv, seen), q, kv)
    do = jnp.asarray(np.random.default_rng(1).normal(size=o.shape))
    actual = jax.jit(blockwise, static_argnums=4)(q, kv, queries, keys, window, do)
    for one, other in zip(actual, (o, *pull(do))):
      np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
  assert not np.any(actual[0][:, 2]), "a query that sees nothing has an output"


def test_blocks_that_no_query_sees_are_not_read(monkeypatch):
  monkeypatch.setattr(online_softmax, "SCORES", 1)
  q, kv, queries, keys = case(jnp.float32)
  queries = queries._replace(position=jnp.minimum(queries.position, 255))
  arguments = (queries, keys, None, jnp.ones((B, T, H, V), jnp.float32))
  clean = blockwise(q, kv, *arguments)
  spoilt = blockwise(q, kv.at[:, 256:].set(jnp.nan), *arguments)
  jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def test_bfloat16_follows_float32():
  q, kv, queries, keys = case(jnp.float32)
  do = jnp.ones((B, T, H, V), jnp.float32)
  wide = blockwise(q / 30, kv, queries, keys, None, do)
  q, kv = (q / 30).astype(jnp.bfloat16), kv.astype(jnp.bfloat16)
  sums = online_softmax.add(online_softmax.start(q, kv), q, queries, Keys(kv, keys), None)
  o, _ = online_softmax.finish(sums)
  assert o.dtype == sums.weight.dtype == jnp.float32
  np.testing.assert_allclose(o, wide[0], atol=0.03)
