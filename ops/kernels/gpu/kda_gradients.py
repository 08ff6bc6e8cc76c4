"""Gradients of the delta rule with a decay per row of the state, chunk by chunk.

With S the state before a chunk, dS' the gradient of the one after it, V' and dV as in
`kda_forward.py` and `kda_backward.py`, G the sums of gates from the chunk's start, and

  M_ij = scale dO_i . V'_j      N_ij = -dV_i . V'_j      E_ij = exp(G_i - G_j), one per row of S

  dQ = scale exp(G) (dO S^T) + sum_{j<i} M_ij E_ij k_j                      + M_ii k_i
  rows_i    = -exp(G_i) (dV S^T)_i + sum_{j<i} N_ij E_ij k_j
  columns_j = sum_{i>j} E_ij (M_ij q_i + N_ij k_i)
  end       = exp(G_C - G) (V' dS'^T)
  dK = rows + columns + end                                                 + M_ii q_i
  dg_t = sum_{i>=t} (q dQ + k (rows - columns))_i + sum_{i<t} (k end)_i + exp(G_C) <S, dS'>

where what stands at the right has no part in dg: a token sees itself without decay. And
dbeta_i = V'_i . dV_i / beta_i^2. A warpgroup has 64 of K.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.kda_gates import (
  AFTER,
  ALL,
  CHUNK,
  FROM,
  FROM_MIDDLE,
  TERMS,
  TILE,
  UP_TO,
  choices,
  for_each_level,
  largest,
  load_choice,
  positions,
  store_split,
  sums,
)
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.vector_decay_gates import Documents


def gradients(
  q, k, log_decay, do, dv, written, carry, before, after, documents, scale: float, interpret=None
):
  """dq, dk [B T H K] like q, for each head of V, float32 dg [B T H K] and -V' . dV [B H T].

  Args:
    q, k, do, dv: bfloat16 [B T Hq K], [B T H V], T a multiple of the chunk, H of Hq.
    log_decay: float32 [B T H K].
    written: [B H N V C] like `q`, V'.
    carry: float32 [B H N K], the decay over a chunk.
    before, after: [B H N V K] like `q`, the states before and their gradients after each chunk.
    documents: float32 [B T], starts of documents since the chunk's start, or None.
  """
  (B, T, H, K), Hq = log_decay.shape, q.shape[2]
  V, C, dtype, simulated = do.shape[-1], CHUNK, q.dtype, interpret is not None
  W, blocks = K // TILE, V // TILE

  def kernel(q_hbm, k_hbm, g_hbm, do_hbm, dv_hbm, written_hbm, carry_hbm, *rest):
    before_hbm, after_hbm, documents_hbm, choices_hbm, *outputs_hbm = rest
    dq_hbm, dk_hbm, dg_hbm, product_hbm = outputs_hbm
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    rows = pl.ds(chunk * C, C)
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")
    tile = lambda n: pl.ds(n * TILE, TILE)

    def run(*refs):
      q_s, k_s, y_s, do_s, dv_s, written_s, before_s, after_s, m_s, n_s, *refs = refs
      split_s, carry_s, diagonal_s, spare_s, left_s, documents_s, mine, pairs_ready, *refs = refs
      states_ready, met = refs

      def left(x, n=0):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        left_s[w, n] = x
        return left_s.at[w, n]

      @pl.when(w == 0)
      def _():
        for t in range(blocks):
          for source, target in ((do_hbm, do_s), (dv_hbm, dv_s)):
            here = source.at[batch, rows, head, tile(t)]
            plgpu.copy_gmem_to_smem(here, target.at[t], pairs_ready)
          here = written_hbm.at[batch, head, chunk, tile(t)]
          plgpu.copy_gmem_to_smem(here, written_s.at[t], pairs_ready)

      for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
        here = source.at[batch, rows, key_head, tile(w)]
        plgpu.copy_gmem_to_smem(here, target.at[w], mine.at[w])
      plgpu.copy_gmem_to_smem(carry_hbm.at[batch, head, chunk, tile(w)], carry_s.at[w], mine.at[w])
      if documents is not None:
        here = documents_hbm.at[batch, rows]
        plgpu.copy_gmem_to_smem(here, documents_s.at[w], mine.at[w])
      for source, target in ((before_hbm, before_s), (after_hbm, after_s)):
        for t in range(blocks):
          here = source.at[batch, head, chunk, tile(t), tile(w)]
          plgpu.copy_gmem_to_smem(here, target.at[t, w], states_ready.at[w])

      wide = lambda x: x.astype(jnp.float32)
      total = lambda terms: mosaic.products((C, TILE), terms)
      i, j = positions()
      split = split_s.at[w]
      g = plgpu.load(g_hbm.at[batch, rows, head, tile(w)], layout=WGMMA, optimized=False)
      store_split(g, split)
      plgpu.barrier_wait(mine.at[w])
      q, k = (plgpu.load(x.at[w], layout=WGMMA) for x in (q_s, k_s))
      document = None if documents is None else Documents(documents_s.at[w])
      plgpu.barrier_wait(pairs_ready)

      def pairs(source, factor, target, diagonal):
        """factor source V'^T, rounded, below the diagonal; on it, float32."""
        x = total([(source.at[t], written_s.at[t]) for t in range(blocks)]) * factor
        diagonal[...] = jnp.where(i == j, x, 0).sum(1)
        kept = i > j if document is None else (i > j) & document.pairs()
        target[...] = jnp.where(kept, x, 0).astype(dtype)

      # Two warpgroups make one each.
      pl.when(w == 0)(lambda: pairs(do_s, scale, m_s, diagonal_s.at[0]))
      pl.when(w == W - 1)(lambda: pairs(dv_s, -1.0, n_s, diagonal_s.at[1]))
      plgpu.commit_smem()
      plgpu.barrier_arrive(met)
      plgpu.barrier_wait(met)

      def level(carried, weights, opposite, kept):
        dq, dk, columns = carried
        q_s[w] = (wide(q) * weights).astype(dtype)
        k_s[w] = (wide(k) * weights).astype(dtype)
        y_s[w] = (wide(k) * opposite).astype(dtype)
        plgpu.commit_smem()
        if kept is None:
          operands = [(m_s, n_s), (m_s.transpose((1, 0)), n_s.transpose((1, 0)))]
        else:
          i, j = positions()
          some = lambda mask, x: jnp.where(mask, x, jnp.zeros((), dtype))
          load = lambda x: plgpu.load(x, layout=WGMMA)
          turned = lambda x: transposed(x, simulated)
          operands = [
            [left(some(kept(i, j), load(x)), n) for n, x in enumerate((m_s, n_s))],
            [left(some(kept(j, i), turned(x)), 2 + n) for n, x in enumerate((m_s, n_s))],
          ]
        (m, n), (m_turned, n_turned) = operands
        dq += weights * total([(m, y_s.at[w])])
        dk += weights * total([(n, y_s.at[w])])
        columns += opposite * total([(m_turned, q_s.at[w]), (n_turned, k_s.at[w])])
        return [dq, dk, columns]

      choice = lambda n: load_choice(choices_hbm, n)
      middle, spare, none = left(choice(FROM_MIDDLE)), spare_s.at[w], [mosaic.zeros(C, TILE)] * 3
      decide = lambda: largest(spare)
      dq, dk, columns = for_each_level(middle, choices_hbm, split, spare, decide, left, level, none)
      plgpu.barrier_wait(states_ready.at[w])
      factors = lambda n: jnp.exp(sums(left(choice(n)), split))
      read = lambda x: total([(x.at[t], before_s.at[t, w]) for t in range(blocks)])
      from_start = factors(UP_TO)
      if document is not None:
        from_start = document.before(from_start)
      dq += read(do_s) * (from_start * scale)
      dk -= read(dv_s) * from_start
      db = wide(q) * dq + wide(k) * (dk - columns)
      own = along_rows(plgpu.load(diagonal_s.at[0], layout=WGMMA.reduce(1)), TILE)
      q_s[w] = (dq + own * wide(k)).astype(dtype)
      dk += columns + own * wide(q)

      end = factors(AFTER)
      if document is not None:
        end = document.after(end)
      turned = [(written_s.at[t].transpose((1, 0)), after_s.at[t, w]) for t in range(blocks)]
      end *= total(turned)
      k_s[w] = (dk + end).astype(dtype)
      plgpu.commit_smem()
      for source, target in ((q_s, dq_hbm), (k_s, dk_hbm)):
        plgpu.copy_smem_to_gmem(source.at[w], target.at[batch, rows, head, tile(w)])

      # All that ends after the chunk, less what begins in it after the token.
      end *= wide(k)
      store_split(db - end, split)
      later = choice(FROM)
      if document is not None:
        later = jnp.where(document.pairs(), later, jnp.zeros((), dtype))
      dg = sums(left(later), split)
      load = lambda x, t: wide(plgpu.load(x.at[t, w], layout=WGMMA))
      carry = plgpu.load(carry_s.at[w], layout=WGMMA.reduce(0))
      kept = sum(load(before_s, t) * load(after_s, t) for t in range(blocks))
      store_split(kept * along_columns(carry, TILE) + end, split)
      constant = sums(left(choice(ALL)), split)
      dg += constant if document is None else document.after(constant)
      dg_hbm[batch, rows, head, tile(w)] = dg
      pl.when(w == 0)(
        lambda: plgpu.copy_smem_to_gmem(diagonal_s.at[1], product_hbm.at[batch, head, rows])
      )
      plgpu.wait_smem_to_gmem(0)

    tiles = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda n: plgpu.SMEM((n, TILE), jnp.float32)
    pl.run_scoped(
      run,
      tiles(W), tiles(W), tiles(W), tiles(blocks), tiles(blocks), tiles(blocks),
      tiles(blocks, W), tiles(blocks, W), tiles(), tiles(), tiles(W, TERMS),
      vectors(W), vectors(2), vectors(W), tiles(W, 4) if simulated else None,
      None if documents is None else vectors(W),
      plgpu.Barrier(num_arrivals=3 if documents is None else 4, num_barriers=W),
      plgpu.Barrier(num_arrivals=3 * blocks),
      plgpu.Barrier(num_arrivals=2 * blocks, num_barriers=W),
      plgpu.Barrier(num_arrivals=W),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  keys = struct(log_decay.shape, dtype)
  return plgpu.kernel(
    kernel,
    out_type=[keys, keys, struct(log_decay.shape, jnp.float32), struct((B, H, T), jnp.float32)],
    grid=(T // C, H, B),
    grid_names=("chunk", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, log_decay, do, dv, written, carry, before, after, documents, choices())


def transposed(ref, simulated: bool) -> jax.Array:
  """A bfloat16 tile, transposed, in registers."""
  return ref[...].T if simulated else plgpu.load(ref.transpose((1, 0)), layout=WGMMA)
