"""The delta rule's small systems, a chunk of 64 tokens each: (I + diag(beta) P)^-1 diag(beta).

Blocks of 16 rows are inverted by substitution, and merged as in `ops/triangular.py`, all in float32
and thread by thread, below what Pallas has words for: every thread owns columns, and reads the
coefficients they share.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_gates import BETA, pairs
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.scalar_decay import CHUNK
from ops.triangular import unit_lower_inverse

TILE = 64
STRIDE = CHUNK + 8  # float32 of a row in shared memory: rows that are read together differ in banks


def inverses(k, gates, terms: int, interpret=None):
  """[B H N terms C C] in the dtype of `k`, whose sum over `terms` is
  (I + diag(beta) P)^-1 diag(beta),  P_ij = k_i . k_j exp(b_i - b_j) for i > j.

  Args:
    k: [B T Hq K], T a multiple of the chunk.
    gates: float32 [B H N R C], of `delta_rule_gates`.
  """
  (B, T, Hq, K), H = k.shape, gates.shape[1]
  C, dtype, simulated, key_tiles = CHUNK, k.dtype, interpret is not None, K // TILE

  def kernel(k_hbm, gates_hbm, out_hbm):
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    rows = pl.ds(chunk * C, C)
    key_head = lax.div(head, jnp.int32(H // Hq))

    def run(tiles_s, gates_s, matrix_s, full):
      for j in range(key_tiles):
        here = k_hbm.at[batch, rows, key_head, pl.ds(j * TILE, TILE)]
        plgpu.copy_gmem_to_smem(here, tiles_s.at[j], full)
      plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, chunk], gates_s, full)
      plgpu.barrier_wait(full)

      def meanwhile():
        step = plgpu.load(gates_s.at[BETA], layout=WGMMA.reduce(1))
        return pairs(gates_s, diagonal=False) * along_rows(step, C)

      keys = [tiles_s.at[j] for j in range(key_tiles)]
      products, factors = mosaic.products_and(
        (C, C), [(x, x.transpose((1, 0))) for x in keys], meanwhile
      )
      here = matrix_s.at[:, pl.ds(0, C)]
      here[...] = products * factors
      if simulated:
        here[...] = unit_lower_inverse(here[...])
      else:
        _invert(matrix_s)
      step = plgpu.load(gates_s.at[BETA], layout=WGMMA.reduce(0))
      inverse = plgpu.load(here, layout=WGMMA, optimized=False)
      inverse = inverse * along_columns(step, C)
      # The keys have been read: their place is taken, so that more programs run side by side.
      for term in range(terms):
        tiles_s[term] = inverse.astype(dtype)
        inverse = inverse - inverse.astype(dtype).astype(jnp.float32)
      plgpu.commit_smem()
      for term in range(terms):
        plgpu.copy_smem_to_gmem(tiles_s.at[term], out_hbm.at[batch, head, chunk, term])
      plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
      run,
      plgpu.SMEM((max(terms, key_tiles), C, TILE), dtype, transforms=TILED),
      plgpu.SMEM(gates.shape[3:], jnp.float32), plgpu.SMEM((C, STRIDE), jnp.float32),
      plgpu.Barrier(num_arrivals=1 + key_tiles),
    )  # fmt: skip

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((B, H, T // C, terms, C, C), dtype),
    grid=(T // C, H, B),
    grid_names=("chunk", "head", "batch"),
    interpret=interpret,
    compiler_params=mosaic.BARE,
  )(k, gates)


def _invert(matrix):
  """A [64 STRIDE], strictly lower triangular with zeros above, becomes (I + A)^-1."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def invert(_, ref):
    memory = _Memory(ref)
    thread = arith.remui(utils.thread_idx(), _integer(128))
    utils.warpgroup_barrier()
    # One thread per column of the four blocks of 16.
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _integer(64))):
      column = arith.remui(thread, _integer(16))
      first = arith.subi(thread, column)
      block = memory.at(first, first)
      x = []
      for i in range(16):
        unit = arith.select(
          arith.cmpi(arith.CmpIPredicate.eq, column, _integer(i)), _float(-1), _float(0)
        )
        x.append(arith.negf(_dot(block.row(i, i), x, unit)))
      utils.warp_barrier()
      for i in range(16):
        block.at(_integer(0), column).store(i, x[i])
    utils.warpgroup_barrier()
    for size in (16, 32):
      # Threads in groups, one per pair of blocks; in a group, each has a column and some rows.
      group = 128 * size // 32
      within = arith.remui(thread, _integer(group))
      first = arith.muli(arith.divui(thread, _integer(group)), _integer(2 * size))
      column = arith.remui(within, _integer(size))
      share = size * size // group
      start = arith.muli(arith.divui(within, _integer(size)), _integer(share))
      second = arith.addi(first, _integer(size))
      upper = memory.at(first, arith.addi(first, column))  # a column of the first inverse
      corner = memory.at(arith.addi(second, start), first)  # rows of A below it
      spare = memory.at(first, arith.addi(second, column))  # above the diagonal
      lower = memory.at(arith.addi(second, start), second)  # rows of the second inverse
      values = [upper.load(j) for j in range(size)]
      for i in range(share):
        spare.at(start, _integer(0)).store(i, _dot(corner.row(i, size), values))
      utils.warpgroup_barrier()
      values = [spare.load(j) for j in range(size)]
      for i in range(share):
        corner.at(_integer(0), column).store(i, arith.negf(_dot(lower.row(i, size), values)))
      utils.warpgroup_barrier()
      for i in range(share):
        spare.at(start, _integer(0)).store(i, _float(0))
      utils.warpgroup_barrier()

  invert(matrix)


class _Memory:
  """A place in a float32 matrix in shared memory, and loads and stores around it."""

  def __init__(self, ref=None, pointer=None):
    self.pointer = utils.memref_ptr(ref) if pointer is None else pointer

  def at(self, row, column):
    offset = arith.addi(arith.muli(row, _integer(STRIDE)), column)
    return _Memory(pointer=utils.getelementptr(self.pointer, [offset], ir.F32Type.get()))

  def _address(self, row, column=0):
    return utils.getelementptr(self.pointer, [row * STRIDE + column], ir.F32Type.get())

  def row(self, i, count):
    """The first numbers of a row, loaded four by four."""
    numbers = []
    for j in range(0, count, 4):
      four = llvm.load(ir.VectorType.get((4,), ir.F32Type.get()), self._address(i, j))
      numbers += [llvm.extractelement(four, _integer(n)) for n in range(4)]
    return numbers[:count]

  def load(self, row):
    return llvm.load(ir.F32Type.get(), self._address(row))

  def store(self, row, value):
    llvm.store(value, self._address(row))


def _dot(left, right, start=None):
  total = _float(0) if start is None else start
  for a, b in zip(left, right):
    total = llvm.inline_asm(
      ir.F32Type.get(), [a, b, total], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"
    )
  return total


def _integer(value):
  return utils.c(value, ir.IntegerType.get_signless(32))


def _float(value):
  return utils.c(float(value), ir.F32Type.get())
