"""Gradients of the state, from the right, for the delta rule with a decay per row of the state.

With dS' the gradient of the state after a chunk and the operands of `kda_forward.py`:

  dV' = A^T dO + k^ dS'        dR = T^T dV' = dV
  dS  = diag(carry) dS' + q~^T dO - k~^T dR

A program is 64 columns of V of one head; what is carried is transposed, as there.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_backward import store_transposed
from ops.kernels.gpu.delta_rule_forward import load_transposed
from ops.kernels.gpu.kda_forward import COLUMNS, STAGES
from ops.kernels.gpu.kda_gates import CHUNK
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns


def state_gradients(q, k, k_end, carry, scores, inverses, do, dstate, interpret=None):
  """dv [B T H V], the gradient of the initial state, float32 [B H V K], and in the dtype of q
  [B H N V K] the gradients of the state after each chunk.

  Args:
    q, k, k_end: q~, k~ and k^, bfloat16 [B H T K], T a multiple of the chunk.
    carry: float32 [B H N K].
    scores, inverses: [B H N C C] and [B H N n C C] like `q`, A, and T as a sum of n terms.
    do: [B T H V] like `q`.
    dstate: float32 [B H V K], the gradient of the final state.
  """
  (B, T, H, V), K, C = do.shape, q.shape[-1], CHUNK
  dtype, simulated = q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(STAGES, chunks), inverses.shape[3]

  def kernel(*hbm):
    *inputs_hbm, do_hbm, last_hbm, dv_hbm, first_hbm, after_hbm = hbm
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)
    chunk = lambda n: chunks - 1 - n

    def run(q_s, k_s, end_s, carry_s, scores_s, inverse_s, do_s, state_s, dv_s, left_s, *barriers):
      full, consumed = barriers

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      def fetch(n, slot):
        n = chunk(n)
        rows = pl.ds(n * C, C)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, full.at[slot])
        for source, target in zip(inputs_hbm[:3], (q_s, k_s, end_s)):
          copy(source.at[batch, head, rows], target.at[slot])
        for source, target in zip(inputs_hbm[3:5], (carry_s, scores_s)):
          copy(source.at[batch, head, n], target.at[slot])
        for term in range(terms):
          copy(inputs_hbm[5].at[batch, head, n, term], inverse_s.at[slot, term])
        copy(do_hbm.at[batch, rows, head, part], do_s.at[slot])

      def solve(written, kept, values, slot, share):
        """dV^T = dV'^T T, shared as soon as it is there, and the gradient of the state before."""
        systems = [inverse_s.at[slot, n] for n in range(terms)]
        if simulated:
          dv = mosaic.products((COLUMNS, C), [(left(2, written), x) for x in systems])
          share(dv)
          back = left(3, (-dv).astype(dtype))
          return kept + mosaic.products(
            (COLUMNS, K), [(left(1, values), q_s.at[slot]), (back, k_s.at[slot])]
          )

        def body(solved, state):
          for system in systems:
            plgpu.wgmma(solved, written, system)
          state[...] = kept
          plgpu.wgmma(state, values, q_s.at[slot])
          dv = plgpu.wgmma_accumulator_load(solved, wait_n=1)
          plgpu.wgmma(state, (-dv).astype(dtype), k_s.at[slot])
          share(dv)
          return state[...]

        accumulator = lambda width: plgpu.ACC((COLUMNS, width), jnp.float32)
        return pl.run_scoped(body, accumulator(C), accumulator(K))

      def read(wait, release):
        # What does not wait for the state's gradient is done while the tensor cores work.
        def step(n, state):
          slot = wait(n)
          narrow = state.astype(dtype)

          def while_reading():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            state_s[...] = narrow
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s, after_hbm.at[batch, head, chunk(n), part])
            values = load_transposed(do_s.at[slot], simulated).astype(dtype)
            carry = plgpu.load(carry_s.at[slot], layout=WGMMA.reduce(0))
            kept = state * along_columns(carry, COLUMNS)
            inside = mosaic.product((COLUMNS, C), left(1, values), scores_s.at[slot])
            return inside, values, kept

          across, (inside, values, kept) = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), end_s.at[slot].transpose((1, 0)), while_reading
          )
          written = (across + inside).astype(dtype)

          def share(dv):
            store_transposed(dv_s, dv.astype(dtype), simulated)
            plgpu.commit_smem()
            rows = pl.ds(chunk(n) * C, C)
            plgpu.copy_smem_to_gmem(dv_s, dv_hbm.at[batch, rows, head, part])

          state = solve(written, kept, values, slot, share)
          release(slot)
          return state

        start = plgpu.load(last_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        first_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        plgpu.wait_smem_to_gmem(0)

      mosaic.load_and_read(jnp.int32(chunks), stages, 1, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, K),
      plgpu.SMEM((stages, K), jnp.float32), tile(stages, C, C), tile(stages, terms, C, C),
      tile(stages, C, COLUMNS),
      tile(COLUMNS, K), tile(C, COLUMNS), tile(4, COLUMNS, K) if simulated else None,
      plgpu.Barrier(num_arrivals=6 + terms, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1, num_barriers=stages),
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
    num_threads=2,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, k_end, carry, scores, inverses, do, dstate)  # fmt: skip
