"""Scores under decay and their gradients, against every pair's own sum of gates in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.decayed_scores import pair_decays, scalar_scores, sum_gates, vector_scores

GATES = (0.0, -0.05, -20.0, -1e4)


def plain(x, y, g):
  """x, y [n B H C K], g [n B H M C K or 1]: each pair by itself."""
  C = x.shape[-2]
  between = np.array([[[j < m <= i for m in range(C)] for j in range(C)] for i in range(C)])
  exponents = jnp.einsum("ijm,...mk->...ijk", between.astype(x.dtype), g)
  return jnp.einsum(
    "...hik,...hjk,...hmijk->...hmij", x, y, jnp.exp(exponents) * jnp.ones(x.shape[-1])
  )


def ours(x, y, g):
  sums = sum_gates(g)
  if g.shape[-1] == 1:
    return scalar_scores(x, y, pair_decays(sums), "highest")
  return vector_scores(x, y, sums, "highest")


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("C", [1, 32])
def test_scores_and_gradients_at_any_strength_of_gates(C, width):
  """One strength per row of the batch; -1e4 on some tokens only. Each dg within its own size."""
  rng = np.random.default_rng(C)
  n, B, H, M, K = 2, len(GATES), 2, 2, 5
  x, y = rng.normal(size=(2, n, B, H, C, K)).astype(np.float32)
  strength = np.array(GATES, np.float32)[:, None, None, None, None]
  shape = (n, B, H, M, C, width)
  rare = np.where(rng.random(shape) < 0.2, 1.0, 1e-5) * np.ones(shape)
  g = (strength * np.where(strength == GATES[-1], rare, 1.0)).astype(np.float32)
  weights = np.tril(rng.integers(-12, 13, size=(n, B, H, M, C, C)) / 8)

  def with_gradients(scores, *arrays):
    used = weights != 0  # what lies above the diagonal is anything
    loss = lambda *arrays: jnp.sum(jnp.where(used, scores(*arrays) * weights, 0))
    return jnp.tril(scores(*arrays)), *jax.grad(loss, (0, 1, 2))(*arrays)

  actual = jax.jit(functools.partial(with_gradients, ours))(x, y, g)
  with jax.enable_x64(True):
    wide = [a.astype(np.float64) for a in (x, y, g)]
    expected = jax.jit(functools.partial(with_gradients, plain))(*wide)
  expected = [np.asarray(e) for e in expected]
  for name, a, e in zip(("scores", "dx", "dy", "dg"), actual, expected, strict=True):
    error = np.abs(np.asarray(a, np.float64) - e)
    for row, gate in enumerate(GATES):
      largest = np.abs(e[:, row]).max() or 1e-30
      assert error[:, row].max() <= 2e-6 * largest, (name, gate)
