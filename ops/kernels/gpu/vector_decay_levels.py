"""Hard chunks of the vector decay: pairs of tokens under gates of any strength.

A chunk is cut in halves, again and again: a pair meets at the level where it falls in different
halves, and both of its factors are relative to the middle. Every exponent is a sum of gates
between, none positive, however strong they are, and a token's factor of a level is the same for
its query, in the right half, and for its key, in the left.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import WGMMA
from ops.kernels.gpu.vector_decay_gates import (
  CHUNK,
  TILE,
  all_products,
  positions,
  store_mask,
  sums,
)  # fmt: skip

LEVELS = 7  # of halves: none, pairs of one, ... and halves of 32


def level_masks(level: jax.Array, zero: int | jax.Array = 0) -> tuple[jax.Array, jax.Array]:
  """Of a level: [i j] which tokens are between i and the middle, and which pairs meet there."""
  i, j = positions(zero)
  half = (jnp.int32(1) << level) >> 1
  whole = jnp.maximum(2 * half, 1)
  middle = (i & -whole) + jnp.maximum(half - 1, 0)
  between = (jnp.minimum(i, middle) < j) & (j <= jnp.maximum(i, middle))
  apart = i ^ j
  return between, (apart >= half) & (apart < whole) & (i >= j)


def pair_scores(
  q, k, terms: Callable, mine: Sequence, mask, q_s, k_s, meet: Callable, zero: jax.Array
) -> jax.Array:
  """q_i . k_j exp(g_j+1 + .. + g_i) for i >= j, else 0, for gates of any strength.

  Args:
    q, k: a tile for each 64 channels.
    terms: `terms(tile)` is the gates' terms.
    mine: the tiles that this warpgroup scales.
    mask: a tile of this warpgroup's own.
    q_s, k_s: spare tiles, as many as those of q, for all warpgroups.
    meet: waits until all warpgroups are there.
    zero: see `positions`.
  """

  def step(level, scores):
    between, pairs = level_masks(level, zero)
    store_mask(mask, between)
    plgpu.commit_smem()
    for tile in mine:
      decay = jnp.exp(sums(mask, terms(tile)))
      for source, target in ((q, q_s), (k, k_s)):
        x = plgpu.load(source.at[tile], layout=WGMMA).astype(jnp.float32)
        target[tile] = (x * decay).astype(target.dtype)
    meet()
    products = all_products(q_s, k_s)
    meet()
    return scores + jnp.where(pairs, products, 0.0)

  return lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), step, mosaic.zeros(CHUNK, CHUNK))


def pair_gradients(
  q, k, p, scale: float, terms: Callable, mine: Sequence, mask, p_s, q_s, k_s, meet: Callable,
  first: jax.Array, zero: jax.Array,
):  # fmt: skip
  """The scores of `scale` q, and for each of `mine` what pairs add to gradients.

    dq_i = scale sum_j p_ij k_j exp(g_j+1 + .. + g_i)        db_i = q_i dq_i - k_i dk_i
    dk_j = scale sum_i p_ij q_i exp(g_j+1 + .. + g_i)

  Args:
    p: [i j], 0 for i < j.
    mask, p_s: tiles for all warpgroups, written by the one that is `first`.

  The others are as in `pair_scores`.
  """
  tile_of = (CHUNK, TILE)
  turned = lambda ref: ref.transpose((1, 0))
  load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

  def step(level, sums_so_far):
    scores, dq, dk, db = sums_so_far
    between, pairs = level_masks(level, zero)

    @pl.when(first)
    def _():
      store_mask(mask, between)
      p_s[...] = jnp.where(pairs, p, 0.0).astype(p_s.dtype)

    meet()
    decays = [jnp.exp(sums(mask, terms(tile))) for tile in mine]
    for tile, decay in zip(mine, decays):
      q_s[tile] = (load(q.at[tile]) * (decay * scale)).astype(q_s.dtype)
      k_s[tile] = (load(k.at[tile]) * decay).astype(k_s.dtype)
    meet()
    scores += jnp.where(pairs, all_products(q_s, k_s), 0.0)
    for n, (tile, decay) in enumerate(zip(mine, decays)):
      of_q = mosaic.product(tile_of, p_s, k_s.at[tile])
      of_k = mosaic.product(tile_of, turned(p_s), q_s.at[tile])
      # Rounded as they are, so that both sides of a pair cancel where they should.
      rounded_q, rounded_k = load(q_s.at[tile]), load(k_s.at[tile])
      dq[n] += of_q * (decay * scale)
      dk[n] += of_k * decay
      db[n] += rounded_q * of_q - rounded_k * of_k
    meet()
    return scores, dq, dk, db

  zeros = lambda: [mosaic.zeros(*tile_of) for _ in mine]
  start = mosaic.zeros(CHUNK, CHUNK), zeros(), zeros(), zeros()
  return lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), step, start)
