"""Gradients of the delta rule's queries, keys, gates and steps, one chunk to a program.

The formulas are those of `delta_rule_backward.py`. A warpgroup has 64 columns of K, and shares M
and N with the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_gates import (
  BETA,
  FROM_START,
  TO_END,
  pairs,
  sums_from_each_on,
  written_only,
)
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_rows
from ops.kernels.gpu.scalar_decay import CHUNK

TILE = 64


def gradients(q, k, do, dv, written, gates, before, after, scale: float, interpret=None):
  """dq, dk [B T H K] of each value head, and float32 [B H 2 T]: the gradients of the gates and of
  beta.

  Args:
    q, k, do, dv: [B T Hq K], [B T H V], T a multiple of the chunk.
    written: [B H N V C] like `q`, V'.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    before, after: [B H N V K] like `q`, the states before and their gradients after each chunk.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  key_tiles, value_tiles = K // TILE, V // TILE
  W = key_tiles
  columns = lambda tile: pl.ds(tile * TILE, TILE)

  def kernel(q_hbm, k_hbm, do_hbm, dv_hbm, written_hbm, gates_hbm, before_hbm, after_hbm, *outputs):
    dq_hbm, dk_hbm, sums_hbm = outputs
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")
    rows = pl.ds(chunk * C, C)

    def run(q_s, k_s, value_s, written_s, states_s, m_s, n_s, gates_s, sums_s, *barriers):
      values_full, keys_full, states_full, met = barriers
      before_s, after_s = states_s.at[0], states_s.at[1]
      db_s, linked_s, columns_s, out_s = sums_s
      load = lambda ref: plgpu.load(ref, layout=WGMMA)
      wide = lambda x: x.astype(jnp.float32)
      vector = lambda row: plgpu.load(gates_s.at[row], layout=WGMMA.reduce(1))
      along = lambda x: along_rows(x, TILE)
      together = functools.partial(mosaic.sums_together, simulated, (C, TILE))
      values = range(value_tiles)

      def meet(n):
        plgpu.barrier_arrive(met.at[n])
        plgpu.barrier_wait(met.at[n])

      @pl.when(w == 0)
      def _():
        plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, chunk], gates_s, values_full)
        for t in values:
          for n, source in enumerate((do_hbm, dv_hbm)):
            here = source.at[batch, rows, head, columns(t)]
            plgpu.copy_gmem_to_smem(here, value_s.at[n, t], values_full)
          here = written_hbm.at[batch, head, chunk, columns(t)]
          plgpu.copy_gmem_to_smem(here, written_s.at[t], values_full)
        for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
          for j in range(key_tiles):
            here = source.at[batch, rows, key_head, columns(j)]
            plgpu.copy_gmem_to_smem(here, target.at[j], keys_full)
        for n, source in enumerate((before_hbm, after_hbm)):
          for t in values:
            for j in range(key_tiles):
              here = source.at[batch, head, chunk, columns(t), columns(j)]
              plgpu.copy_gmem_to_smem(here, states_s.at[n, j, t], states_full.at[n])

      def weigh(n, factor, target):
        """factor dO V'^T, or dV V'^T, decayed between the two tokens."""
        (products,), decays = together(
          [(None, [(value_s.at[n, t], written_s.at[t]) for t in values])],
          lambda: pairs(gates_s, n == 0, factor),
        )
        target[...] = (products * decays).astype(dtype)

      plgpu.barrier_wait(values_full)
      for n, factor, target in ((0, scale, m_s), (1, -1.0, n_s)):
        # Two warpgroups make one each.
        pl.when((w == n) | (W == 1))(functools.partial(weigh, n, factor, target))
      plgpu.commit_smem()
      meet(0)

      plgpu.barrier_wait(keys_full)
      plgpu.barrier_wait(states_full.at[0])
      q, k = q_s.at[w], k_s.at[w]
      across = lambda n: (None, [(value_s.at[n, t], before_s.at[w, t]) for t in values])
      (dq, dk), from_start = together([across(0), across(1)], lambda: vector(FROM_START))
      (dq, dk, inner), (q, k) = together(
        [
          (dq * along(from_start * scale), [(m_s, k)]),
          (dk * along(-from_start), [(n_s, k)]),
          (None, [(m_s.transpose((1, 0)), q), (n_s.transpose((1, 0)), k)]),
        ],
        lambda: (wide(load(q)), wide(load(k))),
      )
      db = (dq * q + dk * k).sum(1)

      def link():
        """Shares of <S, dS'> exp(b_C)."""
        total = jnp.zeros((), jnp.float32)
        for t in values:
          total += (wide(load(before_s.at[w, t])) * wide(load(after_s.at[w, t]))).sum(1)
        return total * gates_s[FROM_START, C - 1]

      plgpu.barrier_wait(states_full.at[1])
      terms = [(written_s.at[t].transpose((1, 0)), after_s.at[w, t]) for t in values]
      (outer,), (to_end, linked) = together([(None, terms)], lambda: (vector(TO_END), link()))
      outer = outer * along(to_end)
      from_inner, from_outer = (inner * k).sum(1), (outer * k).sum(1)
      db_s[w] = db - from_inner - from_outer
      linked_s[w], columns_s[w] = linked + from_outer, from_inner + from_outer
      written = along(written_only(gates_s, 1.0, 1))
      q_s[w], k_s[w] = dq.astype(dtype), (dk + (inner + outer) * written).astype(dtype)
      plgpu.commit_smem()
      for source, target in ((q_s, dq_hbm), (k_s, dk_hbm)):
        plgpu.copy_smem_to_gmem(source.at[w], target.at[batch, rows, head, columns(w)])
      meet(1)

      @pl.when(w == 0)
      def _():
        share = lambda ref, axis: sum(
          plgpu.load(ref.at[n], layout=WGMMA.reduce(axis)) for n in range(W)
        )
        out_s[0] = sums_from_each_on(gates_s, share(db_s, 0), share(linked_s, 0))
        out_s[1] = share(columns_s, 1) / vector(BETA)
        plgpu.commit_smem()
        for n in range(2):
          plgpu.copy_smem_to_gmem(out_s.at[n], sums_hbm.at[batch, head, n, rows])

      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    numbers = lambda *shape: plgpu.SMEM((*shape, C), jnp.float32)
    barrier = lambda arrivals, n=(): plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    pl.run_scoped(
      run,
      tile(key_tiles), tile(key_tiles), tile(2, value_tiles), tile(value_tiles),
      tile(2, key_tiles, value_tiles), tile(), tile(),
      numbers(gates.shape[3]), (numbers(W), numbers(W), numbers(W), numbers(2)),
      barrier(1 + 3 * value_tiles), barrier(2 * key_tiles),
      barrier(key_tiles * value_tiles, 2), barrier(W, 2),
      collective_axes="thread",
    )  # fmt: skip

  keys = jax.ShapeDtypeStruct((B, T, H, K), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[keys, keys, jax.ShapeDtypeStruct((B, H, 2, T), jnp.float32)],
    grid=(T // C, H, B),
    grid_names=("chunk", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, do, dv, written, gates, before, after)
