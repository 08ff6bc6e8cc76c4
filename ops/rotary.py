"""Rotary positions: queries and keys turned by angles that grow with their position."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary(
  x: Float[Array, "B T H K"], positions: Int[Array, "#B T"], base: float = 10000.0
) -> Float[Array, "B T H K"]:
  """Rotates channel pairs (i, i + K/2) by position * base^(-2i/K). Su et al., "RoFormer", 2021.

  Args:
    x: queries or keys, K even.
    positions: of each token; only differences matter to the attention that follows, modulo 2^32.
    base: the longest wavelength is about 2 pi base tokens.

  Returns:
    The rotated array, in x's dtype; angles are float32 (float64 for float64 inputs), as exact at
    any position as at the first.
  """
  half, dtype = x.shape[-1] // 2, jnp.promote_types(x.dtype, jnp.float32)
  # In 2^-32 of a turn, unsigned integers drop whole turns by themselves, and nothing is rounded.
  turns = base ** (-np.arange(half) / half) / (2 * np.pi)
  frequencies = np.round(turns % 1 * 2**32).astype(np.uint64).astype(np.uint32)
  fractions = positions[:, :, None, None].astype(jnp.uint32) * frequencies
  turn = np.asarray(2 * np.pi / 2**32, dtype)
  angles = jax.lax.bitcast_convert_type(fractions, jnp.int32).astype(dtype) * turn
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
