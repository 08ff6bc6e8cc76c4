"""The triangular system of the delta rule, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.triangular import solve, unit_lower_inverse


def systems(C):
  """[3 C C]: any keys, keys that correlate by 0.99, one key again and again with beta = 2."""
  rng = np.random.default_rng(C)
  shared, own = rng.normal(size=(1, 8)), rng.normal(size=(C, 8))
  keys = np.stack([own, shared + 0.1 * own, np.broadcast_to(shared, own.shape)])
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  beta = np.stack([rng.uniform(0, 1, C), rng.uniform(0, 2, C), np.full(C, 2.0)])[..., None]
  return np.tril(beta * keys @ keys.swapaxes(-1, -2), -1)


@pytest.mark.parametrize("C", [1, 2, 16, 64])
def test_inverse_is_exact_however_keys_repeat(C):
  A = systems(C).astype(np.float32)
  above = A + np.triu(np.full(A.shape, np.nan, np.float32))
  expected = np.linalg.inv(np.eye(C) + A.astype(np.float64))
  actual = jax.jit(unit_lower_inverse)(jnp.asarray(above))
  np.testing.assert_allclose(actual, expected, atol=3e-5)


def test_solve_has_derivatives_of_every_order():
  with jax.enable_x64(True):
    A = jnp.asarray(systems(8)[0])
    Y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))

    def ours(A, Y):
      return jnp.sum(jnp.sin(solve(A, jax.lax.stop_gradient(unit_lower_inverse(A)), Y)))

    def plain(A, Y):
      return jnp.sum(jnp.sin(jnp.linalg.solve(jnp.eye(8) + jnp.tril(A, -1), Y)))

    def derivatives(f):
      gradient = jax.grad(f, argnums=(0, 1))
      lower = lambda tree: (jnp.tril(tree[0], -1), tree[1])
      hessian_times = lambda A, Y: jax.jvp(gradient, (A, Y), (A, Y))[1]
      squared = jax.grad(lambda A, Y: sum(jnp.sum(x**2) for x in lower(gradient(A, Y))), (0, 1))
      return [lower(f(A, Y)) for f in (gradient, hessian_times, squared)]

    actual, expected = jax.jit(lambda: (derivatives(ours), derivatives(plain)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), actual, expected)
