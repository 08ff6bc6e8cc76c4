"""Gradients of the delta rule's queries, keys, gates and steps, two chunks to a program.

The formulas are those of `delta_rule_backward.py`. Memory is what this takes: of two chunks, the
state before the first is read, and the gradient of the state after the second; what lies between
them is made again. A warpgroup has 64 columns of K, and shares M and N with the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_forward import load_transposed
from ops.kernels.gpu.delta_rule_gates import EVERY, FROM_START, TO_END, pairs
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.scalar_decay import CHUNK

TILE = 64


def gradients(q, k, do, dv, written, gates, before, after, scale: float, interpret=None):
  """dq, dk [B T H K] of each value head, and float32 [B H W 3 T]: db, parts of <S', dS'> that each
  chunk sums, and V' . dV; W shares are to be added.

  Args:
    q, k, do, dv: [B T Hq K], [B T H V], T a multiple of two chunks.
    written: [B H N V C] like `q`, V'.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    before, after: [B H N/2 V K] like `q`, the states before each pair of chunks, and the gradients
      of the states after it.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  key_tiles, value_tiles = K // TILE, V // TILE
  W = key_tiles
  columns = lambda tile: pl.ds(tile * TILE, TILE)

  def kernel(q_hbm, k_hbm, do_hbm, dv_hbm, written_hbm, gates_hbm, before_hbm, after_hbm, *outputs):
    dq_hbm, dk_hbm, sums_out = outputs
    batch, head, pair = (lax.axis_index(name) for name in ("batch", "head", "pair"))
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")
    mine = columns(w)

    def run(q_s, k_s, value_s, written_s, state_s, m_s, n_s, left_s, gates_s, out_s, *barriers):
      values_full, keys_full, before_full, after_full, met = barriers
      # The gradient of the state takes the place of the first chunk's dO and dV.
      dstate_s = value_s.at[0]
      rows = lambda c: pl.ds((pair * EVERY + c) * C, C)
      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)
      total = lambda terms: mosaic.products((C, TILE), terms)

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        left_s[w, n] = x
        return left_s.at[w, n]

      def meet(n):
        plgpu.barrier_arrive(met.at[n])
        plgpu.barrier_wait(met.at[n])

      def fetch_states(source, target, barrier):
        for t in range(value_tiles):
          for j in range(key_tiles):
            here = source.at[batch, head, pair, columns(t), columns(j)]
            plgpu.copy_gmem_to_smem(here, target.at[j, t], barrier)

      def fetch_values(c):
        for t in range(value_tiles):
          for n, source in enumerate((do_hbm, dv_hbm)):
            here = source.at[batch, rows(c), head, columns(t)]
            plgpu.copy_gmem_to_smem(here, value_s.at[c, n, t], values_full.at[c])
          here = written_hbm.at[batch, head, pair * EVERY + c, columns(t)]
          plgpu.copy_gmem_to_smem(here, written_s.at[c, t], values_full.at[c])
        here = gates_hbm.at[batch, head, pair * EVERY + c]
        plgpu.copy_gmem_to_smem(here, gates_s.at[c], values_full.at[c])

      def fetch_keys(c):
        for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
          for j in range(key_tiles):
            here = source.at[batch, rows(c), key_head, columns(j)]
            plgpu.copy_gmem_to_smem(here, target.at[c, j], keys_full.at[c])

      @pl.when(w == 0)
      def _():
        fetch_values(0)
        fetch_keys(0)
        fetch_states(before_hbm, state_s, before_full)
        fetch_values(1)
        fetch_keys(1)

      def weigh(c, n, factor, target):
        """factor dO V'^T, or dV V'^T, decayed between the two tokens."""
        products = total([(value_s.at[c, n, t], written_s.at[c, t]) for t in range(value_tiles)])
        factors = pairs(gates_s.at[c], diagonal=n == 0) * factor
        target[...] = (products * factors).astype(dtype)

      def rows_and_inner_columns(c):
        """dq, dk without what comes from the state after the chunk, and db so far."""
        plgpu.barrier_wait(values_full.at[c])
        for n, factor, target in ((0, scale, m_s), (1, -1.0, n_s)):
          # Two warpgroups make one each.
          pl.when((w == n) | (W == 1))(functools.partial(weigh, c, n, factor, target))
        plgpu.commit_smem()
        meet(2 * c)
        plgpu.barrier_wait(keys_full.at[c])
        if c == 0:
          plgpu.barrier_wait(before_full)
        q, k = q_s.at[c, w], k_s.at[c, w]
        from_start = plgpu.load(gates_s.at[c, FROM_START], layout=WGMMA.reduce(1))
        across = lambda n: total(
          [(value_s.at[c, n, t], state_s.at[w, t]) for t in range(value_tiles)]
        )
        dq = across(0) * along_rows(from_start * scale, TILE) + total([(m_s, k)])
        dk = total([(n_s, k)]) - across(1) * along_rows(from_start, TILE)
        db = (dq * load(q) + dk * load(k)).sum(1)
        inner = total([(m_s.transpose((1, 0)), q), (n_s.transpose((1, 0)), k)])
        db -= (inner * load(k)).sum(1)
        return dq, dk + inner, db

      def outer_columns(c):
        """What the keys get from the state after the chunk."""
        to_end = plgpu.load(gates_s.at[c, TO_END], layout=WGMMA.reduce(1))
        terms = [
          (written_s.at[c, t].transpose((1, 0)), dstate_s.at[w, t]) for t in range(value_tiles)
        ]
        return total(terms) * along_rows(to_end, TILE)

      def of_written(c):
        """V' . dV, a share of it."""
        total = jnp.zeros((), jnp.float32)
        for t in range(value_tiles):
          values = load_transposed(written_s.at[c, t], simulated)
          total += (values * load(value_s.at[c, 1, t])).sum(1)
        return total * (1 / W)

      def along(row, c):
        return along_columns(plgpu.load(gates_s.at[c, row], layout=WGMMA.reduce(0)), TILE)

      def accumulate(start, terms):
        terms = [(left(n, x.astype(dtype)), right) for n, (x, right) in enumerate(terms)]
        return mosaic.accumulate_and(simulated, start, terms, lambda: None)[0]

      dq, dk_first, db_first = rows_and_inner_columns(0)
      product_first = of_written(0)
      # The state between the two chunks; each warpgroup has columns of its own.
      between = []
      for t in range(value_tiles):
        start = load(state_s.at[w, t]) * gates_s[0, FROM_START, C - 1]
        weighted = load(written_s.at[0, t]) * along(TO_END, 0)
        between.append(accumulate(start, [(weighted, k_s.at[0, w])]).astype(dtype))
        state_s[w, t] = between[t]
      q_s[0, w] = dq.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s.at[0, w], dq_hbm.at[batch, rows(0), head, mine])
      meet(1)
      pl.when(w == 0)(lambda: fetch_states(after_hbm, dstate_s, after_full))

      dq, dk, db = rows_and_inner_columns(1)
      plgpu.barrier_wait(after_full)
      outer = outer_columns(1)
      constant = (outer * load(k_s.at[1, w])).sum(1)
      db -= constant
      for t in range(value_tiles):
        dstate = load(dstate_s.at[w, t]) * gates_s[1, FROM_START, C - 1]
        constant += (between[t].astype(jnp.float32) * dstate).sum(1)
        from_start = along(FROM_START, 1)
        terms = [
          (load_transposed(value_s.at[1, 0, t], simulated) * (from_start * scale), q_s.at[1, w]),
          (-load_transposed(value_s.at[1, 1, t], simulated) * from_start, k_s.at[1, w]),
        ]
        dstate_s[w, t] = accumulate(dstate, terms).astype(dtype)
      for n, x in enumerate((db, constant, of_written(1))):
        out_s[w, 1, n] = x
      q_s[1, w] = dq.astype(dtype)
      k_s[1, w] = (dk + outer).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s.at[1, w], dq_hbm.at[batch, rows(1), head, mine])
      plgpu.copy_smem_to_gmem(k_s.at[1, w], dk_hbm.at[batch, rows(1), head, mine])

      outer = outer_columns(0)
      db_first -= (outer * load(k_s.at[0, w])).sum(1)
      constant = jnp.zeros((), jnp.float32)
      for t in range(value_tiles):
        constant += (between[t].astype(jnp.float32) * load(dstate_s.at[w, t])).sum(1)
      for n, x in enumerate((db_first, constant, product_first)):
        out_s[w, 0, n] = x
      k_s[0, w] = (dk_first + outer).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(k_s.at[0, w], dk_hbm.at[batch, rows(0), head, mine])
      for c in range(EVERY):
        for n in range(3):
          target = sums_out.at[batch, head, w, n, rows(c)]
          plgpu.copy_smem_to_gmem(out_s.at[w, c, n], target)
      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    values, keys, states = 3 * value_tiles + 1, 2 * key_tiles, key_tiles * value_tiles
    pl.run_scoped(
      run,
      tile(EVERY, key_tiles), tile(EVERY, key_tiles), tile(EVERY, 2, value_tiles),
      tile(EVERY, value_tiles), tile(key_tiles, value_tiles), tile(), tile(),
      tile(W, 2) if simulated else None,
      plgpu.SMEM((EVERY, *gates.shape[3:]), jnp.float32),
      plgpu.SMEM((W, EVERY, 3, C), jnp.float32),
      plgpu.Barrier(num_arrivals=values, num_barriers=EVERY),
      plgpu.Barrier(num_arrivals=keys, num_barriers=EVERY),
      plgpu.Barrier(num_arrivals=states), plgpu.Barrier(num_arrivals=states),
      plgpu.Barrier(num_arrivals=W, num_barriers=3),
      collective_axes="thread",
    )  # fmt: skip

  keys = jax.ShapeDtypeStruct((B, T, H, K), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[keys, keys, jax.ShapeDtypeStruct((B, H, W, 3, T), jnp.float32)],
    grid=(T // (EVERY * C), H, B),
    grid_names=("pair", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, do, dv, written, gates, before, after)
