"""Gradients of the delta rule with one decay per head: the scan from the right.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates,
T and V' as in `delta_rule_forward.py`, A_ij = scale q_i . k_j exp(b_i - b_j) for i >= j:

  dV' = A^T dO + exp(b_C - b) (K dS')            dV  = T^T dV'
  dS  = exp(b_C) dS' + Q^T (scale exp(b) dO) - K^T (exp(b) dV)

  M_ij = scale dO_i . V'_j exp(b_i - b_j), i >= j         N_ij = -dV_i . V'_j exp(b_i - b_j), i > j
  dQ = scale exp(b) (dO S^T) + M K
  dK = N K - exp(b) (dV S^T)  +  M^T Q + N^T K + exp(b_C - b) (V' dS'^T)         rows  +  columns
  dbeta_i = V'_i . dV_i / beta_i^2
  db_i    = q_i . dq_i + k_i . (rows - columns)_i
  dg_t    = sum_{i >= t} db_i + <S', dS'>         S' = exp(b_C) S + K^T (exp(b_C - b) V')
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_forward import CHUNK, COLUMNS, HANDED, load_transposed
from ops.kernels.gpu.delta_rule_gates import EVERY, FROM_START, TO_END, pairs
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns


def state_gradients(
  q, k, do, gates, inverses, dstate, scale: float, stages: int = 2, interpret=None
):
  """dv [B T H V], the gradient of the initial state, float32 [B H V K], and in the dtype of q
  [B H N/2 V K] the gradients of the state after each pair of chunks.

  Args:
    q, k, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    inverses: [B H N n C C] like `q`, T as a sum of n terms.
    dstate: float32 [B H V K], the gradient of the final state.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(stages, chunks), inverses.shape[3]

  def kernel(q_hbm, k_hbm, do_hbm, gates_hbm, inverses_hbm, last_hbm, dv_hbm, first_hbm, after_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    key_head = lax.div(head, jnp.int32(H // Hq))
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)
    chunk = lambda n: chunks - 1 - n

    def run(q_s, k_s, do_s, inverse_s, scores_s, state_s, dv_s, left_s, gates_s, *barriers):
      full, consumed, ready, taken = barriers

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      def fetch(n, slot):
        rows = pl.ds(chunk(n) * C, C)
        for source, target in (
          (k_hbm.at[batch, rows, key_head], k_s), (q_hbm.at[batch, rows, key_head], q_s),
          (do_hbm.at[batch, rows, head, part], do_s),
          (gates_hbm.at[batch, head, chunk(n)], gates_s),
        ):  # fmt: skip
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
        for term in range(terms):
          source = inverses_hbm.at[batch, head, chunk(n), term]
          plgpu.copy_gmem_to_smem(source, inverse_s.at[slot, term], full.at[slot])

      def solve(written, kept, from_start, weighted, slot, share):
        """dV^T = dV'^T T, shared as soon as it is there, and the gradient of the state before."""
        weigh = lambda dv: (-dv * along_columns(from_start, COLUMNS)).astype(dtype)
        systems = [inverse_s.at[slot, n] for n in range(terms)]
        if simulated:
          dv = mosaic.products((COLUMNS, C), [(left(2, written), x) for x in systems])
          share(dv)
          state = kept + mosaic.product((COLUMNS, K), left(3, weighted), q_s.at[slot])
          return state + mosaic.product((COLUMNS, K), left(4, weigh(dv)), k_s.at[slot])

        def body(solved, state):
          for system in systems:
            plgpu.wgmma(solved, written, system)
          state[...] = kept
          plgpu.wgmma(state, weighted, q_s.at[slot])
          dv = plgpu.wgmma_accumulator_load(solved, wait_n=1)
          plgpu.wgmma(state, weigh(dv), k_s.at[slot])
          share(dv)
          return state[...]

        accumulator = lambda width: plgpu.ACC((COLUMNS, width), jnp.float32)
        return pl.run_scoped(body, accumulator(C), accumulator(K))

      def carry(wait, release):
        # What does not wait for the state's gradient is done while the tensor cores work.
        def step(n, state):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          column = lambda row: plgpu.load(gates_s.at[slot, row], layout=WGMMA.reduce(0))
          along = lambda x: along_columns(x, COLUMNS)
          narrow = state.astype(dtype)

          def while_reading():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(lax.rem(n, jnp.int32(EVERY)) == 0)
            def _():
              state_s[...] = narrow
              plgpu.commit_smem()
              target = after_hbm.at[batch, head, lax.div(chunk(n), jnp.int32(EVERY)), part]
              plgpu.copy_smem_to_gmem(state_s, target)

            values, from_start = load_transposed(do_s.at[slot], simulated), column(FROM_START)
            weighted = (values * along(from_start * scale)).astype(dtype)
            plgpu.barrier_wait(ready.at[hand])
            inside, (to_end, kept) = mosaic.product_and(
              (COLUMNS, C),
              left(1, values.astype(dtype)),
              scores_s.at[hand],
              lambda: (column(TO_END), state * gates_s[slot, FROM_START, C - 1]),
            )
            plgpu.barrier_arrive(taken.at[hand])
            return inside, to_end, kept, from_start, weighted

          across, (inside, to_end, kept, from_start, weighted) = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), k_s.at[slot].transpose((1, 0)), while_reading
          )
          written = (across * along(to_end) + inside).astype(dtype)

          def share(dv):
            store_transposed(dv_s, dv.astype(dtype), simulated)
            plgpu.commit_smem()
            rows = pl.ds(chunk(n) * C, C)
            plgpu.copy_smem_to_gmem(dv_s, dv_hbm.at[batch, rows, head, part])

          state = solve(written, kept, from_start, weighted, slot, share)
          release(slot)
          return state

        start = plgpu.load(last_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        first_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        plgpu.wait_smem_to_gmem(0)

      def score(wait, release):
        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          scores, decays = mosaic.product_and(
            (C, C),
            q_s.at[slot],
            k_s.at[slot].transpose((1, 0)),
            lambda: pairs(gates_s.at[slot], diagonal=True) * scale,
          )
          release(slot)
          pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))
          scores_s[hand] = (scores * decays).astype(dtype)
          plgpu.commit_smem()
          plgpu.barrier_arrive(ready.at[hand])

        for n in range(max(chunks - HANDED, 0), chunks):
          plgpu.barrier_wait(taken.at[n % HANDED])

      def both(wait, release):
        thread = lax.axis_index("thread")
        pl.when(thread == 0)(lambda: carry(wait, release))
        pl.when(thread == 1)(lambda: score(wait, release))

      mosaic.load_and_read(jnp.int32(chunks), stages, 2, fetch, both, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, COLUMNS), tile(stages, terms, C, C),
      tile(HANDED, C, C), tile(COLUMNS, K), tile(C, COLUMNS),
      tile(5, COLUMNS, K) if simulated else None,
      plgpu.SMEM((stages, *gates.shape[3:]), jnp.float32),
      plgpu.Barrier(num_arrivals=4 + terms, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  return plgpu.kernel(
    kernel,
    out_type=[
      struct(do.shape, dtype), struct((B, H, V, K), jnp.float32),
      struct((B, H, chunks // EVERY, V, K), dtype),
    ],
    grid=(V // COLUMNS, H, B),
    grid_names=("block", "head", "batch"),
    num_threads=3,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, do, gates, inverses, dstate)  # fmt: skip


def store_transposed(ref, x, simulated: bool):
  """A bfloat16 tile [M N] from x [N M]."""
  if simulated:
    ref[...] = x.T
  else:
    ref.transpose((1, 0))[...] = x
