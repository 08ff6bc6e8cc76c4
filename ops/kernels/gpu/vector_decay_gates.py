"""Gates of the vector decay inside the kernels: sums between tokens, and scores of decayed pairs.

A sum of gates between two tokens is a row of zeros and ones times the gates: a product for the
tensor cores, with the gates as a sum of bfloat16 terms. Most chunks decay so little that all is
relative to their start,

  q_i . k_j exp(g_j+1 + .. + g_i) = (q_i exp(b_i)) . (k_j exp(-b_j))          b sums from the start

with factors up to exp(-LIMIT). The others are cut in halves, again and again: a pair meets at the
level where it falls in different halves, and both of its factors are relative to the middle, so
that every exponent is a sum of gates between, none positive, however strong they are.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

CHUNK = 64  # tokens: the rows of one wgmma
TILE = 64  # columns; every tile is 64 by 64
LIMIT = -70.0  # the sum of a chunk's gates from which on factors exp(-sum) might overflow
LEVELS = 7  # of halves: none, pairs of one, ... and halves of 32


def positions(zero: int | jax.Array = 0) -> tuple[jax.Array, jax.Array]:
  """Row and column of each element of a tile.

  A `zero` that the compiler does not know keeps it from making them long before they are needed,
  and from keeping registers busy with them.
  """
  both = (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), n, layout=WGMMA) for n in (0, 1))
  return tuple(x + zero for x in both)


def store_mask(target, mask):
  """Ones where `mask`, else zeros."""
  target[...] = jnp.where(mask, 1.0, 0.0).astype(target.dtype)


def store_terms(gates: jax.Array, targets: Sequence):
  """Tiles whose sum is `gates`, rounded if there is one."""
  for target in targets:
    term = gates.astype(target.dtype)
    target[...] = term
    gates = gates - term.astype(jnp.float32)


def sums(mask, terms: Sequence) -> jax.Array:
  """[i d] the gates of channel d, summed over the tokens j where mask_ij is 1."""
  return mosaic.products((CHUNK, TILE), [(mask, term) for term in terms])


def totals(upper, terms: Sequence) -> jax.Array:
  """[d] the gates of channel d, summed; `upper` has ones on and above the diagonal."""
  turned = [(term.transpose((1, 0)), upper) for term in terms]
  # Sums do not increase.
  return mosaic.products((TILE, CHUNK), turned).min(1)


class Documents:
  """Starts of documents since the chunk's start, per token, float32 [C] in shared memory."""

  def __init__(self, ref):
    self.ref = ref

  @property
  def last(self):
    return self.ref[CHUNK - 1]

  def rows(self) -> jax.Array:
    return plgpu.load(self.ref, layout=WGMMA.reduce(1))

  def pairs(self) -> jax.Array:
    """[i j] whether both are in one document."""
    columns = plgpu.load(self.ref, layout=WGMMA.reduce(0))
    return along_rows(self.rows(), CHUNK) == along_columns(columns, CHUNK)

  def goes_on(self) -> jax.Array:
    """[i] 0 where a document starts, else 1."""
    i, j = positions()
    earlier = jnp.where(self.pairs() & (i > j), 1.0, 0.0).sum(1)
    return jnp.where((earlier == 0.0) & (self.rows() != 0.0), 0.0, 1.0)

  def before(self, x: jax.Array) -> jax.Array:
    """Rows of the document that was there before the chunk; the others are 0."""
    return jnp.where(along_rows(self.rows(), x.shape[1]) == 0.0, x, 0.0)

  def after(self, x: jax.Array) -> jax.Array:
    """Rows of the document that goes on after the chunk; the others are 0."""
    return jnp.where(along_rows(self.rows(), x.shape[1]) == self.last, x, 0.0)


def level_masks(level: jax.Array, zero: int | jax.Array = 0) -> tuple[jax.Array, jax.Array]:
  """Of a level: [i j] which tokens are between i and the middle, and which pairs meet there."""
  i, j = positions(zero)
  half = (jnp.int32(1) << level) >> 1
  whole = jnp.maximum(2 * half, 1)
  middle = (i & -whole) + jnp.maximum(half - 1, 0)
  between = (jnp.minimum(i, middle) < j) & (j <= jnp.maximum(i, middle))
  apart = i ^ j
  return between, (apart >= half) & (apart < whole) & (i >= j)


def pair_scores(q, k, terms: Callable, mine: Sequence, mask, q_s, k_s, meet: Callable) -> jax.Array:
  """q_i . k_j exp(g_j+1 + .. + g_i) for i >= j, else 0, for gates of any strength.

  Args:
    q, k: a tile for each 64 channels.
    terms: `terms(tile)` is the gates' terms.
    mine: the tiles that this warpgroup scales.
    mask: a tile of this warpgroup's own.
    q_s, k_s: spare tiles, as many as those of q, for all warpgroups.
    meet: waits until all warpgroups are there.
  """

  def step(level, scores):
    between, pairs = level_masks(level)
    store_mask(mask, between)
    plgpu.commit_smem()
    for tile in mine:
      decay = jnp.exp(sums(mask, terms(tile)))
      for source, target in ((q, q_s), (k, k_s)):
        x = plgpu.load(source.at[tile], layout=WGMMA).astype(jnp.float32)
        target[tile] = (x * decay).astype(target.dtype)
    plgpu.commit_smem()
    meet()
    products = all_products(q_s, k_s)
    meet()
    return scores + jnp.where(pairs, products, 0.0)

  return lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), step, mosaic.zeros(CHUNK, CHUNK))


def all_products(left, right) -> jax.Array:
  """left right^T over all tiles of channels."""
  tiles = range(left.shape[0])
  pairs = [(left.at[tile], right.at[tile].transpose((1, 0))) for tile in tiles]
  return mosaic.products((CHUNK, CHUNK), pairs)
