"""Gradients of the delta rule with one decay per head: the scan from the right.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates,
T and V' as in `delta_rule_forward.py`, A_ij = scale q_i . k_j exp(b_i - b_j) for i >= j:

  dV' = A^T dO + exp(b_C - b) (K dS')            dV  = T^T dV'
  dS  = exp(b_C) dS' + Q^T (scale exp(b) dO) - K^T (exp(b) dV)

  M_ij = scale dO_i . V'_j exp(b_i - b_j), i >= j         N_ij = -dV_i . V'_j exp(b_i - b_j), i > j
  dQ = scale exp(b) (dO S^T) + M K
  dK = N K - exp(b) (dV S^T)  +  M^T Q + N^T K + exp(b_C - b) (V' dS'^T)         rows  +  columns
  dbeta_i = k_i . columns_i / beta_i
  db_i    = q_i . dq_i + k_i . (rows - columns)_i
  dg_t    = sum_{i >= t} db_i + <S', dS'>         S' = exp(b_C) S + K^T (exp(b_C - b) V')
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_forward import CHUNK, COLUMNS, HANDED
from ops.kernels.gpu.delta_rule_gates import FROM_START, TO_END, pairs, written_only
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows


def state_gradients(
  q, k, do, gates, inverses, dstate, scale: float, stages: int = 3, interpret=None
):
  """dv [B T H V], the gradient of the initial state, float32 [B H V K], and in the dtype of q
  [B H N V K] the gradients of the state after each chunk.

  Args:
    q, k, do: [B T Hq K], [B T H V], T a multiple of two chunks.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    inverses: [B H N n C C] like `q`, T as a sum of n terms.
    dstate: float32 [B H V K], the gradient of the final state.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(stages, chunks), inverses.shape[3]

  def kernel(q_hbm, k_hbm, do_hbm, gates_hbm, inverses_hbm, last_hbm, *outputs_hbm):
    dv_hbm, first_hbm, after_hbm = outputs_hbm
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    key_head = lax.div(head, jnp.int32(H // Hq))
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)
    chunk = lambda n: chunks - 1 - n

    def run(
      q_s,
      k_s,
      do_s,
      inverse_s,
      scores_s,
      weighted_s,
      state_s,
      left_s,
      gates_s,
      *barriers,
    ):
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
          (inverses_hbm.at[batch, head, chunk(n)], inverse_s),
        ):  # fmt: skip
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

      def solve(written, kept, slot, hand, share):
        """dV^T = dV'^T T, shared as soon as it is there, and the gradient of the state before."""
        systems = [inverse_s.at[slot, n] for n in range(terms)]
        from_outputs = weighted_s.at[hand].transpose((1, 0)), q_s.at[slot]
        from_start = plgpu.load(gates_s.at[slot, FROM_START], layout=WGMMA.reduce(0))
        from_start = written_only(gates_s.at[slot], from_start, 0)
        weigh = lambda dv, x: (-dv * along_columns(x, COLUMNS)).astype(dtype)
        if simulated:
          dv = mosaic.products((COLUMNS, C), [(left(1, written), x) for x in systems])
          share(dv)
          terms_of_state = [
            from_outputs,
            (left(2, weigh(dv, from_start)), k_s.at[slot]),
          ]
          return mosaic.accumulate_and(simulated, kept, terms_of_state, lambda: None)[0]

        def body(solved, state):
          for system in systems:
            plgpu.wgmma(solved, written, system)
          state[...] = kept
          plgpu.wgmma(state, *from_outputs)
          dv = plgpu.wgmma_accumulator_load(solved, wait_n=1)
          plgpu.wgmma(state, weigh(dv, from_start), k_s.at[slot])
          share(dv)
          return state[...]

        accumulator = lambda width: plgpu.ACC((COLUMNS, width), jnp.float32)
        return pl.run_scoped(body, accumulator(C), accumulator(K))

      def carry(wait, release):
        # What does not wait for the state's gradient is done while the tensor cores work.
        def step(n, hand, state):
          slot = wait(n)
          narrow = state.astype(dtype)

          def while_reading():
            plgpu.barrier_wait(ready.at[hand])
            return mosaic.product_and(
              (COLUMNS, C),
              do_s.at[slot].transpose((1, 0)),
              scores_s.at[hand],
              while_both_read,
            )

          def while_both_read():
            # dV has left from the place of the dO before.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            last = lax.rem(n + stages - 1, jnp.int32(stages))
            plgpu.barrier_arrive(consumed.at[last], predicate=n > 0)
            state_s[...] = narrow
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s, after_hbm.at[batch, head, chunk(n), part])
            to_end = plgpu.load(gates_s.at[slot, TO_END], layout=WGMMA.reduce(0))
            return to_end, state * gates_s[slot, FROM_START, C - 1]

          across, (inside, (to_end, kept)) = mosaic.product_and(
            (COLUMNS, C),
            left(0, narrow),
            k_s.at[slot].transpose((1, 0)),
            while_reading,
          )
          written = (across * along_columns(to_end, COLUMNS) + inside).astype(dtype)

          def share(dv):
            dv = dv * along_columns(written_only(gates_s.at[slot], 1.0, 0), COLUMNS)
            store_transposed(do_s.at[slot], dv.astype(dtype), simulated)
            plgpu.commit_smem()
            rows = pl.ds(chunk(n) * C, C)
            plgpu.copy_smem_to_gmem(do_s.at[slot], dv_hbm.at[batch, rows, head, part])

          state = solve(written, kept, slot, hand, share)
          plgpu.barrier_arrive(taken.at[hand])
          return state

        def steps(m, state):
          # No branch comes between the start and the end of a product.
          for hand in range(HANDED):
            state = step(m * HANDED + hand, hand, state)
          return state

        start = plgpu.load(last_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        first_hbm[batch, head, part] = lax.fori_loop(0, chunks // HANDED, steps, start)
        plgpu.wait_smem_to_gmem(0)
        release((chunks - 1) % stages)

      def score(wait, release):
        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))

          def meanwhile():
            row = plgpu.load(gates_s.at[slot, FROM_START], layout=WGMMA.reduce(1)) * scale
            do = plgpu.load(do_s.at[slot], layout=WGMMA).astype(jnp.float32)
            weighted_s[hand] = (do * along_rows(row, COLUMNS)).astype(dtype)
            return pairs(gates_s.at[slot], True, scale)

          scores, decays = mosaic.product_and(
            (C, C), q_s.at[slot], k_s.at[slot].transpose((1, 0)), meanwhile
          )
          release(slot)
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
    barriers = lambda n, arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, COLUMNS), tile(stages, terms, C, C),
      tile(HANDED, C, C), tile(HANDED, C, COLUMNS), tile(COLUMNS, K),
      tile(3, COLUMNS, K) if simulated else None,
      plgpu.SMEM((stages, *gates.shape[3:]), jnp.float32),
      barriers(stages, 5), barriers(stages, 2), barriers(HANDED, 1), barriers(HANDED, 1),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  return plgpu.kernel(
    kernel,
    out_type=[
      struct(do.shape, dtype), struct((B, H, V, K), jnp.float32),
      struct((B, H, chunks, V, K), dtype),
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
