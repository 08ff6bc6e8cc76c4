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
  CHUNK,
  TERMS,
  TILE,
  for_each_level,
  positions,
  store_split,
  sums,
)
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.vector_decay_gates import Documents


def gradients(
  q, k, log_decay, do, dv, written, carry, before, after, documents, scale: float, interpret=None
):
  """dq, dk [B T H K] like q, for each head of V, float32 dg [B T H K] and V' . dV [B H T].

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
    before_hbm, after_hbm, documents_hbm, dq_hbm, dk_hbm, dg_hbm, product_hbm = rest
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    rows = pl.ds(chunk * C, C)
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")
    tile = lambda n: pl.ds(n * TILE, TILE)

    def run(*refs):
      q_s, k_s, y_s, do_s, dv_s, written_s, state_s, m_s, n_s, *refs = refs
      split_s, carry_s, diagonal_s, spare_s, left_s, documents_s, mine, ready, met = refs

      def left(x, n=0):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        left_s[w, n] = x
        return left_s.at[w, n]

      def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

      def fetch_states(source, barrier):
        for t in range(blocks):
          for n in range(W):
            here = source.at[batch, head, chunk, tile(t), tile(n)]
            plgpu.copy_gmem_to_smem(here, state_s.at[t, n], ready[barrier])

      @pl.when(w == 0)
      def _():
        for t in range(blocks):
          for source, target in ((do_hbm, do_s), (dv_hbm, dv_s)):
            here = source.at[batch, rows, head, tile(t)]
            plgpu.copy_gmem_to_smem(here, target.at[t], ready[0])
          here = written_hbm.at[batch, head, chunk, tile(t)]
          plgpu.copy_gmem_to_smem(here, written_s.at[t], ready[0])
        fetch_states(before_hbm, 1)

      for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
        here = source.at[batch, rows, key_head, tile(w)]
        plgpu.copy_gmem_to_smem(here, target.at[w], mine.at[w])
      plgpu.copy_gmem_to_smem(carry_hbm.at[batch, head, chunk, tile(w)], carry_s.at[w], mine.at[w])

      if documents is not None:
        here = documents_hbm.at[batch, rows]
        plgpu.copy_gmem_to_smem(here, documents_s.at[w], mine.at[w])

      wide = lambda x: x.astype(jnp.float32)
      total = lambda terms: mosaic.products((C, TILE), terms)
      i, j = positions()
      split = split_s.at[w]
      g = plgpu.load(g_hbm.at[batch, rows, head, tile(w)], layout=WGMMA, optimized=False)
      store_split(g, split)
      from_start = jnp.exp(sums(i >= j, split, left))
      plgpu.barrier_wait(mine.at[w])
      document = None if documents is None else Documents(documents_s.at[w])
      together = lambda mask: mask if document is None else mask & document.pairs()
      if document is not None:
        from_start = document.before(from_start)

      plgpu.barrier_wait(ready[0])

      def pairs(source, factor, target, diagonal):
        """factor source V'^T, rounded, below the diagonal; on it, float32."""
        x = total([(source.at[t], written_s.at[t]) for t in range(blocks)]) * factor
        diagonal[...] = jnp.where(i == j, x, 0).sum(1)
        target[...] = jnp.where(together(i > j), x, 0).astype(dtype)

      # Two warpgroups make one each.
      pl.when(w == 0)(lambda: pairs(do_s, scale, m_s, diagonal_s.at[0]))
      pl.when(w == W - 1)(lambda: pairs(dv_s, -1.0, n_s, diagonal_s.at[1]))
      plgpu.commit_smem()
      meet()
      pl.when(w == 0)(
        lambda: plgpu.copy_smem_to_gmem(diagonal_s.at[1], product_hbm.at[batch, head, rows])
      )

      plgpu.barrier_wait(ready[1])
      q, k = (plgpu.load(x.at[w], layout=WGMMA) for x in (q_s, k_s))
      states = [plgpu.load(state_s.at[t, w], layout=WGMMA) for t in range(blocks)]
      read = lambda x: total([(x.at[t], state_s.at[t, w]) for t in range(blocks)]) * from_start
      dq, dk = read(do_s) * scale, -read(dv_s)
      meet()
      pl.when(w == 0)(lambda: fetch_states(after_hbm, 2))

      def level(carried, weights, opposite, kept):
        dq, dk, columns = carried
        q_s[w] = (wide(q) * weights).astype(dtype)
        k_s[w] = (wide(k) * weights).astype(dtype)
        y_s[w] = (wide(k) * opposite).astype(dtype)
        plgpu.commit_smem()
        i, j = positions()
        zero = jnp.zeros((), dtype)
        m, n = (jnp.where(kept(i, j), plgpu.load(x, layout=WGMMA), zero) for x in (m_s, n_s))
        dq += weights * total([(left(m, 0), y_s.at[w])])
        dk += weights * total([(left(n, 1), y_s.at[w])])
        m, n = (jnp.where(kept(j, i), transposed(x, simulated), zero) for x in (m_s, n_s))
        columns += opposite * total([(left(m, 2), q_s.at[w]), (left(n, 3), k_s.at[w])])
        return [dq, dk, columns]

      dq, dk, columns = for_each_level(
        split, spare_s.at[w], left, level, [dq, dk, mosaic.zeros(C, TILE)]
      )
      i, j = positions()
      # These weights come from the gates, whose place db, y and z take below.
      to_end = jnp.exp(sums(j > i, split, left))
      if document is not None:
        to_end = document.after(to_end)
      store_split(wide(q) * dq + wide(k) * (dk - columns), split)
      dg = sums(together(j >= i), split, left)
      own = along_rows(plgpu.load(diagonal_s.at[0], layout=WGMMA.reduce(1)), TILE)
      dq += own * wide(k)
      dk += own * wide(q) + columns

      plgpu.barrier_wait(ready[2])
      end = to_end * total(
        [(written_s.at[t].transpose((1, 0)), state_s.at[t, w]) for t in range(blocks)]
      )
      dk += end
      store_split(wide(k) * end, split)
      dg += sums(together(j < i), split, left)
      both = sum(
        wide(states[t]) * wide(plgpu.load(state_s.at[t, w], layout=WGMMA)) for t in range(blocks)
      )
      carry = plgpu.load(carry_s.at[w], layout=WGMMA.reduce(0))
      store_split(both * along_columns(carry, TILE), split)
      dg += sums(i == i, split, left)

      dg_hbm[batch, rows, head, tile(w)] = dg
      q_s[w] = dq.astype(dtype)
      k_s[w] = dk.astype(dtype)
      plgpu.commit_smem()
      for source, target in ((q_s, dq_hbm), (k_s, dk_hbm)):
        plgpu.copy_smem_to_gmem(source.at[w], target.at[batch, rows, head, tile(w)])
      plgpu.wait_smem_to_gmem(0)

    tiles = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    vectors = lambda n: plgpu.SMEM((n, TILE), jnp.float32)
    pl.run_scoped(
      lambda *refs: run(*refs[:-5], refs[-5], refs[-4:-1], refs[-1]),
      tiles(W), tiles(W), tiles(W), tiles(blocks), tiles(blocks), tiles(blocks),
      tiles(blocks, W), tiles(), tiles(), tiles(W, TERMS),
      vectors(W), vectors(2), vectors(W), tiles(W, 4) if simulated else None,
      None if documents is None else vectors(W),
      plgpu.Barrier(num_arrivals=3 if documents is None else 4, num_barriers=W),
      *(plgpu.Barrier(num_arrivals=n * blocks) for n in (3, W, W)),
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
  )(q, k, log_decay, do, dv, written, carry, before, after, documents)


def transposed(ref, simulated: bool) -> jax.Array:
  """A bfloat16 tile, transposed, in registers."""
  return ref[...].T if simulated else plgpu.load(ref.transpose((1, 0)), layout=WGMMA)
