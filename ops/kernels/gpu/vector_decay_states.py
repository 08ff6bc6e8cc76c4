"""States between segments, and their gradients, with one decay per row of the state.

With b the sums of gates from a chunk's start [C K], up to its last b_C, and S the state before it,

  S' = exp(b_C) S + (K exp(b_C - b))^T V

A program is one segment of one head: warpgroups share the columns of V, and of K while gates are
made to factors, and one more loads. Head h of V goes with head h // (H / Hq) of Q and K.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_rows
from ops.kernels.gpu.scalar_decay_forward import Tiling
from ops.kernels.gpu.vector_decay_gates import (
  CHUNK,
  TILE,
  Documents,
  accumulate,
  positions,
  store_mask,
  store_terms,
  sums_and_totals,
)  # fmt: skip


def columns(tile):
  return pl.ds(tile * TILE, TILE)


def gate_terms(log_decay) -> int:
  """bfloat16 numbers whose sum is a gate."""
  return 1 if log_decay.dtype == jnp.bfloat16 else 2


def boundary_states(
  x, y, log_decay, documents, per_segment: int, tiling: Tiling, *,
  scale: float | None = None, skipped: int = 0, interpret=None,
):  # fmt: skip
  """States carried over segments of chunks, or with a `scale` their gradients, from the right.

    S <- exp(b_C) S + (X exp(b_C - b))^T Y          dS <- exp(b_C) dS + scale (X exp(b))^T Y

  Args:
    x, y: [B T Hq K], [B T H V], T a multiple of the chunk.
    log_decay: [B T H K], bfloat16 or float32.
    documents: float32 [B T], starts of documents since the chunk's start, or None.
    per_segment: chunks of a segment.
    scale: None goes from the left to the right.
    skipped: segments at the left that are left out.

  Returns:
    float32 [B H S K V], the state where each segment ends, and [B H S K], what is left there of the
    one where it starts.
  """
  (B, T, Hq, K), (H, V) = x.shape, y.shape[2:]
  C, W, tiles = CHUNK, tiling.block_v // TILE, K // TILE
  share, terms, dtype = tiles // W, gate_terms(log_decay), x.dtype
  chunks, simulated, reverse = T // C, interpret is not None, scale is not None
  stages = min(tiling.stages, per_segment)

  def kernel(x_hbm, y_hbm, g_hbm, documents_hbm, ends_hbm, decays_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared, segment = lax.div(head, jnp.int32(H // Hq)), lax.axis_index("segment")
    first = (segment + skipped) * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    part = lambda w: pl.ds(lax.axis_index("block") * tiling.block_v + w * TILE, TILE)
    chunk = lambda n: first + (steps - 1 - n if reverse else n)
    rows = lambda n: pl.ds(chunk(n) * C, C)

    def run(x_s, y_s, terms_s, masks_s, totals_s, documents_s, decays_s, full, consumed, met):
      def fetch(n, slot):
        for tile in range(tiles):
          here = x_hbm.at[batch, rows(n), shared, columns(tile)]
          plgpu.copy_gmem_to_smem(here, x_s.at[slot, tile], full.at[slot])
        for w in range(W):
          here = y_hbm.at[batch, rows(n), head, part(w)]
          plgpu.copy_gmem_to_smem(here, y_s.at[slot, w], full.at[slot])
        if documents is not None:
          here = documents_hbm.at[batch, rows(n)]
          plgpu.copy_gmem_to_smem(here, documents_s.at[slot], full.at[slot])

      def read(wait, release):
        w = lax.axis_index("thread")
        mine = [w * share + s for s in range(share)]
        i, j = positions()
        store_mask(masks_s.at[w, 0], i <= j)
        store_mask(masks_s.at[w, 1], (i >= j) if reverse else (i < j))
        # Gates go straight to registers, a chunk ahead.
        load_gates = lambda n: [
          plgpu.load(g_hbm.at[batch, rows(n), head, columns(t)], layout=WGMMA, optimized=False)
          for t in mine
        ]
        of = lambda tile: [terms_s.at[term, tile] for term in range(terms)]

        def step(n, carried):
          states, decays, gates = carried
          parity = lax.rem(n, jnp.int32(2))
          for tile, gate in zip(mine, gates):
            store_terms(gate.astype(jnp.float32), of(tile))
          plgpu.commit_smem()
          gates = load_gates(jnp.minimum(n + 1, steps - 1))
          slot = wait(n)
          upper, mask = masks_s.at[w, 0], masks_s.at[w, 1]
          found = sums_and_totals(mask, upper, [of(tile) for tile in mine], simulated)
          for tile, exponent, total in zip(mine, *found):
            factor = jnp.exp(exponent)
            if documents is not None:
              document = Documents(documents_s.at[slot])
              factor = document.before(factor) if reverse else document.after(factor)
            values = plgpu.load(x_s.at[slot, tile], layout=WGMMA).astype(jnp.float32)
            x_s[slot, tile] = (values * (factor * scale if reverse else factor)).astype(dtype)
            totals_s[parity, columns(tile)] = total
          plgpu.commit_smem()
          plgpu.barrier_arrive(met)
          plgpu.barrier_wait(met)
          left = [
            jnp.exp(plgpu.load(totals_s.at[parity, columns(t)], layout=WGMMA.reduce(1)))
            for t in range(tiles)
          ]
          if documents is not None:
            whole = Documents(documents_s.at[slot]).last == 0.0
            left = [jnp.where(whole, x, 0.0) for x in left]
          states = accumulate(
            simulated,
            *(
              (
                states[t] * along_rows(left[t], TILE),
                [(x_s.at[slot, t].transpose((1, 0)), y_s.at[slot, w])],
              )
              for t in range(tiles)
            ),
          )
          release(slot)
          return states, [a * b for a, b in zip(decays, left)], gates

        states = [mosaic.zeros(TILE, TILE) for _ in range(tiles)]
        ones = plgpu.layout_cast(jnp.ones((TILE,), jnp.float32), WGMMA.reduce(1))
        carried = states, [ones] * tiles, load_gates(jnp.int32(0))
        states, decays, _ = lax.fori_loop(0, steps, step, carried)
        for tile in range(tiles):
          ends_hbm[batch, head, segment, columns(tile), part(w)] = states[tile]
          decays_s[w, columns(tile)] = decays[tile]
        plgpu.commit_smem()

        @pl.when(w == 0)
        def _():
          plgpu.copy_smem_to_gmem(decays_s.at[w], decays_hbm.at[batch, head, segment])

        plgpu.wait_smem_to_gmem(0)

      mosaic.load_and_read(steps, stages, W, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    copies = tiles + W + (documents is not None)
    pl.run_scoped(
      run,
      tile(stages, tiles), tile(stages, W), tile(terms, tiles), tile(W, 2),
      vectors(2, K), None if documents is None else vectors(stages, C),
      vectors(W, K),
      plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  S = tiling.segments
  return plgpu.kernel(
    kernel,
    out_type=[struct((B, H, S, K, V), jnp.float32), struct((B, H, S, K), jnp.float32)],
    grid=(V // tiling.block_v, S, H, B),
    grid_names=("block", "segment", "head", "batch"),
    num_threads=W + 1,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(x, y, log_decay, documents)
