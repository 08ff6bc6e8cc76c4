"""Forward kernels of the matrix-state recurrence with one decay per head.

With b the sum of gates from a chunk's start, up to its last C, and S the state before the chunk,

  O  = exp(b) (Q S) + A V          A_ij = q_i . k_j exp(b_i - b_j), i >= j
  S' = exp(b_C) S + K^T (exp(b_C - b) V)

`boundary_states` computes S' alone over segments of many chunks, `outputs` both. A program is one
segment of one head: one warpgroup per 64 columns of V, and one that loads. Head h of V goes with
head h // (H / Hq) of Q and K. The exponentials are 0 across documents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_rows
from ops.kernels.gpu.scalar_decay_gates import CHUNK, Gates, factors, pairs

COLUMNS = 64  # of V per warpgroup


class Tiling(NamedTuple):
  """How a forward kernel is laid out on the multiprocessors."""

  segments: int = 1  # pieces of the sequence, each a program
  stages: int = 2  # chunks in shared memory
  block_v: int = 128  # columns of V of a program, a multiple of 64


def boundary_states(
  x, y, gates: Gates, starts, per_segment: int, tiling: Tiling, *, scale: float | None = None,
  save_every: int = 0, interpret=None,
):  # fmt: skip
  """States carried over segments of chunks, or with a `scale` their gradients, from the right.

    S <- exp(b_C) S + X^T (exp(b_C - b) Y)          dS <- exp(b_C) dS + scale X^T (exp(b) Y)

  Args:
    x, y: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T] and [B T].
    starts: float32 [B H S K V], the state where each segment starts; None is zero.
    per_segment: chunks of a segment.
    scale: None goes from the left to the right.
    save_every: n > 0 also returns the state before every n-th chunk, or with a `scale` that right
      of each n chunks; n divides the number of chunks.

  Returns:
    float32 [B H S K V], the state where each segment ends, and with `save_every`
    [B H N K V] like `x`.
  """
  (B, T, Hq, K), (H, V) = x.shape, y.shape[2:]
  C, W = CHUNK, tiling.block_v // COLUMNS
  chunks, simulated, reverse = T // C, interpret is not None, scale is not None
  stages = min(tiling.stages, per_segment)

  def kernel(x_hbm, y_hbm, gates_hbm, starts_hbm, ends_hbm, *saved_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared = lax.div(head, jnp.int32(H // Hq))
    segment = lax.axis_index("segment")
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    part = lambda w: pl.ds(lax.axis_index("block") * tiling.block_v + w * COLUMNS, COLUMNS)
    chunk = lambda n: first + (steps - 1 - n if reverse else n)

    def run(x_s, y_s, gates_s, weighted_s, state_s, full, consumed):
      def fetch(n, slot):
        rows = pl.ds(chunk(n) * C, C)
        plgpu.copy_gmem_to_smem(x_hbm.at[batch, rows, shared], x_s.at[slot], full.at[slot])
        for w in range(W):
          plgpu.copy_gmem_to_smem(
            y_hbm.at[batch, rows, head, part(w)], y_s.at[slot, w], full.at[slot]
          )
        gates_hbm.fetch(batch, head, chunk(n), gates_s.at(slot), full.at[slot])

      def read(wait, release):
        w = lax.axis_index("thread")
        weighted = weighted_s.at[w]

        def step(n, state):
          slot = wait(n)
          from_start, to_end, carry = factors(gates_s.at(slot))
          weight = from_start * scale if reverse else to_end
          values = plgpu.load(y_s.at[slot, w], layout=WGMMA).astype(jnp.float32)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          weighted[...] = (values * along_rows(weight, COLUMNS)).astype(y.dtype)
          if save_every:

            @pl.when(lax.rem(chunk(n), jnp.int32(save_every)) == (save_every - 1 if reverse else 0))
            def _():
              state_s[w] = state.astype(x.dtype)

          plgpu.commit_smem()
          if save_every:

            @pl.when(lax.rem(chunk(n), jnp.int32(save_every)) == (save_every - 1 if reverse else 0))
            def _():
              at = lax.div(chunk(n), jnp.int32(save_every))
              here = saved_hbm[0].at[batch, head, at, :, part(w)]
              plgpu.copy_smem_to_gmem(state_s.at[w], here)

          (state,) = mosaic.accumulate(
            simulated, (state * carry, x_s.at[slot].transpose((1, 0)), weighted)
          )
          release(slot)
          return state

        if starts is None:
          state = mosaic.zeros(K, COLUMNS)
        else:
          here = starts_hbm.at[batch, head, segment, :, part(w)]
          state = plgpu.load(here, layout=WGMMA, optimized=False)
        ends_hbm[batch, head, segment, :, part(w)] = lax.fori_loop(0, steps, step, state)
        plgpu.wait_smem_to_gmem(0)

      mosaic.load_and_read(steps, stages, W, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, x.dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, W, C, COLUMNS),
      gates.scratch(stages), tile(W, C, COLUMNS), tile(W, K, COLUMNS) if save_every else None,
      plgpu.Barrier(num_arrivals=1 + W + gates.copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      collective_axes="thread",
    )  # fmt: skip

  ends = jax.ShapeDtypeStruct((B, H, tiling.segments, K, V), jnp.float32)
  saved = [jax.ShapeDtypeStruct((B, H, chunks // save_every, K, V), x.dtype)] if save_every else []
  return plgpu.kernel(
    kernel,
    out_type=[ends, *saved],
    grid=(V // tiling.block_v, tiling.segments, H, B),
    grid_names=("block", "segment", "head", "batch"),
    num_threads=W + 1,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(x, y, gates, starts)


def outputs(
  q, k, v, gates: Gates, states, scale: float, per_segment: int, tiling: Tiling,
  save_every: int = 0, interpret=None,
):  # fmt: skip
  """Outputs [B T H V], the final state [B H K V], and the states before some chunks.

  Args:
    q, k, v: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T] and [B T].
    states: float32 [B H S K V], the state before each segment of `per_segment` chunks.
    save_every: n > 0 also returns the state before every n-th chunk, [B H N K V] in the dtype of
      `q`; `per_segment` is a multiple of n.
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
        gates_hbm.fetch(batch, head, first + step, gates_s.at(slot), full.at[slot])

      def read(wait, release):
        w = lax.axis_index("thread")
        weighted, before, out = weighted_s.at[w], state_s.at[w], o_s.at[w]

        def step(n, state):
          slot = wait(n)
          values = v_s.at[slot, w]
          from_start, to_end, carry = factors(gates_s.at(slot))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)

          def stage_operands():
            before[...] = state.astype(dtype)
            x = plgpu.load(values, layout=WGMMA).astype(jnp.float32)
            weighted[...] = (x * along_rows(to_end, COLUMNS)).astype(dtype)

          keys = k_s.at[slot].transpose((1, 0))
          scores = mosaic.product((C, C), q_s.at[slot], keys, stage_operands)
          scores = (scores * (pairs(gates_s.at(slot)) * scale)).astype(dtype)
          if simulated:
            scores_s[w] = scores
            scores = scores_s.at[w]
          plgpu.commit_smem()
          if save_every:

            @pl.when(lax.rem(n, jnp.int32(save_every)) == 0)
            def _():
              at = lax.div(first + n, jnp.int32(save_every))
              plgpu.copy_smem_to_gmem(before, saved_hbm[0].at[batch, head, at, :, part(w)])

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
      gates.scratch(stages), tile(W, C, COLUMNS), tile(W, K, COLUMNS), tile(W, C, COLUMNS),
      tile(W, C, C) if simulated else None,
      plgpu.Barrier(num_arrivals=2 + W + gates.copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      collective_axes="thread",
    )  # fmt: skip

  saved = (
    [jax.ShapeDtypeStruct((B, H, -(-chunks // save_every), K, V), dtype)] if save_every else []
  )
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
