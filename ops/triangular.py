"""Solving (I + A) X = Y for many small A, strictly lower triangular: the delta rule in a chunk.

The inverse is found by substitution in blocks of 16 rows, and the blocks are merged two by two:

  [I + A_1     0   ]^-1   [     T_1        0 ]
  [  B      I + A_2]    = [-T_2 B T_1    T_2 ]

Both are exact to rounding whatever A is. The product (I - A)(I + A^2)(I + A^4)..., which suits
matrix units better, is not: where keys repeat, powers of A grow to 1e20 before they cancel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 16  # rows


def unit_lower_inverse(A: Float[Array, "*n C C"]) -> Float[Array, "*n C C"]:
  """(I + A)^-1 for A strictly lower triangular, C a power of two; what lies above is not read."""
  C = A.shape[-1]
  size = min(BLOCK, C)
  blocks = [A[..., i : i + size, i : i + size] for i in range(0, C, size)]
  T = _substitute(jnp.stack(blocks, axis=-3))
  while size < C:
    corners = [A[..., i + size : i + 2 * size, i : i + size] for i in range(0, C, 2 * size)]
    first, last = T[..., 0::2, :, :], T[..., 1::2, :, :]
    below = -_product(last, _product(jnp.stack(corners, axis=-3), first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    T = jnp.concatenate([top, jnp.concatenate([below, last], axis=-1)], axis=-2)
    size *= 2
  return T[..., 0, :, :]


def _substitute(A):
  """T_i = e_i - sum_{j<i} A_ij T_j, row by row."""
  size = A.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(size, dtype=A.dtype), A.shape)
  rows = [identity[..., 0, :]]
  for i in range(1, size):
    rows.append(identity[..., i, :] - sum(A[..., i, j, None] * rows[j] for j in range(i)))
  return jnp.stack(rows, axis=-2)


def _product(left, right):
  """Products of matrices whose last axes before them are one meanwhile: on CPUs jaxlib 0.10.2 may
  crash where there are more than six axes in all."""
  merge = lambda x: x.reshape(*x.shape[:-5], -1, *x.shape[-2:]) if x.ndim > 5 else x
  product = jnp.matmul(merge(left), merge(right), precision=jax.lax.Precision.HIGHEST)
  return product.reshape(*left.shape[:-1], right.shape[-1])


def solve(
  A: Float[Array, "*n C C"], inverse: Float[Array, "*n C C"] | None, Y: Float[Array, "*n C V"]
) -> Float[Array, "*n C V"]:
  """X = (I + A)^-1 Y, where `inverse` is (I + A)^-1, or None, and A is strictly lower triangular.

  Its derivative, dX = (I + A)^-1 (dY - dA X), needs one product for dA and none with the inverse's
  own derivative; so does the derivative of that. `inverse` may come through `stop_gradient`.
  """
  if inverse is None:
    return jax.scipy.linalg.solve_triangular(A, Y, lower=True, unit_diagonal=True)
  transpose = lambda x: jnp.swapaxes(x, -1, -2)
  return jax.lax.custom_linear_solve(
    lambda X: X + _product(A, X),
    Y,
    solve=lambda _, Y: _refined(A, inverse, Y),
    transpose_solve=lambda _, Y: _refined(transpose(A), transpose(inverse), Y),
  )


def _refined(A, inverse, Y):
  """inverse Y, corrected once by what it leaves of Y: as exact as substitution. Where keys repeat
  and beta is 2, an inverse alone loses another factor of seven."""
  X = _product(inverse, Y)
  return X + _product(inverse, Y - X - _product(A, X))
