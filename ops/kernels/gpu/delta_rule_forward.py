"""Forward kernels of the delta rule with one decay per head.

With b the sum of gates from a chunk's start, up to its last C, S the state before the chunk, and
T = (I + diag(beta) P)^-1 diag(beta), P_ij = k_i . k_j exp(b_i - b_j) for i > j,

  R  = V - exp(b) (K S)            V' = T R
  O  = exp(b) (Q S) + A V'         A_ij = q_i . k_j exp(b_i - b_j), i >= j
  S' = exp(b_C) S + K^T (exp(b_C - b) V')

A program is 64 columns of V of one head. One warpgroup carries the state, transposed, so that each
product is the left operand of the next without leaving the registers; it hands S and V' of each
chunk to a second one, which makes the outputs; a third loads.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows

CHUNK = 64  # tokens: the rows of one wgmma
COLUMNS = 64  # of V per program
HANDED = 2  # chunks between the two warpgroups


def outputs(
  q, k, v, sums, inverses, state, scale: float, stages: int = 3, save=False, interpret=None
):
  """Outputs [B T H V], the final state [B H V K], and with `save` bfloat16 [B H N V K] and
  [B H N V C]: the state before each chunk, and V', transposed.

  Args:
    q, k, v: [B T H K], [B T H V], T a multiple of the chunk.
    sums: float32 [B H T], the gates summed within each chunk.
    inverses: [B H N n C C] like `q`, T as a sum of n terms.
    state: float32 [B H V K].
  """
  B, T, H, K = q.shape
  V, C, dtype, simulated = v.shape[-1], CHUNK, q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(stages, chunks), inverses.shape[3]

  def kernel(q_hbm, k_hbm, v_hbm, sums_hbm, inverses_hbm, before_hbm, o_hbm, final_hbm, *saved_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)

    def run(q_s, k_s, v_s, inverse_s, sums_s, state_s, written_s, o_s, left_s, *barriers):
      full, consumed, ready, taken = barriers

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      def fetch(n, slot):
        rows = pl.ds(n * C, C)
        for source, target in (
          (q_hbm.at[batch, rows, head], q_s), (k_hbm.at[batch, rows, head], k_s),
          (v_hbm.at[batch, rows, head, part], v_s), (sums_hbm.at[batch, head, rows], sums_s),
        ):  # fmt: skip
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
        for term in range(terms):
          source = inverses_hbm.at[batch, head, n, term]
          plgpu.copy_gmem_to_smem(source, inverse_s.at[slot, term], full.at[slot])

      def carry(wait, release):
        def step(n, state):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))
          narrow = state.astype(dtype)
          state_s[hand] = narrow

          def meanwhile():
            column = plgpu.load(sums_s.at[slot], layout=WGMMA.reduce(0))
            end = sums_s[slot, C - 1]
            values = load_transposed(v_s.at[slot], simulated)
            return values, jnp.exp(column), jnp.exp(end - column), jnp.exp(end)

          read, (values, from_start, to_end, across) = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), k_s.at[slot].transpose((1, 0)), meanwhile
          )
          residual = (values - read * along_columns(from_start, COLUMNS)).astype(dtype)
          residual = left(1, residual)
          written = mosaic.products(
            (COLUMNS, C),
            [(residual, inverse_s.at[slot, n].transpose((1, 0))) for n in range(terms)],
          )
          weighted = (written * along_columns(to_end, COLUMNS)).astype(dtype)
          written_s[hand] = written.astype(dtype)
          plgpu.commit_smem()
          plgpu.barrier_arrive(ready.at[hand])
          (state,) = mosaic.accumulate(simulated, (state * across, left(2, weighted), k_s.at[slot]))
          release(slot)
          return state

        start = plgpu.load(before_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        final_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        for n in range(max(chunks - HANDED, 0), chunks):
          plgpu.barrier_wait(taken.at[n % HANDED])

      def read(wait, release):
        i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=WGMMA)
        j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=WGMMA)

        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))

          def meanwhile():
            row = plgpu.load(sums_s.at[slot], layout=WGMMA.reduce(1))
            column = plgpu.load(sums_s.at[slot], layout=WGMMA.reduce(0))
            # Above the diagonal the exponent is positive: replaced before anything is infinite.
            exponent = jnp.where(i >= j, along_rows(row, C) - along_columns(column, C), -jnp.inf)
            return jnp.exp(row) * scale, jnp.exp(exponent) * scale

          scores, (from_start, decays) = mosaic.product_and(
            (C, C), q_s.at[slot], k_s.at[slot].transpose((1, 0)), meanwhile
          )
          scores = (scores * decays).astype(dtype)
          plgpu.barrier_wait(ready.at[hand])
          if save:
            for source, target in zip((state_s, written_s), saved_hbm):
              plgpu.copy_smem_to_gmem(source.at[hand], target.at[batch, head, n, part])
          across, inside = mosaic.accumulate(
            simulated,
            (mosaic.zeros(C, COLUMNS), q_s.at[slot], state_s.at[hand].transpose((1, 0))),
            (mosaic.zeros(C, COLUMNS), left(3, scores), written_s.at[hand].transpose((1, 0))),
          )
          release(slot)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(taken.at[hand])
          o_s[...] = (across * along_rows(from_start, COLUMNS) + inside).astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(o_s, o_hbm.at[batch, pl.ds(n * C, C), head, part])

        plgpu.wait_smem_to_gmem(0)

      def both(wait, release):
        thread = lax.axis_index("thread")
        pl.when(thread == 0)(lambda: carry(wait, release))
        pl.when(thread == 1)(lambda: read(wait, release))

      mosaic.load_and_read(jnp.int32(chunks), stages, 2, fetch, both, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, COLUMNS), tile(stages, terms, C, C),
      plgpu.SMEM((stages, C), jnp.float32),
      tile(HANDED, COLUMNS, K), tile(HANDED, COLUMNS, C), tile(C, COLUMNS),
      tile(4, COLUMNS, K) if simulated else None,
      plgpu.Barrier(num_arrivals=4 + terms, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  saved = [struct((B, H, chunks, V, K), dtype), struct((B, H, chunks, V, C), dtype)]
  return plgpu.kernel(
    kernel,
    out_type=[
      struct(v.shape, v.dtype), struct((B, H, V, K), jnp.float32), *(saved if save else []),
    ],
    grid=(V // COLUMNS, H, B),
    grid_names=("block", "head", "batch"),
    num_threads=3,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, sums, inverses, state)  # fmt: skip


def load_transposed(ref, simulated: bool) -> jax.Array:
  """float32 [N M] of a bfloat16 tile [M N]."""
  if simulated:
    return ref[...].T.astype(jnp.float32)
  x = plgpu.load(ref.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
  return x.astype(jnp.float32)
