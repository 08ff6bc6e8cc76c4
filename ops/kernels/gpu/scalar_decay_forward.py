"""Forward kernels of the matrix-state recurrence with one decay per head.

With b the sum of gates from a chunk's start, up to its last C, and S the state before the chunk,

  O  = exp(b) (Q S) + A V          A_ij = q_i . k_j exp(b_i - b_j), i >= j
  S' = exp(b_C) S + K^T (exp(b_C - b) V)

`boundary_states` computes S' alone over segments of many chunks, `outputs` both. A program is one
segment of one head: one warpgroup per 64 columns of V, and one that loads. Head h of V goes with
head h // (H / Hq) of Q and K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_rows
from ops.kernels.gpu.scalar_decay_gates import CHUNK, factors, pairs

COLUMNS = 64  # of V per warpgroup


class Tiling(NamedTuple):
  """How a forward kernel is laid out on the multiprocessors."""

  segments: int = 1  # pieces of the sequence, each a program
  stages: int = 2  # chunks in shared memory
  block_v: int = 128  # columns of V of a program, a multiple of 64


def boundary_states(
  x, y, gates, per_segment: int, tiling: Tiling, *, scale: float | None = None, interpret=None
):
  """What each segment of chunks adds to the state, or with a `scale` to the state's gradient, from
  the right.

    S <- exp(b_C) S + X^T (exp(b_C - b) Y)          dS <- exp(b_C) dS + scale X^T (exp(b) Y)

  Args:
    x, y: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T], sums from the start of each chunk.
    per_segment: chunks of a segment.
    tiling: its `segments` are those that are wanted.
    scale: None is the first segments from the left to the right, a number the last of them from
      the right to the left.

  Returns:
    float32 [B H S K V], for states that start from zero.
  """
  (B, T, Hq, K), (H, V) = x.shape, y.shape[2:]
  C, W = CHUNK, tiling.block_v // COLUMNS
  chunks, simulated, reverse = T // C, interpret is not None, scale is not None
  stages = min(tiling.stages, per_segment)
  skipped = -(-chunks // per_segment) - tiling.segments if reverse else 0

  def kernel(x_hbm, y_hbm, gates_hbm, ends_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared = lax.div(head, jnp.int32(H // Hq))
    segment = lax.axis_index("segment")
    first = (segment + skipped) * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    part = lambda w: pl.ds(lax.axis_index("block") * tiling.block_v + w * COLUMNS, COLUMNS)

    def run(x_s, y_s, gates_s, weighted_s, full, consumed):
      def fetch(n, slot):
        rows = pl.ds((first + (steps - 1 - n if reverse else n)) * C, C)
        plgpu.copy_gmem_to_smem(x_hbm.at[batch, rows, shared], x_s.at[slot], full.at[slot])
        for w in range(W):
          plgpu.copy_gmem_to_smem(
            y_hbm.at[batch, rows, head, part(w)], y_s.at[slot, w], full.at[slot]
          )
        plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, rows], gates_s.at[slot], full.at[slot])

      def read(wait, release):
        w = lax.axis_index("thread")
        weighted = weighted_s.at[w]

        def step(n, state):
          slot = wait(n)
          from_start, to_end, carry = factors(gates_s.at[slot])
          weight = from_start * scale if reverse else to_end
          values = plgpu.load(y_s.at[slot, w], layout=WGMMA).astype(jnp.float32)
          weighted[...] = (values * along_rows(weight, COLUMNS)).astype(y.dtype)
          plgpu.commit_smem()
          (state,) = mosaic.accumulate(
            simulated, (state * carry, x_s.at[slot].transpose((1, 0)), weighted)
          )
          release(slot)
          return state

        ends_hbm[batch, head, segment, :, part(w)] = lax.fori_loop(
          0, steps, step, mosaic.zeros(K, COLUMNS)
        )

      mosaic.load_and_read(steps, stages, W, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, x.dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, W, C, COLUMNS), plgpu.SMEM((stages, C), jnp.float32),
      tile(W, C, COLUMNS),
      plgpu.Barrier(num_arrivals=2 + W, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      collective_axes="thread",
    )  # fmt: skip

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((B, H, tiling.segments, K, V), jnp.float32),
    grid=(V // tiling.block_v, tiling.segments, H, B),
    grid_names=("block", "segment", "head", "batch"),
    num_threads=W + 1,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(x, y, gates)


def outputs(
  q, k, v, gates, states, scale: float, per_segment: int, tiling: Tiling,
  save: bool = False, interpret=None,
):  # fmt: skip
  """Outputs [B T H V], the final state [B H K V], and with `save` the states before all chunks.

  Args:
    q, k, v: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T], sums from the start of each chunk.
    states: float32 [B H S K V], the state before each segment of `per_segment` chunks.
    save: adds the states, [B H N K V] in the dtype of `q`.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, W = CHUNK, tiling.block_v // COLUMNS
  chunks, dtype, simulated = T // C, q.dtype, interpret is not None
  stages = min(tiling.stages, per_segment)

  def kernel(q_hbm, k_hbm, v_hbm, gates_hbm, before_hbm, o_hbm, final_hbm, *saved_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared = lax.div(head, jnp.int32(H // Hq))
    segment = lax.axis_index("segment")
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    part = lambda w: pl.ds(lax.axis_index("block") * tiling.block_v + w * COLUMNS, COLUMNS)

    def run(q_s, k_s, v_s, gates_s, weighted_s, state_s, o_s, scores_s, full, consumed):
      def fetch(step, slot):
        rows = pl.ds((first + step) * C, C)
        plgpu.copy_gmem_to_smem(q_hbm.at[batch, rows, shared], q_s.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(k_hbm.at[batch, rows, shared], k_s.at[slot], full.at[slot])
        for w in range(W):
          plgpu.copy_gmem_to_smem(
            v_hbm.at[batch, rows, head, part(w)], v_s.at[slot, w], full.at[slot]
          )
        plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, rows], gates_s.at[slot], full.at[slot])

      def read(wait, release):
        w = lax.axis_index("thread")
        weighted, before, out = weighted_s.at[w], state_s.at[w], o_s.at[w]

        def step(n, state):
          slot = wait(n)
          values = v_s.at[slot, w]
          from_start, to_end, carry = factors(gates_s.at[slot])
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)

          def stage_operands():
            before[...] = state.astype(dtype)
            x = plgpu.load(values, layout=WGMMA).astype(jnp.float32)
            weighted[...] = (x * along_rows(to_end, COLUMNS)).astype(dtype)

          keys = k_s.at[slot].transpose((1, 0))
          scores = mosaic.product((C, C), q_s.at[slot], keys, stage_operands)
          scores = (scores * (pairs(gates_s.at[slot]) * scale)).astype(dtype)
          if simulated:
            scores_s[w] = scores
            scores = scores_s.at[w]
          plgpu.commit_smem()
          if save:
            plgpu.copy_smem_to_gmem(before, saved_hbm[0].at[batch, head, first + n, :, part(w)])

          across, inside, state = mosaic.accumulate(
            simulated,
            (mosaic.zeros(C, COLUMNS), q_s.at[slot], before),
            (mosaic.zeros(C, COLUMNS), scores, values),
            (state * carry, keys, weighted),
          )
          release(slot)
          out[...] = (across * along_rows(from_start * scale, COLUMNS) + inside).astype(dtype)
          plgpu.commit_smem()
          rows = pl.ds((first + n) * C, C)
          plgpu.copy_smem_to_gmem(out, o_hbm.at[batch, rows, head, part(w)])
          return state

        start = plgpu.load(
          before_hbm.at[batch, head, segment, :, part(w)], layout=WGMMA, optimized=False
        )
        state = lax.fori_loop(0, steps, step, start)

        @pl.when(segment == tiling.segments - 1)
        def _():
          final_hbm[batch, head, :, part(w)] = state

        plgpu.wait_smem_to_gmem(0)

      mosaic.load_and_read(steps, stages, W, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, W, C, COLUMNS),
      plgpu.SMEM((stages, C), jnp.float32),
      tile(W, C, COLUMNS), tile(W, K, COLUMNS), tile(W, C, COLUMNS),
      tile(W, C, C) if simulated else None,
      plgpu.Barrier(num_arrivals=3 + W, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      collective_axes="thread",
    )  # fmt: skip

  saved = [jax.ShapeDtypeStruct((B, H, chunks, K, V), dtype)] if save else []
  return plgpu.kernel(
    kernel,
    out_type=[
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
      *saved,
    ],
    grid=(V // tiling.block_v, tiling.segments, H, B),
    grid_names=("block", "segment", "head", "batch"),
    num_threads=W + 1,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, gates, states)
