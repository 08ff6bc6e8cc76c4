"""Scores between the positions of a chunk under decay, from sums of gates and never differences.

  A_ij = sum_K x_i y_j exp(g_{j+1} + ... + g_i)      i >= j,  g <= 0

exp(b_i - b_j) with long cumulative sums b loses every digit that b has in front of the difference,
and (x exp(b)) (y exp(-b)) overflows. Here a chunk is halved again and again: between a position i
in the right half of a block and j in the left half the exponent is a sum that ends at the border
plus one that begins there,

  (g_{j+1} + ... + g_border) + (g_{border+1} + ... + g_i),

both <= 0, so that each half is weighed by itself and one product of matrices gives all the pairs.
The gradients inherit it: that of a gate is a sum over the pairs that straddle it, without
cancellation, however strong the gates are.

Arrays are [... C ...] with C a power of two; gates are [... C 1] or [... C K]. Heads have two axes,
H of x and y, and M that share each, see `linear_attention.py`. Axes are merged around products:
jaxlib 0.10.2 crashes on CPUs in products, and in sums of them, of seven axes and more.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Sums(NamedTuple):
  """Sums of gates between the positions of a chunk."""

  from_start: Float[Array, "*n H M C Kg"]  # over the positions up to this one, itself included
  to_end: Float[Array, "*n H M C Kg"]  # over the positions after this one
  # For blocks of 2, 4, ... C positions: from the border in the middle to each of the right half,
  # and from each of the left half, itself left out, to the border; [... HM C/2h h Kg].
  borders: list[tuple[Array, Array]]


def sum_gates(g: Float[Array, "*n H M C Kg"]) -> Sums:
  """The sums that every score of a chunk is made of."""
  merged = g.reshape(*g.shape[:-4], -1, *g.shape[-2:])
  from_start, to_end = merged[..., None, :], jnp.zeros_like(merged)[..., None, :]
  borders = []
  while from_start.shape[-3] > 1:
    left, right = _halves(from_start)
    left_end, right_end = _halves(to_end)
    borders.append((right, left_end))
    from_start = jnp.concatenate([left, left[..., -1:, :] + right], axis=-2)
    to_end = jnp.concatenate([left_end + right[..., -1:, :], right_end], axis=-2)
  return Sums(from_start.reshape(g.shape), to_end.reshape(g.shape), borders)


def pair_decays(sums: Sums) -> Float[Array, "*n H M C C"]:
  """exp(g_{j+1} + ... + g_i) for scalar gates [... C 1], 0 where j > i."""
  *n, H, M, C, _ = sums.from_start.shape
  blocks = jnp.zeros((*n, H * M, C, 1, 1), sums.from_start.dtype)
  for right, left in sums.borders:
    blocks = _join(blocks, right + jnp.swapaxes(left, -1, -2), -jnp.inf)
  return jnp.exp(blocks).reshape(*n, H, M, C, C)


def scalar_scores(
  x: Float[Array, "*n H C K"],
  y: Float[Array, "*n H C K"],
  decays: Float[Array, "*n H M C C"],
  precision,
) -> Float[Array, "*n H M C C"]:
  """The scores where all of K decays alike; `decays` from `pair_decays`."""
  return jnp.einsum("...ik,...jk->...ij", x, y, precision=precision)[..., None, :, :] * decays


def vector_scores(
  x: Float[Array, "*n H C K"], y: Float[Array, "*n H C K"], sums: Sums, precision
) -> Float[Array, "*n H M C C"]:
  """The scores where each of K has its own gate."""
  *n, H, M, C, _ = sums.from_start.shape
  blocks = jnp.broadcast_to(jnp.sum(x * y, axis=-1)[..., None, :], (*n, H, M, C))
  blocks = blocks.reshape(*n, H * M, C, 1, 1)
  x, y = x[..., None, :], y[..., None, :]  # [... H C 1 K], blocks of one
  for right, left in sums.borders:
    (x_left, x_right), (y_left, y_right) = _halves(x), _halves(y)
    across = _products(_weigh(x_right, right), _weigh(y_left, left), precision)
    blocks = _join(blocks, across, 0.0)
    x = jnp.concatenate([x_left, x_right], axis=-2)
    y = jnp.concatenate([y_left, y_right], axis=-2)
  return blocks.reshape(*n, H, M, C, C)


# Axes are merged where they can be: on CPUs jaxlib 0.10.2 may crash in products, and in sums, of
# more than six.


def _weigh(x, gates):
  """Each of [... H n h K] under the decays of M heads [... HM n h K]."""
  H, K = x.shape[-4], x.shape[-1]
  weighed = x.reshape(*x.shape[:-3], 1, -1, K) * jnp.exp(
    gates.reshape(*gates.shape[:-4], H, -1, x.shape[-3] * x.shape[-2], K)
  )
  return weighed.reshape(gates.shape)


def _products(x, y, precision):
  """x y^T of blocks [... HM n h K]: [... HM n h h]."""
  merge = lambda x: x.reshape(*x.shape[:-4], -1, *x.shape[-2:])
  products = jnp.einsum("...ik,...jk->...ij", merge(x), merge(y), precision=precision)
  return products.reshape(*x.shape[:-1], y.shape[-2])


def _halves(x):
  """Blocks in pairs: [... 2n h K] -> two of [... n h K]."""
  x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
  return x[..., 0, :, :], x[..., 1, :, :]


def _join(blocks, across, above):
  """[... 2n h h] on the diagonal, [... n h h] below it -> [... n 2h 2h]."""
  first, last = _halves(blocks)
  top = jnp.concatenate([first, jnp.full_like(across, above)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([across, last], axis=-1)], axis=-2)
