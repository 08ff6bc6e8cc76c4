"""Gates and documents of the delta rule's chunks, in the order in which its kernels read them.

What multiplies a chunk's tokens is made once, outside the kernels: the pass over the chunks waits
for every exponential on its way.
"""

import math

import jax
import jax.numpy as jnp

from ops.kernels.gpu.scalar_decay import CHUNK, FLOOR, document_before

LOG2_E = math.log2(math.e)
SMALL = 1e-15  # what a step of 0 is, as its gradient is divided by it
LOG2_SUMS, FROM_START, TO_END, BETA, DOCUMENTS = range(5)


def chunk_gates(log_decay, beta, document):
  """float32 [B H N R C], R rows for each chunk of C tokens; every number is finite.

  LOG2_SUMS: gates summed from the chunk's start, as powers of 2; FROM_START: what a token sees of
  the state before the chunk, the last one is what the chunk leaves of it; TO_END: what the state
  after it keeps of the token; BETA: the steps, `SMALL` for 0; DOCUMENTS, where there are several:
  how many have started since the chunk's start.

  Args:
    log_decay, beta: float32 [B T H], T a multiple of the chunk.
    document: int32 [B T], the number of documents that have started; None is one.
  """
  B, T, H = log_decay.shape
  by_chunk = lambda x: x.reshape(B, T // CHUNK, CHUNK, H).transpose(0, 3, 1, 2)
  sums = jnp.cumsum(by_chunk(jnp.maximum(log_decay, FLOOR)), axis=3)
  beta = by_chunk(jnp.where(jnp.abs(beta) < SMALL, SMALL, beta))
  from_start, to_end = jnp.exp(sums), jnp.exp(sums[..., -1:] - sums)
  rows = [sums * LOG2_E, from_start, to_end, beta]
  if document is not None:
    starts = document.reshape(B, -1, CHUNK) - document_before(document, CHUNK)[:, :, None]
    starts = jnp.broadcast_to(starts[:, None].astype(jnp.float32), sums.shape)
    rows[FROM_START] = jnp.where(starts == 0, from_start, 0)
    rows[TO_END] = jnp.where(starts == starts[..., -1:], to_end, 0)
    rows.append(starts)
  return jnp.stack(rows, axis=3)


def pairs(gates, diagonal: bool, scale: float = 1.0) -> jax.Array:
  """scale exp(b_i - b_j) [C C] for i > j, or i >= j with the `diagonal`, in the same document;
  else 0.

  Args:
    gates: [R C] in shared memory.
  """
  i, j = _rows_and_columns(None)
  row, column = _rows_and_columns(gates.at[LOG2_SUMS])
  if scale > 0:
    row, scale = row + math.log2(scale), 1
  # Above the diagonal the exponent is positive: it is replaced before anything is infinite.
  exponent = jnp.where(i >= j if diagonal else i > j, row - column, -jnp.inf)
  if gates.shape[0] > DOCUMENTS:
    row, column = _rows_and_columns(gates.at[DOCUMENTS])
    exponent = jnp.where(row == column, exponent, -jnp.inf)
  decays = jnp.exp2(exponent)
  return decays if scale == 1 else decays * scale


def sums_from_each_on(gates, numbers, rest) -> jax.Array:
  """[C]: the sum of `numbers` [C] from each token to the chunk's end, and of all of the `rest`
  [C], which is of the state after the chunk; only what is of the token's own document.

  Args:
    gates: [R C] in shared memory.
  """
  from ops.kernels.gpu.mosaic import along_columns

  i, j = _rows_and_columns(None)
  numbers, rest = along_columns(numbers, CHUNK), along_columns(rest, CHUNK)
  if gates.shape[0] > DOCUMENTS:
    row, column = _rows_and_columns(gates.at[DOCUMENTS])
    numbers = jnp.where(row == column, numbers, 0.0)
    rest = jnp.where(row == gates[DOCUMENTS, CHUNK - 1], rest, 0.0)
  return (jnp.where(i <= j, numbers, 0.0) + rest).sum(1)


def written_only(gates, factors, axis: int) -> jax.Array:
  """`factors` [C] by row (axis 1) or column (0), 0 where the step is: `SMALL` writes nothing."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu.mosaic import WGMMA

  return jnp.where(plgpu.load(gates.at[BETA], layout=WGMMA.reduce(axis)) == SMALL, 0.0, factors)


def _rows_and_columns(ref):
  """[C C] twice: the numbers of `ref` [C], or 0 to C - 1, by row and by column."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

  def make(layout):
    if ref is None:
      return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout)
    return plgpu.load(ref, layout=layout)

  return along_rows(make(WGMMA.reduce(1)), CHUNK), along_columns(make(WGMMA.reduce(0)), CHUNK)
