"""Normalisation of keys and queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.precision import state_dtype


def l2_normalize(x: Float[Array, "..."], eps: float = 1e-6) -> Float[Array, "..."]:
  """x / sqrt(sum x^2 + eps) over the last axis, computed in float32 (float64 for float64), in the
  dtype of `x`.

  At zero the value is zero and the gradient finite: that of x / sqrt(eps).
  """
  y = x.astype(state_dtype(x))
  return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)
