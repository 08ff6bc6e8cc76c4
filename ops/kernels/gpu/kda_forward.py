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

from ops.kernels.gpu import kda_rings, mosaic
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
    q_hbm, k_hbm, end_hbm, carry_hbm, scores_hbm, inverses_hbm, v_hbm, before_hbm, *hbm = hbm
    o_hbm, final_hbm, *saved_hbm = hbm
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)

    def run(q_s, k_s, end_s, carry_s, scores_s, inverse_s, v_s, state_s, written_s, *rest):
      o_s, left_s, *rest = rest
      *barriers, state_ready, written_ready, taken = rest

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      chunk = lambda source, n: source.at[batch, head, n]
      tokens = lambda source, n: source.at[batch, head, pl.ds(n * C, C)]
      copy = plgpu.copy_gmem_to_smem

      def fetch_keys(n, slot, full):
        copy(tokens(k_hbm, n), k_s.at[slot], full)
        copy(chunk(carry_hbm, n), carry_s.at[slot], full)
        copy(v_hbm.at[batch, pl.ds(n * C, C), head, part], v_s.at[slot], full)

      def fetch_systems(n, slot, full):
        for term in range(terms):
          copy(inverses_hbm.at[batch, head, n, term], inverse_s.at[slot, term], full)

      def fetch_ends(n, slot, full):
        copy(tokens(end_hbm, n), end_s.at[slot], full)

      def fetch_scores(n, slot, full):
        copy(tokens(q_hbm, n), q_s.at[slot], full)
        copy(chunk(scores_hbm, n), scores_s.at[slot], full)

      fetches = fetch_keys, fetch_systems, fetch_ends, fetch_scores
      rings = [
        kda_rings.Ring(stages, fetch, *barriers[2 * i : 2 * i + 2])
        for i, fetch in enumerate(fetches)
      ]
      keys, systems, ends, scores = rings

      def write():
        # What does not wait for the state is done while the tensor cores work.
        def step(n, state):
          slot, hand = keys.wait(n), lax.rem(n, jnp.int32(HANDED))
          narrow = state.astype(dtype)

          def while_reading():
            pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))
            state_s[hand] = narrow
            plgpu.commit_smem()
            plgpu.barrier_arrive(state_ready.at[hand])
            carry = plgpu.load(carry_s.at[slot], layout=WGMMA.reduce(0))
            return load_transposed(v_s.at[slot], simulated), carry

          read, (values, carry) = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), k_s.at[slot].transpose((1, 0)), while_reading
          )
          keys.release(slot)
          residual = left(1, (values - read).astype(dtype))
          systems.wait(n)
          written, kept = mosaic.products_and(
            (COLUMNS, C),
            [(residual, inverse_s.at[slot, n].transpose((1, 0))) for n in range(terms)],
            lambda: state * along_columns(carry, COLUMNS),
          )
          systems.release(slot)
          written = written.astype(dtype)

          def while_writing():
            written_s[hand] = written
            plgpu.commit_smem()
            plgpu.barrier_arrive(written_ready.at[hand])

          ends.wait(n)
          state, _ = mosaic.accumulate_and(
            simulated, kept, [(left(2, written), end_s.at[slot])], while_writing
          )
          ends.release(slot)
          return state

        start = plgpu.load(before_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        final_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        for n in range(max(chunks - HANDED, 0), chunks):
          plgpu.barrier_wait(taken.at[n % HANDED])

      def read():
        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = scores.wait(n), lax.rem(n, jnp.int32(HANDED))
          plgpu.barrier_wait(state_ready.at[hand])
          across = mosaic.product((C, COLUMNS), q_s.at[slot], state_s.at[hand].transpose((1, 0)))
          plgpu.barrier_wait(written_ready.at[hand])
          if save:
            for source, target in zip((state_s, written_s), saved_hbm):
              plgpu.copy_smem_to_gmem(source.at[hand], target.at[batch, head, n, part])
          inside = scores_s.at[slot], written_s.at[hand].transpose((1, 0))
          (o,) = mosaic.accumulate(simulated, (across, *inside))
          scores.release(slot)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(taken.at[hand])
          o_s[...] = o.astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(o_s, o_hbm.at[batch, pl.ds(n * C, C), head, part])

        plgpu.wait_smem_to_gmem(0)

      kda_rings.run(chunks, rings, [write, read], simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, K),
      plgpu.SMEM((stages, K), jnp.float32), tile(stages, C, C), tile(stages, terms, C, C),
      tile(stages, C, COLUMNS),
      tile(HANDED, COLUMNS, K), tile(HANDED, COLUMNS, C), tile(C, COLUMNS),
      tile(3, COLUMNS, K) if simulated else None,
      *[barrier for copies in (3, terms, 1, 2) for barrier in kda_rings.barriers(stages, copies)],
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
