"""l2_normalize: value, and a gradient that stays accurate at zero."""

import jax
import jax.numpy as jnp
import numpy as np

import ops


def test_value_and_dtype():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  expected = x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(ops.l2_normalize(jnp.asarray(x)), expected, rtol=1e-6)
  assert ops.l2_normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_gradient_at_zero_is_that_of_a_scaling():
  jacobian = jax.jacobian(ops.l2_normalize)(jnp.zeros(4))
  np.testing.assert_allclose(jacobian, 1e3 * np.eye(4), rtol=1e-6)
