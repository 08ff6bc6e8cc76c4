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
`vector_decay_levels.py`, with D = dS' and k~ = k exp(b_C - b) in what goes through the state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
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
from ops.kernels.gpu.vector_decay_levels import pair_gradients
from ops.kernels.gpu.vector_decay_states import columns, gate_terms


def gradients(
  q, k, v, do, log_decay, documents, before, ends, scale: float, per_segment: int, interpret=None
):  # fmt: skip
  """dq, dk, dg [B T H K], dv [B T H V] and the gradient of the first state, float32 [B H K V].

  Args:
    q, k, v, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    log_decay: [B T H K], bfloat16 or float32.
    documents: float32 [B T], starts of documents since the chunk's start, or None.
    before: [B H N K V] like `q`, the state before every chunk.
    ends: float32 [B H S K V], the gradient of the state where each segment ends.
    per_segment: chunks of a segment.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, S, dtype = CHUNK, ends.shape[2], q.dtype
  W = 2 if K == V == 128 else 1
  tiles, value_tiles = K // TILE, V // TILE
  share, value_share, terms = tiles // W, value_tiles // W, gate_terms(log_decay)
  chunks, simulated = T // C, interpret is not None
  turned = lambda ref: ref.transpose((1, 0))

  def kernel(
    q_hbm, k_hbm, v_hbm, do_hbm, g_hbm, documents_hbm, before_hbm, ends_hbm,
    dq_hbm, dk_hbm, dv_hbm, dg_hbm, start_hbm, spare_hbm,
  ):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared, segment = lax.div(head, jnp.int32(H // Hq)), lax.axis_index("segment")
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    chunk = lambda n: first + steps - 1 - n
    rows = lambda n: pl.ds(chunk(n) * C, C)

    def run(
      q_all, k_all, v_s, do_s, before_s, documents_s, terms_s, lower, pairs_s, d_s, totals_s,
      constant_s, keys_full, values_full, before_full, met,
    ):  # fmt: skip
      scores_s, p_s = pairs_s.at[0], pairs_s.at[1]
      two = lambda n: lax.rem(n, jnp.int32(2))

      def fetch_keys(n):
        slot = two(n)
        for source, target in ((q_hbm, q_all), (k_hbm, k_all)):
          for tile in range(tiles):
            here = source.at[batch, rows(n), shared, columns(tile)]
            plgpu.copy_gmem_to_smem(here, target.at[slot, tile], keys_full.at[slot])
        if documents is not None:
          here = documents_hbm.at[batch, rows(n)]
          plgpu.copy_gmem_to_smem(here, documents_s.at[slot], keys_full.at[slot])

      def fetch_values(n):
        for source, target in ((v_hbm, v_s), (do_hbm, do_s)):
          for t in range(value_tiles):
            here = source.at[batch, rows(n), head, columns(t)]
            plgpu.copy_gmem_to_smem(here, target.at[t], values_full)

      def fetch_before(n):
        for tile in range(tiles):
          for t in range(value_tiles):
            here = before_hbm.at[batch, head, chunk(n), columns(tile), columns(t)]
            plgpu.copy_gmem_to_smem(here, before_s.at[tile, t], before_full)

      def meet():
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

      w = lax.axis_index("thread")
      mine = [w * share + s for s in range(share)]
      my_values = [w * value_share + s for s in range(value_share)]

      @pl.when(w == 0)
      def _():
        i, j = positions()
        store_mask(lower, i >= j)
        fetch_keys(jnp.int32(0))
        pl.when(steps > 1)(lambda: fetch_keys(jnp.int32(1)))
        fetch_values(jnp.int32(0))
        fetch_before(jnp.int32(0))

      meet()
      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)
      load_gates = lambda n: [
        plgpu.load(g_hbm.at[batch, rows(n), head, columns(t)], layout=WGMMA, optimized=False)
        for t in mine
      ]
      of = lambda tile: [terms_s.at[term, tile] for term in range(terms)]

      def documents_of(n):
        return None if documents is None else Documents(documents_s.at[two(n)])

      def prepare(n, gates):
        """Whether the chunk is hard, once its gates are in shared memory."""
        for tile, gate in zip(mine, gates):
          store_terms(gate.astype(jnp.float32), of(tile))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        terms_of_mine = [of(tile) for tile in mine]
        exponents, whole = sums_and_totals(lower, turned(lower), terms_of_mine, simulated)
        for tile, total in zip(mine, whole):
          totals_s[two(n), columns(tile)] = total
        plgpu.barrier_wait(keys_full.at[two(n)])
        meet()
        # What dq and dk were put into has left.
        pl.when((w == 0) & (n > 0))(lambda: fetch_before(n))
        return *is_hard(totals_s.at[two(n)], documents_of(n)), exponents

      def step(n, states, exponents, zero):
        """Gradients of a chunk; the states before it, and gates of the next chunk."""
        slot = parity = two(n)
        q_s, k_s = q_all.at[slot], k_all.at[slot]
        document = documents_of(n)
        here = lambda t, tile: (batch, head, segment, columns(tile), columns(t))

        def keep(states):
          # Hard chunks need the registers of the states.
          for t, columns_of in zip(my_values, states):
            for tile in range(tiles):
              spare_hbm[here(t, tile)] = columns_of[tile]

        def kept():
          load_kept = lambda *at: plgpu.load(spare_hbm.at[here(*at)], layout=WGMMA, optimized=False)
          return [[load_kept(t, tile) for tile in range(tiles)] for t in my_values]

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

        def state_shares(tile, weight):
          """The share of the state before in the gradients of the gates."""
          total = jnp.zeros((), jnp.float32)
          for t in range(value_tiles):
            total += (load(before_s.at[tile, t]) * load(d_s.at[t, tile])).sum(1)
          constant_s[columns(tile)] = total * weight

        def keys_and_gates(tile, dk_inside, db, to_end, lower, upper, decayed=None):
          """dk, and dg from `db`, the share of pairs and of the state before.

          `decayed` is 0 for tokens before which there is no state to decay, else 1.
          """
          own = [terms_s.at[term, tile] for term in range(2)]
          store_terms(db, own)
          plgpu.commit_smem()
          through = mosaic.products(
            (C, TILE), [(v_s.at[t], turned(d_s.at[t, tile])) for t in range(value_tiles)]
          )
          before_s[tile, 1] = (dk_inside + to_end * through).astype(dtype)
          written = load(k_s.at[tile]) * through
          dg = sums(upper, own) - written
          store_terms(written, own)
          plgpu.commit_smem()
          dg += sums(lower, own)
          dg += along_columns(plgpu.load(constant_s.at[columns(tile)], layout=WGMMA.reduce(0)), C)
          if decayed is not None:
            dg *= along_rows(decayed, TILE)
          dg_hbm[batch, rows(n), head, columns(tile)] = dg.astype(dg_hbm.dtype)

        def easily(states):
          for tile, exponent in zip(mine, exponents):
            scale_tiles(tile, jnp.exp(exponent), jnp.exp(-exponent))
          for t, columns_of in zip(my_values, states):
            for tile in range(tiles):
              d_s[t, tile] = (columns_of[tile] * along_rows(left(tile), TILE)).astype(dtype)
          plgpu.barrier_wait(values_full)
          meet()
          masked = lambda x: jnp.where(load(lower) > 0.0, x, 0.0).astype(dtype)

          def store_scores():
            scores_s[...] = masked(all_products(q_s, k_s))

          def store_p():
            p_s[...] = masked(output_products())

          pl.when(w == 0)(store_scores)
          pl.when(w == W - 1)(store_p)
          plgpu.barrier_wait(before_full)
          meet()
          for tile, exponent in zip(mine, exponents):
            dq = mosaic.products((C, TILE), [(p_s, k_s.at[tile]), *across(tile)])
            state_shares(tile, 1.0)
            before_s[tile, 0] = (dq * (jnp.exp(exponent) * scale)).astype(dtype)
            db = load(q_s.at[tile]) * dq
            dk = mosaic.products((C, TILE), [(turned(p_s), q_s.at[tile])])
            db -= load(k_s.at[tile]) * dk
            to_end = jnp.exp(-exponent)
            keys_and_gates(tile, dk * to_end, db, to_end, lower, turned(lower))
          return states

        def hardly(states):
          keep(states)
          i, j = positions(zero)
          plgpu.barrier_wait(values_full)
          p = jnp.where(i >= j, output_products(), 0.0)
          if documents is not None:
            p = jnp.where(document.pairs(), p, 0.0)

          scores, dq, dk, db = pair_gradients(
            q_s, k_s, p, scale, of, mine, scores_s, p_s, d_s.at[0], d_s.at[1], meet, w == 0, zero
          )
          later = i <= j
          if documents is not None:
            scores = jnp.where(document.pairs(), scores, 0.0)
            later = later & document.pairs()

          @pl.when(w == 0)
          def _():
            store_mask(scores_s, i < j)
            store_mask(p_s, later)

          meet()
          factors = []
          for tile in mine:
            from_start, to_end = (jnp.exp(sums(mask, of(tile))) for mask in (lower, scores_s))
            if documents is not None:
              from_start, to_end = document.before(from_start), document.after(to_end)
            scale_tiles(tile, from_start, to_end)
            factors.append((from_start, to_end))
          for t, columns_of in zip(my_values, kept()):
            for tile in range(tiles):
              d_s[t, tile] = columns_of[tile].astype(dtype)
          plgpu.barrier_wait(before_full)
          meet()

          @pl.when(w == 0)
          def _():
            scores_s[...] = scores.astype(dtype)

          decayed = None if documents is None else document.goes_on(zero)
          meet()
          for at, (tile, (from_start, to_end)) in enumerate(zip(mine, factors)):
            through = mosaic.products((C, TILE), across(tile))
            state_shares(tile, left(tile))
            before_s[tile, 0] = (dq[at] + through * (from_start * scale)).astype(dtype)
            db[at] += load(q_s.at[tile]) * through
            keys_and_gates(tile, dk[at], db[at], to_end, turned(p_s), p_s, decayed)
          return kept()

        states = easily(states) if zero is None else hardly(states)
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
        gates = load_gates(jnp.minimum(n + 1, steps - 1))
        meet()
        pl.when((w == 0) & (n + 1 < steps))(lambda: fetch_values(n + 1))
        pl.when((w == 0) & (n + 2 < steps))(lambda: fetch_keys(n + 2))
        for t, x in zip(my_values, dv):
          d_s[t, 0] = x.astype(dtype)
        plgpu.commit_smem()
        for tile in mine:
          here = batch, rows(n), head, columns(tile)
          plgpu.copy_smem_to_gmem(before_s.at[tile, 0], dq_hbm.at[here])
          plgpu.copy_smem_to_gmem(before_s.at[tile, 1], dk_hbm.at[here])
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
      states = chunk_by_chunk(steps, prepare, step, states, load_gates(jnp.int32(0)))

      @pl.when(segment == 0)
      def _():
        for t, columns_of in zip(my_values, states):
          for tile in range(tiles):
            start_hbm[batch, head, columns(tile), columns(t)] = columns_of[tile]

      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    barrier = lambda arrivals, **more: plgpu.Barrier(num_arrivals=arrivals, **more)
    pl.run_scoped(
      run,
      tile(2, tiles), tile(2, tiles), tile(value_tiles), tile(value_tiles),
      tile(tiles, max(2, value_tiles)), None if documents is None else vectors(2, C),
      tile(2, tiles), tile(), tile(2), tile(max(2, value_tiles), tiles), vectors(2, K), vectors(K),
      barrier(2 * tiles + (documents is not None), num_barriers=2), barrier(2 * value_tiles),
      barrier(tiles * value_tiles), barrier(W),
      collective_axes="thread",
    )  # fmt: skip

  like = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((B, T, H, *shape), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[
      like(K), like(K), like(V), like(K, dtype=log_decay.dtype),
      jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
      jax.ShapeDtypeStruct((B, H, S, K, V), jnp.float32),
    ],
    grid=(S, H, B),
    grid_names=("segment", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, do, log_decay, documents, before, ends)[:-1]  # fmt: skip
