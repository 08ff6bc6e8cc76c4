"""Gates and documents of the delta rule's chunks, in the order in which its kernels read them.

What multiplies a chunk's tokens is made once, outside the kernels: the pass over the chunks waits
for every exponential on its way.
"""

import jax
import jax.numpy as jnp

from ops.kernels.gpu.scalar_decay import CHUNK, FLOOR, document_before

EVERY = 2  # chunks for each state that is kept for the gradients
SUMS, FROM_START, TO_END, DOCUMENTS = range(4)


def chunk_gates(log_decay, document):
  """float32 [B H N R C], R rows for each chunk of C tokens; every number is finite.

  SUMS: gates summed from the chunk's start; FROM_START: what a token sees of the state before the
  chunk, the last one is what the chunk leaves of it; TO_END: what the state after it keeps of the
  token; DOCUMENTS, where there are several: how many have started since the chunk's start.

  Args:
    log_decay: float32 [B T H], T a multiple of the chunk.
    document: int32 [B T], the number of documents that have started; None is one.
  """
  B, T, H = log_decay.shape
  N = T // CHUNK
  g = jnp.maximum(log_decay, FLOOR).reshape(B, N, CHUNK, H).transpose(0, 3, 1, 2)
  sums = jnp.cumsum(g, axis=3)
  from_start, to_end = jnp.exp(sums), jnp.exp(sums[..., -1:] - sums)
  if document is None:
    return jnp.stack([sums, from_start, to_end], axis=3)
  within = document.reshape(B, N, CHUNK) - document_before(document, CHUNK)[:, :, None]
  documents = jnp.broadcast_to(within[:, None].astype(jnp.float32), sums.shape)
  from_start = jnp.where(documents == 0, from_start, 0)
  to_end = jnp.where(documents == documents[..., -1:], to_end, 0)
  return jnp.stack([sums, from_start, to_end, documents], axis=3)


def pairs(gates, diagonal: bool) -> jax.Array:
  """exp(b_i - b_j) [C C] for i > j, or i >= j with the `diagonal`, in the same document, else 0.

  Args:
    gates: [R C] in shared memory.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

  def both(row):
    return (
      along_rows(plgpu.load(gates.at[row], layout=WGMMA.reduce(1)), CHUNK),
      along_columns(plgpu.load(gates.at[row], layout=WGMMA.reduce(0)), CHUNK),
    )

  i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), n, layout=WGMMA) for n in (0, 1))
  row, column = both(SUMS)
  # Above the diagonal the exponent is positive: it is replaced before anything is infinite.
  exponent = jnp.where(i >= j if diagonal else i > j, row - column, -jnp.inf)
  if gates.shape[0] > DOCUMENTS:
    row, column = both(DOCUMENTS)
    exponent = jnp.where(row == column, exponent, -jnp.inf)
  return jnp.exp(exponent)
