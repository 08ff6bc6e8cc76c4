"""Gradients of the matrix-state recurrence with one decay per row of the state, from the right.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates,
q~ = scale q exp(b), k~ = k exp(-b), and D = exp(b_C) dS':

  A    = q~ k~^T       P = dO V^T        both for i >= j
  dV   = A^T dO + k~ D
  dQ   = scale exp(b) (P k~ + dO S^T)
  dK   = exp(-b) (P^T q~ + V D^T)
  dg_t = sum_{i >= t} (q~_i (P k~ + dO S^T)_i - k~_i (P^T q~)_i) + sum_{i < t} k~_i (V D^T)_i
         + rowsum(S D)
  dS   = q~^T dO + D

Chunks that decay too much for exp(-b) take A, P k~ and P^T q~ level by level, as scores are in
`vector_decay_gates.py`, with D = dS' and k~ = k exp(b_C - b) in what goes through the state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.vector_decay_forward import accumulate, columns, gate_terms
from ops.kernels.gpu.vector_decay_gates import (
  CHUNK,
  LEVELS,
  LIMIT,
  TILE,
  Documents,
  all_products,
  level_masks,
  positions,
  store_mask,
  store_terms,
  sums,
  totals,
)  # fmt: skip


def gradients(
  q, k, v, do, log_decay, documents, before, ends, scale: float, per_segment: int,
  stages: int | None = None, interpret=None,
):  # fmt: skip
  """dq, dk, dg [B T H K], dv [B T H V] and the gradient of the first state, float32 [B H K V].

  Args:
    q, k, v, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    log_decay: [B T H K], bfloat16 or float32.
    documents: float32 [B T], starts of documents since the chunk's start, or None.
    before: [B H N K V] like `q`, the state before every chunk.
    ends: float32 [B H S K V], the gradient of the state where each segment ends.
    per_segment: chunks of a segment.
    stages: chunks in shared memory.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, S, dtype = CHUNK, ends.shape[2], q.dtype
  W = 2 if K == V == 128 else 1
  tiles, value_tiles = K // TILE, V // TILE
  share, value_share, terms = tiles // W, value_tiles // W, gate_terms(log_decay)
  chunks, simulated = T // C, interpret is not None
  stages = min(stages or (2 if K == V == 64 else 1), per_segment)
  turned = lambda ref: ref.transpose((1, 0))

  def kernel(
    q_hbm, k_hbm, v_hbm, do_hbm, g_hbm, documents_hbm, before_hbm, ends_hbm,
    dq_hbm, dk_hbm, dv_hbm, dg_hbm, start_hbm,
  ):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared, segment = lax.div(head, jnp.int32(H // Hq)), lax.axis_index("segment")
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    chunk = lambda n: first + steps - 1 - n
    rows = lambda n: pl.ds(chunk(n) * C, C)

    def run(
      q_all, k_all, v_all, do_all, before_all, documents_s, terms_s, lower, pairs_s, d_s, spare_s,
      totals_s, constant_s, full, consumed, met,
    ):  # fmt: skip
      scores_s, p_s = pairs_s.at[0], pairs_s.at[1]

      def fetch(n, slot):
        for source, target, h, count in (
          (q_hbm, q_all, shared, tiles), (k_hbm, k_all, shared, tiles),
          (v_hbm, v_all, head, value_tiles), (do_hbm, do_all, head, value_tiles),
        ):  # fmt: skip
          for tile in range(count):
            here = source.at[batch, rows(n), h, columns(tile)]
            plgpu.copy_gmem_to_smem(here, target.at[slot, tile], full.at[slot])
        for tile in range(tiles):
          for t in range(value_tiles):
            here = before_hbm.at[batch, head, chunk(n), columns(tile), columns(t)]
            plgpu.copy_gmem_to_smem(here, before_all.at[slot, tile, t], full.at[slot])
        if documents is not None:
          here = documents_hbm.at[batch, rows(n)]
          plgpu.copy_gmem_to_smem(here, documents_s.at[slot], full.at[slot])

      def meet():
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

      def read(wait, release):
        w = lax.axis_index("thread")
        mine = [w * share + s for s in range(share)]
        my_values = [w * value_share + s for s in range(value_share)]
        i, j = positions()
        pl.when(w == 0)(lambda: store_mask(lower, i >= j))
        meet()
        load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)
        load_gates = lambda n: [
          plgpu.load(g_hbm.at[batch, rows(n), head, columns(t)], layout=WGMMA, optimized=False)
          for t in mine
        ]
        of = lambda tile: [terms_s.at[term, tile] for term in range(terms)]

        def step(n, carried):
          states, gates = carried
          parity = lax.rem(n, jnp.int32(2))
          for tile, gate in zip(mine, gates):
            store_terms(gate.astype(jnp.float32), of(tile))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.commit_smem()
          for tile in mine:
            totals_s[parity, columns(tile)] = totals(turned(lower), of(tile))
          slot = wait(n)
          meet()
          q_s, k_s, v_s, do_s = (ref.at[slot] for ref in (q_all, k_all, v_all, do_all))
          before_s = before_all.at[slot]
          document = None if documents is None else Documents(documents_s.at[slot])
          hard = jnp.min(plgpu.load(totals_s.at[parity], layout=WGMMA.reduce(0))) < LIMIT
          if documents is not None:
            hard = hard | (document.last != 0.0)

          def left(tile):
            """What is left of the rows of the state before."""
            x = jnp.exp(plgpu.load(totals_s.at[parity, columns(tile)], layout=WGMMA.reduce(1)))
            if documents is None:
              return x
            return jnp.where(document.last == 0.0, x, 0.0)

          def scale_tiles(tile, from_start, to_end):
            q_s[tile] = (load(q_s.at[tile]) * (from_start * scale)).astype(dtype)
            k_s[tile] = (load(k_s.at[tile]) * to_end).astype(dtype)

          def output_products():
            return mosaic.products(
              (C, C), [(do_s.at[t], turned(v_s.at[t])) for t in range(value_tiles)]
            )

          def across(tile):
            return [(do_s.at[t], turned(before_s.at[tile, t])) for t in range(value_tiles)]

          def keys_and_gates(tile, dk_inside, db, to_end, weight, lower, upper):
            """dk, and dg from `db`, the share of pairs and of the state before."""
            constant = jnp.zeros((), jnp.float32)
            for t in range(value_tiles):
              constant += (load(before_s.at[tile, t]) * load(d_s.at[t, tile])).sum(1)
            constant_s[columns(tile)] = constant * weight
            own = [terms_s.at[term, tile] for term in range(2)]
            store_terms(db, own)
            plgpu.commit_smem()
            through = mosaic.products(
              (C, TILE), [(v_s.at[t], turned(d_s.at[t, tile])) for t in range(value_tiles)]
            )
            dg = sums(upper, own)
            written = load(k_s.at[tile]) * through
            spare_s[1, tile] = (dk_inside + to_end * through).astype(dtype)
            store_terms(written, own)
            plgpu.commit_smem()
            dg += sums(lower, own) - written
            dg += along_columns(plgpu.load(constant_s.at[columns(tile)], layout=WGMMA.reduce(0)), C)
            dg_hbm[batch, rows(n), head, columns(tile)] = dg.astype(dg_hbm.dtype)

          def easily(states):
            exponents = []
            for tile in mine:
              exponents.append(sums(lower, of(tile)))
              scale_tiles(tile, jnp.exp(exponents[-1]), jnp.exp(-exponents[-1]))
            for t, columns_of in zip(my_values, states):
              for tile in range(tiles):
                d_s[t, tile] = (columns_of[tile] * along_rows(left(tile), TILE)).astype(dtype)
            meet()
            masked = lambda x: jnp.where(i >= j, x, 0.0).astype(dtype)

            def store_scores():
              scores_s[...] = masked(all_products(q_s, k_s))

            def store_p():
              p_s[...] = masked(output_products())

            pl.when(w == 0)(store_scores)
            pl.when(w == W - 1)(store_p)
            meet()
            for tile, exponent in zip(mine, exponents):
              dq = mosaic.products((C, TILE), [(p_s, k_s.at[tile]), *across(tile)])
              spare_s[0, tile] = (dq * (jnp.exp(exponent) * scale)).astype(dtype)
              db = load(q_s.at[tile]) * dq
              dk = mosaic.products((C, TILE), [(turned(p_s), q_s.at[tile])])
              db -= load(k_s.at[tile]) * dk
              to_end = jnp.exp(-exponent)
              keys_and_gates(tile, dk * to_end, db, to_end, 1.0, lower, turned(lower))

          def hardly(states):
            spare = d_s.at[my_values[0], 0]
            p = jnp.where(i >= j, output_products(), 0.0)
            if documents is not None:
              p = jnp.where(document.pairs(), p, 0.0)

            def level(l, sums_so_far):
              scores, dq, dk = sums_so_far
              between, pairs = level_masks(l)
              store_mask(spare, between)

              @pl.when(w == 0)
              def _():
                p_s[...] = jnp.where(pairs, p, 0.0).astype(dtype)

              plgpu.commit_smem()
              decays = [jnp.exp(sums(spare, of(tile))) for tile in mine]
              for tile, decay in zip(mine, decays):
                spare_s[0, tile] = (load(q_s.at[tile]) * (decay * scale)).astype(dtype)
                spare_s[1, tile] = (load(k_s.at[tile]) * decay).astype(dtype)
              meet()
              products = all_products(spare_s.at[0], spare_s.at[1])
              scores += jnp.where(pairs, products, 0.0)
              dq = [
                x + mosaic.product((C, TILE), p_s, spare_s.at[1, tile]) * (decay * scale)
                for x, tile, decay in zip(dq, mine, decays)
              ]
              dk = [
                x + mosaic.product((C, TILE), turned(p_s), spare_s.at[0, tile]) * decay
                for x, tile, decay in zip(dk, mine, decays)
              ]
              meet()
              return scores, dq, dk

            zeros = lambda: [mosaic.zeros(C, TILE) for _ in mine]
            scores, dq, dk = lax.fori_loop(
              jnp.int32(0), jnp.int32(LEVELS), level, (mosaic.zeros(C, C), zeros(), zeros())
            )
            db = [
              load(q_s.at[tile]) * x - load(k_s.at[tile]) * y for tile, x, y in zip(mine, dq, dk)
            ]
            later = i <= j
            if documents is not None:
              scores = jnp.where(document.pairs(), scores, 0.0)
              later = later & document.pairs()

            @pl.when(w == 0)
            def _():
              scores_s[...] = scores.astype(dtype)
              store_mask(p_s, later)

            store_mask(spare, i < j)
            plgpu.commit_smem()
            factors = []
            for tile in mine:
              from_start, to_end = jnp.exp(sums(lower, of(tile))), jnp.exp(sums(spare, of(tile)))
              if documents is not None:
                from_start, to_end = document.before(from_start), document.after(to_end)
              scale_tiles(tile, from_start, to_end)
              factors.append((from_start, to_end))
            for t, columns_of in zip(my_values, states):
              for tile in range(tiles):
                d_s[t, tile] = columns_of[tile].astype(dtype)
            meet()
            for at, (tile, (from_start, to_end)) in enumerate(zip(mine, factors)):
              through = mosaic.products((C, TILE), across(tile))
              spare_s[0, tile] = (dq[at] + through * (from_start * scale)).astype(dtype)
              db[at] += load(q_s.at[tile]) * through
              keys_and_gates(tile, dk[at], db[at], to_end, left(tile), turned(p_s), p_s)

          @pl.when(hard)
          def _():
            hardly(states)

          @pl.when(~hard)
          def _():
            easily(states)

          gates = load_gates(jnp.minimum(n + 1, steps - 1))
          dv, new = [], []
          for t, columns_of in zip(my_values, states):
            pairs = [(turned(scores_s), do_s.at[t])]
            pairs += [(k_s.at[tile], d_s.at[t, tile]) for tile in range(tiles)]
            dv.append(mosaic.products((C, TILE), pairs))
            new.append(
              accumulate(
                simulated,
                *(
                  (
                    columns_of[tile] * along_rows(left(tile), TILE),
                    [(turned(q_s.at[tile]), do_s.at[t])],
                  )
                  for tile in range(tiles)
                ),
              )
            )
          release(slot)
          meet()
          for t, x in zip(my_values, dv):
            d_s[t, 0] = x.astype(dtype)
          plgpu.commit_smem()
          for tile in mine:
            here = batch, rows(n), head, columns(tile)
            plgpu.copy_smem_to_gmem(spare_s.at[0, tile], dq_hbm.at[here])
            plgpu.copy_smem_to_gmem(spare_s.at[1, tile], dk_hbm.at[here])
          for t in my_values:
            plgpu.copy_smem_to_gmem(d_s.at[t, 0], dv_hbm.at[batch, rows(n), head, columns(t)])
          return new, gates

        states = [
          [
            plgpu.load(
              ends_hbm.at[batch, head, segment, columns(tile), columns(t)],
              layout=WGMMA,
              optimized=False,
            )
            for tile in range(tiles)
          ]
          for t in my_values
        ]
        states, _ = lax.fori_loop(0, steps, step, (states, load_gates(jnp.int32(0))))

        @pl.when(segment == 0)
        def _():
          for t, columns_of in zip(my_values, states):
            for tile in range(tiles):
              start_hbm[batch, head, columns(tile), columns(t)] = columns_of[tile]

        plgpu.wait_smem_to_gmem(0)

      mosaic.load_and_read(steps, stages, W, fetch, read, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    copies = 2 * tiles + 2 * value_tiles + tiles * value_tiles + (documents is not None)
    pl.run_scoped(
      run,
      tile(stages, tiles), tile(stages, tiles), tile(stages, value_tiles),
      tile(stages, value_tiles), tile(stages, tiles, value_tiles),
      None if documents is None else vectors(stages, C),
      tile(2, tiles), tile(), tile(2), tile(value_tiles, tiles), tile(2, tiles),
      vectors(2, K), vectors(K),
      plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W, num_barriers=stages),
      plgpu.Barrier(num_arrivals=W),
      collective_axes="thread",
    )  # fmt: skip

  like = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((B, T, H, *shape), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[
      like(K), like(K), like(V), like(K, dtype=log_decay.dtype),
      jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
    ],
    grid=(S, H, B),
    grid_names=("segment", "head", "batch"),
    num_threads=W + 1,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, do, log_decay, documents, before, ends)  # fmt: skip
