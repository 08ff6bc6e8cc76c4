"""Gates of a chunk of 64 tokens, one per row of the state, inside the kernels.

Every sum of gates between two positions is a product with a matrix of zeros and ones, on the tensor
cores: a gate is split in two bfloat16 numbers, the sums are float32, and none is a difference.

Scores sum_d x_id y_jd exp(g_{j+1} + ... + g_i), i > j, are made by halving the chunk again and
again. At a border, x of the right half is weighed by the gates from the border on, y of the left
half by those up to it, and one product gives the pairs across all borders of a level:

  level h = 32, 16, ... 1: borders in the middle of blocks of 2h; i and j differ first at bit h.

Where the gates on either side of the chunk's middle sum to less than 60, the first level gives all
pairs: on the other side of the border the weights are turned over, and their products stay finite.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import WGMMA

CHUNK = 64  # tokens: the rows of one wgmma
TILE = 64  # of K: a warpgroup has so many rows of the state
TERMS = 2  # bfloat16 numbers for one of float32
LARGEST = 60.0  # exponent of a weight that is turned over


def positions(width: int = CHUNK):
  """The rows and columns of a tile of CHUNK rows."""
  return tuple(
    plgpu.broadcasted_iota(jnp.int32, (CHUNK, width), axis, layout=WGMMA) for axis in (0, 1)
  )


def store_split(x, target):
  """x [C TILE] float32 as a sum of bfloat16 tiles in `target`."""
  for term in range(TERMS):
    target[term] = x.astype(target.dtype)
    x = x - x.astype(target.dtype).astype(jnp.float32)
  plgpu.commit_smem()


def sums(chosen, split, left: Callable) -> jax.Array:
  """sum_m chosen_im x_m, float32 [C TILE], of x in `split`; `chosen` is a mask [C C]."""
  chosen = left(jnp.where(chosen, 1.0, 0.0).astype(split.dtype))
  return mosaic.products((CHUNK, TILE), [(chosen, split.at[term]) for term in range(TERMS)])


def to_border(i, j, half):
  """The gates j between position i and the border in the middle of its block of 2 `half`."""
  right = (i & half) != 0
  here = (i ^ j) < half
  return here & ((right & (j <= i)) | ((i & half == 0) & (j > i)))


def for_each_level(split, spare, left: Callable, body: Callable, carried):
  """`body(carried, rows, columns, pairs)` for every level: weights [C TILE] of x and y, and
  `pairs(i, j)`, the mask of what their product gives. `spare` is float32 [C] of shared memory."""

  def one(half, exponent, mild, carried):
    # Beyond the border the weights are turned over where the first level gives all.
    if mild is None:
      rows = columns = jnp.exp(exponent)
      first, last = half, 2 * half
    else:
      other = exponent * jnp.where(mild, -1.0, 1.0)
      right = (positions(TILE)[0] & half) != 0
      rows = jnp.exp(jnp.where(right, exponent, other))
      columns = jnp.exp(jnp.where(right, other, exponent))
      first, last = jnp.where(mild, 1, half), jnp.where(mild, CHUNK, 2 * half)

    def pairs(i, j):
      differ = i ^ j
      return (i > j) & (differ >= first) & (differ < last)

    return body(carried, rows, columns, pairs)

  exponents = lambda half: sums(to_border(*positions(), half), split, left)
  half = jnp.int32(CHUNK // 2)
  exponent = exponents(half)
  spare[...] = exponent.min(1)
  # Rows at the ends are the farthest from the border.
  mild = jnp.minimum(spare[0], spare[CHUNK - 1]) > -LARGEST
  carried = one(half, exponent, mild, carried)

  def more(level, carried):
    smaller = lax.shift_right_logical(half, level)
    return one(smaller, exponents(smaller), None, carried)

  levels = jnp.where(mild, 1, CHUNK.bit_length() - 1).astype(jnp.int32)
  return lax.fori_loop(jnp.int32(1), levels, more, carried)
