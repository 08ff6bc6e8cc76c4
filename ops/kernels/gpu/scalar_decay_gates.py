"""Gates and documents of the scalar decay, as the kernels read them: by chunk, with factors.

A chunk's pairs, what it takes from the state before it and what it leaves to the state after it are
multiplied by exponentials of differences of gate sums, and by 0 across documents. Every operand is
finite, so that a product with 0 is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

CHUNK = 64  # tokens: the rows of one wgmma


class Gates(NamedTuple):
  """Per token: in device memory [B H T] and [B T], in shared memory [... C] each."""

  sums: jax.Array  # float32, of the gates from the chunk's start
  documents: jax.Array | None  # float32, starts of documents since the chunk's start; None: one

  def at(self, slot):
    return Gates(self.sums.at[slot], None if self.documents is None else self.documents.at[slot])

  @property
  def copies(self) -> int:
    return 1 if self.documents is None else 2

  def scratch(self, *leading: int):
    """Shared memory for chunks of these."""
    vector = plgpu.SMEM((*leading, CHUNK), jnp.float32)
    return Gates(vector, None if self.documents is None else vector)

  def fetch(self, batch, head, chunk, target: "Gates", barrier):
    rows = pl.ds(chunk * CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(self.sums.at[batch, head, rows], target.sums, barrier)
    if self.documents is not None:
      plgpu.copy_gmem_to_smem(self.documents.at[batch, rows], target.documents, barrier)


class Factors(NamedTuple):
  """Of one chunk."""

  from_start: jax.Array  # [C], of the state before, in the tokens' outputs
  to_end: jax.Array  # [C], of the tokens, in the state after
  carry: jax.Array  # scalar, of the state before, in the state after


def factors(gates: Gates, axis: int = 0) -> Factors:
  """Along an axis of a tile, its rows or columns, from the gates of a chunk in shared memory."""
  layout = WGMMA.reduce(1 - axis)
  row, end = plgpu.load(gates.sums, layout=layout), gates.sums[CHUNK - 1]
  from_start, to_end, carry = jnp.exp(row), jnp.exp(end - row), jnp.exp(end)
  if gates.documents is not None:
    document, last = (plgpu.load(gates.documents, layout=layout), gates.documents[CHUNK - 1])
    from_start = jnp.where(document == 0.0, from_start, 0.0)
    to_end = jnp.where(document == last, to_end, 0.0)
    carry = jnp.where(last == 0.0, carry, 0.0)
  return Factors(from_start, to_end, carry)


def pairs(gates: Gates) -> jax.Array:
  """exp(b_i - b_j) [C C] for i >= j in the same document, else 0."""
  both = lambda ref: (
    along_rows(plgpu.load(ref, layout=WGMMA.reduce(1)), CHUNK),
    along_columns(plgpu.load(ref, layout=WGMMA.reduce(0)), CHUNK),
  )
  i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), n, layout=WGMMA) for n in (0, 1))
  row, column = both(gates.sums)
  # Above the diagonal the exponent is positive: it is replaced before anything is infinite.
  exponent = jnp.where(i >= j, row - column, -jnp.inf)
  if gates.documents is not None:
    row, column = both(gates.documents)
    exponent = jnp.where(row == column, exponent, -jnp.inf)
  return jnp.exp(exponent)
