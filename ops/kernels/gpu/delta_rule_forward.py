"""Forward kernels of the delta rule with one decay per head.

With b the sum of gates from a chunk's start, up to its last C, S the state before the chunk, and
T = (I + diag(beta) P)^-1 diag(beta), P_ij = k_i . k_j exp(b_i - b_j) for i > j,

  R  = V - exp(b) (K S)            V' = T R
  O  = exp(b) (Q S) + A V'         A_ij = q_i . k_j exp(b_i - b_j), i >= j
  S' = exp(b_C) S + K^T (exp(b_C - b) V')

A program is 64 columns of V of one head. One warpgroup carries the state, transposed, so that each
product is the left operand of the next without leaving the registers; it hands S and V' of each
chunk to one of two others in turn, which make the outputs; a fourth loads.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_gates import FROM_START, TO_END, pairs, written_only
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.scalar_decay import CHUNK

COLUMNS = 64  # of V per program
HANDED = 2  # chunks for which the state is kept, each with a warpgroup that reads it
REGISTERS = 128  # of each thread where there are four warpgroups, before they share them anew


def outputs(
  q, k, v, gates, inverses, state, scale: float, stages: int = 3, save=False, interpret=None
):
  """Outputs [B T H V], the final state [B H V K], and with `save` bfloat16 [B H N V K] and
  [B H N V C]: the state before each chunk, and V', transposed.

  Args:
    q, k, v: [B T Hq K], [B T H V], T a multiple of two chunks.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    inverses: [B H N n C C] like `q`, T as a sum of n terms.
    state: float32 [B H V K].
  """
  (B, T, H, V), (Hq, K) = v.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(stages, chunks), inverses.shape[3]

  def kernel(q_hbm, k_hbm, v_hbm, gates_hbm, inverses_hbm, before_hbm, *outputs_hbm):
    o_hbm, final_hbm, *saved_hbm = outputs_hbm
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    key_head = lax.div(head, jnp.int32(H // Hq))
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)

    def run(q_s, k_s, v_s, inverse_s, state_s, written_s, left_s, gates_s, *barriers):
      full, consumed, state_ready, written_ready, taken = barriers

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
          (k_hbm.at[batch, rows, key_head], k_s), (v_hbm.at[batch, rows, head, part], v_s),
          (gates_hbm.at[batch, head, n], gates_s), (q_hbm.at[batch, rows, key_head], q_s),
          (inverses_hbm.at[batch, head, n], inverse_s),
        ):  # fmt: skip
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

      def carry(wait, release):
        # What does not wait for the state is done while the tensor cores work.
        def step(n, hand, state):
          slot = wait(n)
          column = lambda row: plgpu.load(gates_s.at[slot, row], layout=WGMMA.reduce(0))
          along = lambda x: along_columns(x, COLUMNS)
          narrow = state.astype(dtype)
          read, (values, from_start) = mosaic.product_and(
            (COLUMNS, C),
            left(0, narrow),
            k_s.at[slot].transpose((1, 0)),
            lambda: (
              load_transposed(v_s.at[slot], simulated),
              column(FROM_START),
            ),
          )
          residual = left(1, (values - read * along(from_start)).astype(dtype))

          def while_solving():
            plgpu.barrier_wait(taken.at[hand])
            state_s[hand] = narrow
            plgpu.commit_smem()
            plgpu.barrier_arrive(state_ready.at[hand])
            to_end = written_only(gates_s.at[slot], column(TO_END), 0)
            return state * gates_s[slot, FROM_START, C - 1], to_end

          written, (kept, to_end) = mosaic.products_and(
            (COLUMNS, C),
            [(residual, inverse_s.at[slot, n].transpose((1, 0))) for n in range(terms)],
            while_solving,
          )

          def while_writing():
            written_s[hand] = written.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(written_ready.at[hand])

          weighted = left(2, (written * along(to_end)).astype(dtype))
          state, _ = mosaic.accumulate_and(
            simulated, kept, [(weighted, k_s.at[slot])], while_writing
          )
          release(slot)
          return state

        def steps(m, state):
          # No branch comes between the start and the end of a product.
          for hand in range(HANDED):
            state = step(m * HANDED + hand, hand, state)
          return state

        start = plgpu.load(before_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        final_hbm[batch, head, part] = lax.fori_loop(0, chunks // HANDED, steps, start)
        for hand in range(HANDED):
          plgpu.barrier_wait(taken.at[hand])

      def read(hand, wait, release):
        plgpu.barrier_arrive(taken.at[hand])

        @pl.loop(jnp.int32(0), jnp.int32(chunks // HANDED))
        def _(m):
          # Every buffer is waited for: a barrier's phases cannot be left out.
          for n in range(HANDED):
            slot = wait(m * HANDED + n)
            if n == hand:
              make_outputs(m * HANDED + n, slot, hand)
            release(slot)

        plgpu.wait_smem_to_gmem(0)

      def make_outputs(n, slot, hand):
        def meanwhile():
          row = plgpu.load(gates_s.at[slot, FROM_START], layout=WGMMA.reduce(1))
          return row * scale, pairs(gates_s.at[slot], True, scale)

        scores, (from_start, decays) = mosaic.product_and(
          (C, C), q_s.at[slot], k_s.at[slot].transpose((1, 0)), meanwhile
        )
        scores = (scores * decays).astype(dtype)
        plgpu.barrier_wait(state_ready.at[hand])
        across = mosaic.product((C, COLUMNS), q_s.at[slot], state_s.at[hand].transpose((1, 0)))
        across = across * along_rows(from_start, COLUMNS)
        plgpu.barrier_wait(written_ready.at[hand])
        if save:
          for source, target in zip((state_s, written_s), saved_hbm):
            plgpu.copy_smem_to_gmem(source.at[hand], target.at[batch, head, n, part])
        inside = left(4 + hand, scores), written_s.at[hand].transpose((1, 0))
        (o,) = mosaic.accumulate(simulated, (across, *inside))
        if save:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(taken.at[hand])
        # The outputs take the place of the values.
        v_s[slot] = o.astype(dtype)
        plgpu.commit_smem()
        target = o_hbm.at[batch, pl.ds(n * C, C), head, part]
        plgpu.copy_smem_to_gmem(v_s.at[slot], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

      def work(wait, release):
        def run_role(role, registers):
          if not simulated:
            action = "increase" if registers > REGISTERS else "decrease"
            plgpu.set_max_registers(registers, action=action)
          role(wait, release)

        readers = [(functools.partial(read, n), 120) for n in range(HANDED)]
        for n, role in enumerate([(carry, 216), *readers]):
          pl.when(lax.axis_index("thread") == n)(functools.partial(run_role, *role))

      mosaic.load_and_read(
        jnp.int32(chunks), stages, 1 + HANDED, fetch, work, full, consumed, simulated,
        share_registers=False,
      )  # fmt: skip

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    barriers = lambda n, arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, COLUMNS), tile(stages, terms, C, C),
      tile(HANDED, COLUMNS, K), tile(HANDED, COLUMNS, C),
      tile(4 + HANDED, COLUMNS, K) if simulated else None,
      plgpu.SMEM((stages, *gates.shape[3:]), jnp.float32),
      barriers(stages, 5), barriers(stages, 1 + HANDED), *[barriers(HANDED, 1)] * 3,
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
    num_threads=2 + HANDED,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.BARE,
  )(q, k, v, gates, inverses, state)  # fmt: skip


def load_transposed(ref, simulated: bool) -> jax.Array:
  """float32 [N M] of a bfloat16 tile [M N]."""
  if simulated:
    return ref[...].T.astype(jnp.float32)
  x = plgpu.load(ref.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
  return x.astype(jnp.float32)
