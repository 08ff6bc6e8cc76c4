"""Gates of the scalar decay, as the kernels read them: summed from the start of each chunk.

A chunk's pairs, what it takes from the state before it and what it leaves to the state after it are
multiplied by exponentials of differences of these sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

CHUNK = 64  # tokens: the rows of one wgmma


class Factors(NamedTuple):
  """Of one chunk."""

  from_start: jax.Array  # [C], of the state before, in the tokens' outputs
  to_end: jax.Array  # [C], of the tokens, in the state after
  carry: jax.Array  # scalar, of the state before, in the state after


def factors(sums, axis: int = 0) -> Factors:
  """Along an axis of a tile, its rows or columns, from the sums of a chunk in shared memory."""
  row, end = plgpu.load(sums, layout=WGMMA.reduce(1 - axis)), sums[CHUNK - 1]
  return Factors(jnp.exp(row), jnp.exp(end - row), jnp.exp(end))


def pairs(sums) -> jax.Array:
  """exp(b_i - b_j) [C C] for i >= j, else 0."""
  row = along_rows(plgpu.load(sums, layout=WGMMA.reduce(1)), CHUNK)
  column = along_columns(plgpu.load(sums, layout=WGMMA.reduce(0)), CHUNK)
  i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), n, layout=WGMMA) for n in (0, 1))
  # Above the diagonal the exponent is positive: it is replaced before anything is infinite.
  return jnp.exp(jnp.where(i >= j, row - column, -jnp.inf))
