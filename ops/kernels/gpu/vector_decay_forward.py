"""Forward kernel of the matrix-state recurrence with one decay per row of the state.

With b the sums of gates from a chunk's start [C K], up to its last b_C, and S the state before it,

  O  = (Q exp(b)) S + A V              A_ij = q_i . k_j exp(b_i - b_j), i >= j
  S' = exp(b_C) (S + (K exp(-b))^T V)

and in hard chunks, which decay too much for exp(-b), A as in `vector_decay_levels.py` and S' as in
`vector_decay_states.py`. A program is one segment of one head: warpgroups share the columns of V,
and of K while gates are made to factors; the first also loads: a third would take registers from
them. Head h of V goes with head h // (H / Hq) of Q and K.
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
  all_products,
  chunk_by_chunk,
  is_hard,
  positions,
  store_mask,
  store_terms,
  sums,
  sums_and_totals,
)  # fmt: skip
from ops.kernels.gpu.vector_decay_levels import pair_scores
from ops.kernels.gpu.vector_decay_states import columns, gate_terms


def outputs(
  q, k, v, log_decay, documents, states, scale: float, per_segment: int, tiling: Tiling,
  save: bool = False, interpret=None,
):  # fmt: skip
  """Outputs [B T H V], the final state [B H K V], and with `save` those before every chunk.

  Args:
    q, k, v: [B T Hq K], [B T H V], T a multiple of the chunk.
    log_decay: [B T H K], bfloat16 or float32.
    documents: float32 [B T], starts of documents since the chunk's start, or None.
    states: float32 [B H S K V], the state before each segment of `per_segment` chunks.
    save: also returns the state before every chunk, [B H N K V] in the dtype of `q`.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, W, tiles = CHUNK, tiling.block_v // TILE, K // TILE
  share, terms, dtype = tiles // W, gate_terms(log_decay), q.dtype
  chunks, simulated = T // C, interpret is not None
  stages = min(tiling.stages, per_segment)

  def kernel(
    q_hbm, k_hbm, v_hbm, g_hbm, documents_hbm, before_hbm, o_hbm, final_hbm, spare_hbm, *saved_hbm
  ):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared, segment = lax.div(head, jnp.int32(H // Hq)), lax.axis_index("segment")
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    part = lambda w: pl.ds(lax.axis_index("block") * tiling.block_v + w * TILE, TILE)
    rows = lambda n: pl.ds((first + n) * C, C)

    def run(
      q_s, k_s, v_s, terms_s, lower, totals_s, documents_s, spare_s, o_s, scores_s,
      full, met,
    ):  # fmt: skip
      w = lax.axis_index("thread")
      slot_of = lambda n: lax.rem(n, jnp.int32(stages))

      def fetch(n):
        slot = slot_of(n)
        for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
          for tile in range(tiles):
            here = source.at[batch, rows(n), shared, columns(tile)]
            plgpu.copy_gmem_to_smem(here, target.at[slot, tile], full.at[slot])
        for block in range(W):
          here = v_hbm.at[batch, rows(n), head, part(block)]
          plgpu.copy_gmem_to_smem(here, v_s.at[slot, block], full.at[slot])
        if documents is not None:
          here = documents_hbm.at[batch, rows(n)]
          plgpu.copy_gmem_to_smem(here, documents_s.at[slot], full.at[slot])

      def meet():
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

      mine = [w * share + s for s in range(share)]
      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

      @pl.when(w == 0)
      def _():
        i, j = positions()
        store_mask(lower, i >= j)
        for n in range(stages):
          pl.when(n < steps)(lambda n=n: fetch(jnp.int32(n)))

      meet()
      # Gates go straight to registers, a chunk ahead.
      load_gates = lambda n: [
        plgpu.load(g_hbm.at[batch, rows(n), head, columns(t)], layout=WGMMA, optimized=False)
        for t in mine
      ]
      of = lambda tile: [terms_s.at[term, tile] for term in range(terms)]
      here = lambda tile: (batch, head, segment, columns(tile), part(w))

      def documents_of(slot):
        return None if documents is None else Documents(documents_s.at[slot])

      def prepare(n, gates):
        """Whether the chunk is hard, once its gates are in shared memory."""
        parity = lax.rem(n, jnp.int32(2))
        for tile, gate in zip(mine, gates):
          store_terms(gate.astype(jnp.float32), of(tile))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        terms_of_mine = [of(tile) for tile in mine]
        exponents, whole = sums_and_totals(lower, lower.transpose((1, 0)), terms_of_mine, simulated)
        for tile, total in zip(mine, whole):
          totals_s[parity, columns(tile)] = total
        plgpu.barrier_wait(full.at[slot_of(n)])
        meet()
        ahead = n + stages - 1  # takes the place of the chunk before, which nobody reads any more
        pl.when((w == 0) & (n > 0) & (ahead < steps))(lambda: fetch(ahead))
        return *is_hard(totals_s.at[parity], documents_of(slot_of(n))), exponents

      def scale_tiles(slot, tile, from_start, to_end):
        for source, factor in ((q_s, from_start), (k_s, to_end)):
          source[slot, tile] = (load(source.at[slot, tile]) * factor).astype(dtype)

      def step(n, states, exponents, zero):
        """The state after a chunk, and gates of the next one."""
        slot, parity = slot_of(n), lax.rem(n, jnp.int32(2))
        queries, keys, values = q_s.at[slot], k_s.at[slot], v_s.at[slot, w]
        gates = load_gates(jnp.minimum(n + 1, steps - 1))
        document, hard = documents_of(slot), zero is not None
        if hard:
          for tile in range(tiles):
            spare_hbm[here(tile)] = states[tile]
          spare = o_s.at[w]
          scores = pair_scores(
            queries, keys, of, mine, spare, spare_s.at[0], spare_s.at[1], meet, zero
          )
          i, j = positions(zero)
          store_mask(spare, i < j)
          plgpu.commit_smem()
          for tile in mine:
            from_start = jnp.exp(sums(lower, of(tile)))
            to_end = jnp.exp(sums(spare, of(tile)))
            if documents is not None:
              from_start, to_end = document.before(from_start), document.after(to_end)
            scale_tiles(slot, tile, from_start, to_end)
          meet()
          if documents is not None:
            scores = jnp.where(document.pairs(), scores, 0.0)
          states = [
            plgpu.load(spare_hbm.at[here(t)], layout=WGMMA, optimized=False) for t in range(tiles)
          ]
          for tile in range(tiles):
            spare_s[w, tile] = states[tile].astype(dtype)
        else:
          for tile in range(tiles):
            spare_s[w, tile] = states[tile].astype(dtype)
          for tile, exponent in zip(mine, exponents):
            scale_tiles(slot, tile, jnp.exp(exponent), jnp.exp(-exponent))
          meet()
          scores = jnp.where(load(lower) > 0.0, all_products(queries, keys), 0.0)
        scores = scores.astype(dtype)
        if simulated:
          scores_s[w] = scores
          scores = scores_s.at[w]
        left = [
          jnp.exp(plgpu.load(totals_s.at[parity, columns(t)], layout=WGMMA.reduce(1)))
          for t in range(tiles)
        ]
        plgpu.commit_smem()
        if save:
          for tile in range(tiles):
            there = saved_hbm[0].at[batch, head, first + n, columns(tile), part(w)]
            plgpu.copy_smem_to_gmem(spare_s.at[w, tile], there)
        if hard:
          # Keys are relative to the chunk's end, otherwise to its start.
          kept = left
          if documents is not None:
            kept = [jnp.where(document.last == 0.0, x, 0.0) for x in left]
          states = [x * along_rows(y, TILE) for x, y in zip(states, kept)]
        out, *states = accumulate(
          simulated,
          (
            mosaic.zeros(C, TILE),
            [(queries.at[t], spare_s.at[w, t]) for t in range(tiles)] + [(scores, values)],
          ),
          *((states[t], [(keys.at[t].transpose((1, 0)), values)]) for t in range(tiles)),
        )
        if not hard:
          states = [x * along_rows(y, TILE) for x, y in zip(states, left)]
        o_s[w] = (out * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s.at[w], o_hbm.at[batch, rows(n), head, part(w)])
        return states, gates

      start = [
        plgpu.load(
          before_hbm.at[batch, head, segment, columns(t), part(w)],
          layout=WGMMA,
          optimized=False,
        )
        for t in range(tiles)
      ]
      states = chunk_by_chunk(steps, prepare, step, start, load_gates(jnp.int32(0)))

      @pl.when(segment == tiling.segments - 1)
      def _():
        for tile in range(tiles):
          final_hbm[batch, head, columns(tile), part(w)] = states[tile]

      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    copies = 2 * tiles + W + (documents is not None)
    pl.run_scoped(
      run,
      tile(stages, tiles), tile(stages, tiles), tile(stages, W), tile(terms, tiles), tile(),
      vectors(2, K), None if documents is None else vectors(stages, C),
      tile(2, tiles), tile(W), tile(W) if simulated else None,
      plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  saved = [struct((B, H, chunks, K, V), dtype)] if save else []
  o, final, _, *saved = plgpu.kernel(
    kernel,
    out_type=[
      struct(v.shape, v.dtype),
      struct((B, H, K, V), jnp.float32),
      struct((B, H, tiling.segments, K, V), jnp.float32),
      *saved,
    ],
    grid=(V // tiling.block_v, tiling.segments, H, B),
    grid_names=("block", "segment", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, log_decay, documents, states)
  return [o, final, *saved]
