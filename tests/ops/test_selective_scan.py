"""What the laws do not see: the memory of the chunked scan and the precision of its exponential."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops.exponential import exp2


def test_exp2_is_exact_at_zero_and_close_everywhere():
  x = jnp.concatenate([jnp.zeros(1), jnp.linspace(-125.0, 126.0, 100_001)])
  y = np.asarray(exp2(x), np.float64)
  assert y[0] == 1.0
  np.testing.assert_allclose(y, np.exp2(np.asarray(x, np.float64)), rtol=3e-7)
  assert np.isnan(exp2(jnp.array([jnp.nan]))).all()
  np.testing.assert_allclose(exp2(jnp.array([-1e9, -jnp.inf])), 0.0, atol=2e-38)
  np.testing.assert_allclose(jax.grad(exp2)(jnp.array(1.5)), np.log(2) * 2**1.5, rtol=1e-6)


@pytest.mark.slow
def test_chunked_needs_a_tenth_of_the_memory_of_parallel():
  B, T, D, N = 2, 256, 64, 16
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  arrays = shape(B, T, D), shape(B, T, D), shape(D, N), shape(B, T, N), shape(B, T, N)

  def temporary_bytes(implementation):
    def loss(*arrays):
      return ops.selective_scan(*arrays, implementation=implementation)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  chunked = temporary_bytes("chunked")
  assert chunked < 4 * B * T * D * N
  assert chunked < temporary_bytes("parallel") / 10
