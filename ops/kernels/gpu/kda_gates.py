"""Gates of a chunk of 64 tokens, one per row of the state, inside the kernels.

Every sum of gates between two positions is a product with a matrix of zeros and ones, on the tensor
cores: a gate is split in two bfloat16 numbers, the sums are float32, and none is a difference.

Scores sum_d x_id y_jd exp(g_{j+1} + ... + g_i), i > j, are made by halving the chunk again and
again. At a border, x of the right half is weighed by the gates from the border on, y of the left
half by those up to it, and one product gives the pairs across all borders of a level:

  level h = 32, 16, ... 1: borders in the middle of blocks of 2h; i and j differ first at bit h.

Where the gates on either side of the chunk's middle sum to less than 60, one level gives all pairs:
on the other side of the border the weights are turned over, and their products stay finite.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import WGMMA

CHUNK = 64  # tokens: the rows of one wgmma
TILE = 64  # columns
WIDTH = 32  # of K that a warpgroup has
NARROW = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))
TERMS = 2  # bfloat16 numbers for one of float32
LARGEST = 60.0  # exponent of a weight that is turned over

# What `choices` holds, and the first of its levels.
UP_TO, AFTER, FROM_MIDDLE, FROM, ALL, LEVEL = range(6)
LEVELS = CHUNK.bit_length() - 1


def choices() -> jax.Array:
  """bfloat16 [N C C]: matrices that sum over some of the positions j, for each position i."""
  i, j = np.indices((CHUNK, CHUNK))
  right, left = (j <= i) & (j >= CHUNK // 2), (j > i) & (j < CHUNK // 2)
  tables = [j <= i, j > i, 1.0 * right - left, j >= i, j >= 0]
  for half in 2 ** np.arange(LEVELS)[::-1]:
    towards = np.where(i & half, j <= i, j > i)
    tables.append(towards & ((i ^ j) < half))
  return jnp.asarray(np.stack(tables), jnp.bfloat16)


def positions():
  """The rows and columns of a tile."""
  return tuple(
    plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA) for axis in (0, 1)
  )


def load_choice(choices, n) -> jax.Array:
  """One of `choices` in device memory, in registers. Made there by comparisons, as left operands
  they have given sums on an H100 that were wrong now and then."""
  return plgpu.load(choices.at[n], layout=WGMMA, optimized=False)


def store_split(x, target):
  """x [C K] float32 as a sum of bfloat16 tiles in `target`."""
  for term in range(TERMS):
    target[term] = x.astype(target.dtype)
    x = x - x.astype(target.dtype).astype(jnp.float32)
  plgpu.commit_smem()


def sums(choice, split) -> jax.Array:
  """choice x, float32 [C K], of x in `split` [terms C K]; `choice` [C C] is a left operand."""
  return mosaic.products(split.shape[1:], [(choice, split.at[term]) for term in range(TERMS)])


def largest(spare):
  """The largest exponent that `for_each_level` has left in `spare`."""
  # Positions at the ends are the farthest from the middle.
  return jnp.maximum(spare[0], spare[CHUNK - 1])


def for_each_level(middle, choices, split, spare, decide, left: Callable, body: Callable, carried):
  """`body(carried, rows, columns, pairs)` for every level: weights [C K] of x and y, and
  `pairs(i, j)`, the mask of what their product gives, None for all.

  Args:
    middle: FROM_MIDDLE of `choices`, as a left operand.
    choices: in device memory, for the levels.
    spare: float32 [C] of shared memory.
    decide: called with exponents in `spare`; the largest of those that one level is to serve.
    left: makes a left operand of an array.
  """
  exponent = sums(middle, split)
  spare[...] = jnp.maximum(exponent, -exponent).max(1)

  def at_once(carried):
    return body(carried, jnp.exp(exponent), jnp.exp(-exponent), None)

  def level(n, carried):
    half = lax.shift_right_logical(jnp.int32(CHUNK // 2), n)
    weights = jnp.exp(sums(left(load_choice(choices, LEVEL + n)), split))

    def pairs(i, j):
      differ = i ^ j
      return (i > j) & (differ >= half) & (differ < 2 * half)

    return body(carried, weights, weights, pairs)

  def one_by_one(carried):
    return lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, carried)

  return lax.cond(decide() < LARGEST, at_once, one_by_one, carried)
