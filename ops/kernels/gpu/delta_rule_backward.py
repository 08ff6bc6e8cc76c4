"""Gradients of the delta rule with one decay per head: a scan from the right, then chunk by chunk.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates,
T and V' as in `delta_rule_forward.py`, A_ij = scale q_i . k_j exp(b_i - b_j) for i >= j:

  dV' = A^T dO + exp(b_C - b) (K dS')            dV  = T^T dV'
  dS  = exp(b_C) dS' + Q^T (scale exp(b) dO) - K^T (exp(b) dV)

  M_ij = scale dO_i . V'_j exp(b_i - b_j), i >= j         N_ij = -dV_i . V'_j exp(b_i - b_j), i > j
  dQ = scale exp(b) (dO S^T) + M K
  dK = N K - exp(b) (dV S^T)  +  M^T Q + N^T K + exp(b_C - b) (V' dS'^T)         rows  +  columns
  dbeta_i = V'_i . dV_i / beta_i^2
  db_i    = q_i . dq_i + k_i . (rows - columns)_i
  dg_t    = sum_{i >= t} db_i + <S', dS'>         S' = exp(b_C) S + K^T (exp(b_C - b) V')
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.delta_rule_forward import CHUNK, COLUMNS, HANDED, load_transposed
from ops.kernels.gpu.delta_rule_gates import FROM_START, TO_END, pairs
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows

TILE = 64


def state_gradients(
  q, k, do, gates, inverses, dstate, scale: float, stages: int = 2, interpret=None
):
  """dv [B T H V], the gradient of the initial state, float32 [B H V K], and in the dtype of q
  [B H N V K] the gradients of the state after each chunk.

  Args:
    q, k, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    inverses: [B H N n C C] like `q`, T as a sum of n terms.
    dstate: float32 [B H V K], the gradient of the final state.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  chunks = T // C
  stages, terms = min(stages, chunks), inverses.shape[3]

  def kernel(q_hbm, k_hbm, do_hbm, gates_hbm, inverses_hbm, last_hbm, dv_hbm, first_hbm, after_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    key_head = lax.div(head, jnp.int32(H // Hq))
    part = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)
    chunk = lambda n: chunks - 1 - n

    def run(q_s, k_s, do_s, inverse_s, scores_s, state_s, dv_s, left_s, gates_s, *barriers):
      full, consumed, ready, taken = barriers

      def left(n, x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        target = left_s.at[n, :, pl.ds(0, x.shape[1])]
        target[...] = x
        return target

      def fetch(n, slot):
        rows = pl.ds(chunk(n) * C, C)
        for source, target in (
          (k_hbm.at[batch, rows, key_head], k_s), (q_hbm.at[batch, rows, key_head], q_s),
          (do_hbm.at[batch, rows, head, part], do_s),
          (gates_hbm.at[batch, head, chunk(n)], gates_s),
        ):  # fmt: skip
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
        for term in range(terms):
          source = inverses_hbm.at[batch, head, chunk(n), term]
          plgpu.copy_gmem_to_smem(source, inverse_s.at[slot, term], full.at[slot])

      def solve(written, kept, from_start, weighted, slot, share):
        """dV^T = dV'^T T, shared as soon as it is there, and the gradient of the state before."""
        weigh = lambda dv: (-dv * along_columns(from_start, COLUMNS)).astype(dtype)
        systems = [inverse_s.at[slot, n] for n in range(terms)]
        if simulated:
          dv = mosaic.products((COLUMNS, C), [(left(2, written), x) for x in systems])
          share(dv)
          state = kept + mosaic.product((COLUMNS, K), left(3, weighted), q_s.at[slot])
          return state + mosaic.product((COLUMNS, K), left(4, weigh(dv)), k_s.at[slot])

        def body(solved, state):
          for system in systems:
            plgpu.wgmma(solved, written, system)
          state[...] = kept
          plgpu.wgmma(state, weighted, q_s.at[slot])
          dv = plgpu.wgmma_accumulator_load(solved, wait_n=1)
          plgpu.wgmma(state, weigh(dv), k_s.at[slot])
          share(dv)
          return state[...]

        accumulator = lambda width: plgpu.ACC((COLUMNS, width), jnp.float32)
        return pl.run_scoped(body, accumulator(C), accumulator(K))

      def carry(wait, release):
        # What does not wait for the state's gradient is done while the tensor cores work.
        def step(n, state):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          column = lambda row: plgpu.load(gates_s.at[slot, row], layout=WGMMA.reduce(0))
          along = lambda x: along_columns(x, COLUMNS)
          narrow = state.astype(dtype)

          def while_reading():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            state_s[...] = narrow
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s, after_hbm.at[batch, head, chunk(n), part])
            values, from_start = load_transposed(do_s.at[slot], simulated), column(FROM_START)
            weighted = (values * along(from_start * scale)).astype(dtype)
            plgpu.barrier_wait(ready.at[hand])
            inside, (to_end, kept) = mosaic.product_and(
              (COLUMNS, C),
              left(1, values.astype(dtype)),
              scores_s.at[hand],
              lambda: (column(TO_END), state * gates_s[slot, FROM_START, C - 1]),
            )
            plgpu.barrier_arrive(taken.at[hand])
            return inside, to_end, kept, from_start, weighted

          across, (inside, to_end, kept, from_start, weighted) = mosaic.product_and(
            (COLUMNS, C), left(0, narrow), k_s.at[slot].transpose((1, 0)), while_reading
          )
          written = (across * along(to_end) + inside).astype(dtype)

          def share(dv):
            store_transposed(dv_s, dv.astype(dtype), simulated)
            plgpu.commit_smem()
            rows = pl.ds(chunk(n) * C, C)
            plgpu.copy_smem_to_gmem(dv_s, dv_hbm.at[batch, rows, head, part])

          state = solve(written, kept, from_start, weighted, slot, share)
          release(slot)
          return state

        start = plgpu.load(last_hbm.at[batch, head, part], layout=WGMMA, optimized=False)
        first_hbm[batch, head, part] = lax.fori_loop(0, chunks, step, start)
        plgpu.wait_smem_to_gmem(0)

      def score(wait, release):
        @pl.loop(jnp.int32(0), jnp.int32(chunks))
        def _(n):
          slot, hand = wait(n), lax.rem(n, jnp.int32(HANDED))
          scores, decays = mosaic.product_and(
            (C, C),
            q_s.at[slot],
            k_s.at[slot].transpose((1, 0)),
            lambda: pairs(gates_s.at[slot], diagonal=True) * scale,
          )
          release(slot)
          pl.when(n >= HANDED)(lambda: plgpu.barrier_wait(taken.at[hand]))
          scores_s[hand] = (scores * decays).astype(dtype)
          plgpu.commit_smem()
          plgpu.barrier_arrive(ready.at[hand])

        for n in range(max(chunks - HANDED, 0), chunks):
          plgpu.barrier_wait(taken.at[n % HANDED])

      def both(wait, release):
        thread = lax.axis_index("thread")
        pl.when(thread == 0)(lambda: carry(wait, release))
        pl.when(thread == 1)(lambda: score(wait, release))

      mosaic.load_and_read(jnp.int32(chunks), stages, 2, fetch, both, full, consumed, simulated)

    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(stages, C, K), tile(stages, C, K), tile(stages, C, COLUMNS), tile(stages, terms, C, C),
      tile(HANDED, C, C), tile(COLUMNS, K), tile(C, COLUMNS),
      tile(5, COLUMNS, K) if simulated else None,
      plgpu.SMEM((stages, *gates.shape[3:]), jnp.float32),
      plgpu.Barrier(num_arrivals=4 + terms, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      plgpu.Barrier(num_arrivals=1, num_barriers=HANDED),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  return plgpu.kernel(
    kernel,
    out_type=[
      struct(do.shape, dtype), struct((B, H, V, K), jnp.float32),
      struct((B, H, chunks, V, K), dtype),
    ],
    grid=(V // COLUMNS, H, B),
    grid_names=("block", "head", "batch"),
    num_threads=3,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, do, gates, inverses, dstate)  # fmt: skip


def store_transposed(ref, x, simulated: bool):
  """A bfloat16 tile [M N] from x [N M]."""
  if simulated:
    ref[...] = x.T
  else:
    ref.transpose((1, 0))[...] = x


def gradients(q, k, do, dv, written, gates, before, after, scale: float, interpret=None):
  """dq, dk [B T H K] of each value head, and float32 [B H W 3 T]: db, parts of <S', dS'> that each
  chunk sums, and V' . dV; W shares are to be added.

  Args:
    q, k, do, dv: [B T Hq K], [B T H V], T a multiple of the chunk.
    written: [B H N V C] like `q`, V'.
    gates: float32 [B H N R C], of `delta_rule_gates`.
    before, after: [B H N V K] like `q`, the states before and their gradients after each chunk.
  """
  (B, T, H, V), (Hq, K) = do.shape, q.shape[2:]
  C, dtype = CHUNK, q.dtype
  W = 2 if K == V == 128 else 1
  key_tiles, value_tiles = K // TILE, V // TILE
  mine = key_tiles // W
  columns = lambda tile: pl.ds(tile * TILE, TILE)

  def kernel(q_hbm, k_hbm, do_hbm, dv_hbm, written_hbm, gates_hbm, before_hbm, after_hbm, *outputs):
    dq_hbm, dk_hbm, sums_out = outputs
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    key_head = lax.div(head, jnp.int32(H // Hq))
    rows = pl.ds(chunk * C, C)
    w = lax.axis_index("thread")

    def run(q_s, k_s, do_s, dv_s, written_s, state_s, m_s, n_s, gates_s, out_s, ready, met):
      def meet(n):
        plgpu.barrier_arrive(met.at[n])
        plgpu.barrier_wait(met.at[n])

      def fetch_states(source, barrier):
        for i in range(value_tiles):
          for j in range(key_tiles):
            here = source.at[batch, head, chunk, columns(i), columns(j)]
            plgpu.copy_gmem_to_smem(here, state_s.at[i, j], ready[barrier])

      @pl.when(w == 0)
      def _():
        plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, chunk], gates_s, ready[0])
        for source, target, tiles, at in (
          (q_hbm, q_s, key_tiles, key_head), (k_hbm, k_s, key_tiles, key_head),
          (do_hbm, do_s, value_tiles, head), (dv_hbm, dv_s, value_tiles, head),
        ):  # fmt: skip
          for i in range(tiles):
            here = source.at[batch, rows, at, columns(i)]
            plgpu.copy_gmem_to_smem(here, target.at[i], ready[0])
        for i in range(value_tiles):
          here = written_hbm.at[batch, head, chunk, columns(i)]
          plgpu.copy_gmem_to_smem(here, written_s.at[i], ready[0])
        fetch_states(before_hbm, 1)

      plgpu.barrier_wait(ready[0])
      factor = lambda row: plgpu.load(gates_s.at[row], layout=WGMMA.reduce(1))
      from_start, to_end, kept = factor(FROM_START), factor(TO_END), gates_s[FROM_START, C - 1]
      total = lambda terms: mosaic.products((C, TILE), terms)
      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

      def weigh(left, factor, diagonal, target):
        """factor left V'^T exp(b_i - b_j), rounded, below the diagonal or with it."""
        products = total([(left.at[t], written_s.at[t]) for t in range(value_tiles)])
        target[...] = (products * (pairs(gates_s, diagonal) * factor)).astype(dtype)

      # Two warpgroups make one each.
      if W == 1:
        weigh(do_s, scale, True, m_s)
        weigh(dv_s, -1.0, False, n_s)
      else:
        pl.when(w == 0)(lambda: weigh(do_s, scale, True, m_s))
        pl.when(w == 1)(lambda: weigh(dv_s, -1.0, False, n_s))
      plgpu.commit_smem()
      meet(0)

      plgpu.barrier_wait(ready[1])
      db = jnp.zeros((), jnp.float32)
      dq, dk, states = [], [], []
      for tile in range(mine):
        at = w * mine + tile
        keys = load(k_s.at[at])
        across = total([(do_s.at[t], state_s.at[t, at]) for t in range(value_tiles)])
        dq.append(across * along_rows(from_start * scale, TILE) + total([(m_s, k_s.at[at])]))
        across = total([(dv_s.at[t], state_s.at[t, at]) for t in range(value_tiles)])
        dk.append(total([(n_s, k_s.at[at])]) - across * along_rows(from_start, TILE))
        db += (dq[-1] * load(q_s.at[at]) + dk[-1] * keys).sum(1)
        states.append([plgpu.load(state_s.at[t, at], layout=WGMMA) for t in range(value_tiles)])
      meet(1)
      pl.when(w == 0)(lambda: fetch_states(after_hbm, 2))

      last = [
        total([
          (m_s.transpose((1, 0)), q_s.at[w * mine + tile]),
          (n_s.transpose((1, 0)), k_s.at[w * mine + tile]),
        ])
        for tile in range(mine)
      ]  # fmt: skip
      product = jnp.zeros((), jnp.float32)
      for t in range(value_tiles // W):
        at = w * (value_tiles // W) + t
        values = load_transposed(written_s.at[at], interpret is not None)
        product += (values * load(dv_s.at[at])).sum(1)
      plgpu.barrier_wait(ready[2])
      constant = jnp.zeros((), jnp.float32)
      for tile in range(mine):
        at = w * mine + tile
        keys = load(k_s.at[at])
        across = total(
          [(written_s.at[t].transpose((1, 0)), state_s.at[t, at]) for t in range(value_tiles)]
        ) * along_rows(to_end, TILE)  # fmt: skip
        constant += (across * keys).sum(1)
        across += last[tile]
        db -= (across * keys).sum(1)
        dk[tile] += across
        for t in range(value_tiles):
          both = states[tile][t].astype(jnp.float32) * load(state_s.at[t, at])
          constant += both.sum(1) * kept
      meet(2)

      for n, x in enumerate((db, constant, product)):
        out_s[w, n] = x
      for tile in range(mine):
        q_s[w * mine + tile] = dq[tile].astype(dtype)
        k_s[w * mine + tile] = dk[tile].astype(dtype)
      plgpu.commit_smem()
      for n in range(3):
        plgpu.copy_smem_to_gmem(out_s.at[w, n], sums_out.at[batch, head, w, n, rows])
      for source, target in ((q_s, dq_hbm), (k_s, dk_hbm)):
        for tile in range(mine):
          at = w * mine + tile
          plgpu.copy_smem_to_gmem(source.at[at], target.at[batch, rows, head, columns(at)])
      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    arrivals = [1 + 2 * key_tiles + 3 * value_tiles, key_tiles * value_tiles]
    pl.run_scoped(
      lambda *refs: run(*refs[:-4], refs[-4:-1], refs[-1]),
      tile(key_tiles), tile(key_tiles), tile(value_tiles), tile(value_tiles), tile(value_tiles),
      tile(value_tiles, key_tiles), tile(), tile(),
      plgpu.SMEM(gates.shape[3:], jnp.float32), plgpu.SMEM((W, 3, C), jnp.float32),
      plgpu.Barrier(num_arrivals=arrivals[0]), plgpu.Barrier(num_arrivals=arrivals[1]),
      plgpu.Barrier(num_arrivals=arrivals[1]), plgpu.Barrier(num_arrivals=W, num_barriers=3),
      collective_axes="thread",
    )  # fmt: skip

  keys = jax.ShapeDtypeStruct((B, T, H, K), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[keys, keys, jax.ShapeDtypeStruct((B, H, W, 3, T), jnp.float32)],
    grid=(T // C, H, B),
    grid_names=("chunk", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, do, dv, written, gates, before, after)
