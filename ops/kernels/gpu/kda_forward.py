"""The scan over chunks of the delta rule with a decay per row of the state.

With q~, k~, k^, carry, A and T of `kda_operands.py`, and S the state before the chunk,

  R  = V - k~ S           V' = T R
  O  = q~ S + A V'        S' = diag(carry) S + k^^T V'

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
from ops.kernels.gpu.delta_rule_forward import load_transposed
from ops.kernels.gpu.kda_gates import CHUNK
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns

COLUMNS = 64  # of V per program
HANDED = 2  # chunks between the two warpgroups
STAGES = 2


def outputs(q, k, k_end, carry, scores, inverses, v, state, save=False, interpret=None):
  """Outputs [B T H V], the final state [B H V K], and with `save` bfloat16 [B H N V K] and
  [B H N V C]: the state before each chunk, and V', transposed.

  Args:
    q, k, k_end: q~, k~ and k^, bfloat16 [B H T K], T a multiple of the chunk.
    carry: float32 [B H N K].
    scores, inverses: [B H N C C] and [B H N n C C] like `q`, A, and T as a sum of n terms.
    v: [B T H V] like `q`.
    state: float32 [B H V K].
  """
  (B, T, H, V), K, C = v.shape, q.shape[-1], CHUNK
  dtype, simulated = q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(STAGES, chunks), inverses.shape[3]

  def kernel(*hbm):
    *inputs_hbm, v_hbm, before_hbm, o_hbm, final_hbm = hbm[:10]
    saved_hbm = hbm[10:]
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)

    def run(q_s, k_s, end_s, carry_s, scores_s, inverse_s, v_s, state_s, written_s, *rest):
      o_s, left_s, full, consumed, state_ready, written_ready, taken = rest

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      def fetch(n, slot):
        rows = pl.ds(n * C, C)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, full.at[slot])
        for source, target in zip(inputs_hbm[:3], (q_s, k_s, end_s)):
          copy(source.at[batch, head, rows], target.at[slot])
        for source, target in zip(inputs_hbm[3:5], (carry_s, scores_s)):
          copy(source.at[batch, head, n], target.at[slot])
        for term in range(terms):
          copy(inputs_hbm[5].at[batch, head, n, term], inverse_s.at[slot, term])
        copy(v_hbm.at[batch, rows, head, part], v_s.at[slot])

      def write(wait, release):
        # What does not wait for the state is done while the tensor cores work.
        def step(n, state):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          narrow = state.astype(dtype)

          def while_reading():
            pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))
            state_s[hand] = narrow
            plgpu.commit_smem()
            plgpu.barrier_arrive(state_ready.at[hand])
            return load_transposed(v_s.at[slot], simulated)

          read, values = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), k_s.at[slot].transpose((1, 0)), while_reading
          )
          residual = left(1, (values - read).astype(dtype))

          def while_solving():
            carry = plgpu.load(carry_s.at[slot], layout=WGMMA.reduce(0))
            return state * along_columns(carry, COLUMNS)

          systems = [(residual, inverse_s.at[slot, n].transpose((1, 0))) for n in range(terms)]
          written, kept = mosaic.products_and((COLUMNS, C), systems, while_solving)
          written = written.astype(dtype)

          def while_writing():
            written_s[hand] = written
            plgpu.commit_smem()
            plgpu.barrier_arrive(written_ready.at[hand])

          state, _ = mosaic.accumulate_and(
            simulated, kept, [(left(2, written), end_s.at[slot])], while_writing
          )
          release(slot)
          return state

        start = plgpu.load(before_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        final_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        for n in range(max(chunks - HANDED, 0), chunks):
          plgpu.barrier_wait(taken.at[n % HANDED])

      def read(wait, release):
        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          plgpu.barrier_wait(state_ready.at[hand])
          across = mosaic.product((C, COLUMNS), q_s.at[slot], state_s.at[hand].transpose((1, 0)))
          plgpu.barrier_wait(written_ready.at[hand])
          if save:
            for source, target in zip((state_s, written_s), saved_hbm):
              plgpu.copy_smem_to_gmem(source.at[hand], target.at[batch, head, n, part])
          inside = scores_s.at[slot], written_s.at[hand].transpose((1, 0))
          (o,) = mosaic.accumulate(simulated, (across, *inside))
          release(slot)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(taken.at[hand])
          o_s[...] = o.astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(o_s, o_hbm.at[batch, pl.ds(n * C, C), head, part])

        plgpu.wait_smem_to_gmem(0)

      def both(wait, release):
        thread = lax.axis_index("thread")
        pl.when(thread == 0)(lambda: write(wait, release))
        pl.when(thread == 1)(lambda: read(wait, release))

      mosaic.load_and_read(jnp.int32(chunks), stages, 2, fetch, both, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, K),
      plgpu.SMEM((stages, K), jnp.float32), tile(stages, C, C), tile(stages, terms, C, C),
      tile(stages, C, COLUMNS),
      tile(HANDED, COLUMNS, K), tile(HANDED, COLUMNS, C), tile(C, COLUMNS),
      tile(3, COLUMNS, K) if simulated else None,
      plgpu.Barrier(num_arrivals=6 + terms, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      *[plgpu.Barrier(num_arrivals=1, num_barriers=HANDED)] * 3,
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
  )(q, k, k_end, carry, scores, inverses, v, state)  # fmt: skip
