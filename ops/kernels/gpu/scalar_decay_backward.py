"""Gradients of the matrix-state recurrence with one decay per head, from the right to the left.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates:

  A_ij  = scale q_i . k_j exp(b_i - b_j)         dP_ij = scale dO_i . V_j exp(b_i - b_j)   i >= j
  dV    = A^T dO + exp(b_C - b) (K dS')
  dQ    = dP K   + scale exp(b) (dO S^T)
  dK    = dP^T Q + exp(b_C - b) (V dS'^T)
  dS    = exp(b_C) dS' + scale (exp(b) Q)^T dO
  db_i  = q_i . dq_i - k_i . dk_i
  dg_t  = sum_{i >= t} db_i + <S', dS'>               S' = exp(b_C) S + K^T (exp(b_C - b) V)

A program is one segment of one head, like those of the forward pass. All tiles are 64 by 64;
warpgroup w makes the w-th share of the columns of dQ, dK, dV and of the rows of dS, which it keeps
in registers. Gradients leave from where the chunk's tokens were.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.scalar_decay_gates import CHUNK, factors, pairs

TILE = 64
STAGES = 2  # chunks in shared memory


def gradients(
  q, k, v, do, gates, before, after, scale: float, per_segment: int, interpret=None
):  # fmt: skip
  """dq, dk [B T H K], dv [B T H V], float32 [B H W 2 T]: db, and parts of <S', dS'> that each chunk
  sums, and the gradient of the first state, float32 [B H K V]. W shares are to be added, and of dq
  and dk the heads of V that share one of Q and K.

  Args:
    q, k, v, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T], sums from the start of each chunk.
    before: [B H N K V] like `q`, the states before every chunk.
    after: float32 [B H S K V], the gradients of the states after each segment of `per_segment`
      chunks.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  W = 2 if K == V == 128 else 1
  key_tiles, value_tiles, chunks = K // TILE, V // TILE, T // C
  my_keys, my_values = key_tiles // W, value_tiles // W
  columns = lambda tile: pl.ds(tile * TILE, TILE)
  turned = lambda ref: ref.transpose((1, 0))

  def kernel(q_hbm, k_hbm, v_hbm, do_hbm, gates_hbm, before_hbm, after_hbm, *outputs):
    dq_hbm, dk_hbm, dv_hbm, db_hbm, start_hbm = outputs
    batch, head, segment = (lax.axis_index(name) for name in ("batch", "head", "segment"))
    shared = lax.div(head, jnp.int32(H // Hq))
    first = segment * per_segment
    steps = jnp.minimum(jnp.int32(per_segment), chunks - first)
    rows_of = lambda n: pl.ds((first + steps - 1 - n) * C, C)

    def run(
      q_s, k_s, v_s, do_s, gates_s, state_s, dstate_s, scores_s, dp_s, queries_s, db_s,
      full, state_full, met,
    ):  # fmt: skip
      w = lax.axis_index("thread")
      mine = lambda tile, of: w * of + tile

      def fetch_tokens(n, slot):
        rows = rows_of(n)
        plgpu.copy_gmem_to_smem(gates_hbm.at[batch, head, rows], gates_s.at[slot], full.at[slot])
        for source, target, h, tiles in (
          (q_hbm, q_s, shared, key_tiles), (k_hbm, k_s, shared, key_tiles),
          (v_hbm, v_s, head, value_tiles), (do_hbm, do_s, head, value_tiles),
        ):  # fmt: skip
          for i in range(tiles):
            here = source.at[batch, rows, h, columns(i)]
            plgpu.copy_gmem_to_smem(here, target.at[slot, i], full.at[slot])

      def fetch_states(n):
        for i in range(key_tiles):
          for j in range(value_tiles):
            here = before_hbm.at[batch, head, first + steps - 1 - n, columns(i), columns(j)]
            plgpu.copy_gmem_to_smem(here, state_s.at[i, j], state_full)

      def meet(n):
        plgpu.barrier_arrive(met.at[n])
        plgpu.barrier_wait(met.at[n])

      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

      def step(n, dstate):
        slot = lax.rem(n, jnp.int32(STAGES))
        plgpu.barrier_wait(full.at[slot])
        queries, keys, values, dout = (ref.at[slot] for ref in (q_s, k_s, v_s, do_s))
        from_start, to_end, carry = factors(gates_s.at[slot])
        from_start = from_start * scale

        def stage_dstate():
          for i in range(my_keys):
            for j in range(value_tiles):
              dstate_s[mine(i, my_keys), j] = dstate[i][j].astype(dtype)

        def score(left, right, tiles, target, meanwhile=lambda: None):
          """scale left right^T exp(b_i - b_j), rounded, for i >= j."""

          def weigh():
            meanwhile()
            return pairs(gates_s.at[slot]) * scale

          terms = [(left.at[t], turned(right.at[t])) for t in range(tiles)]
          x, weights = mosaic.products_and((C, C), terms, weigh)
          target[...] = (x * weights).astype(dtype)

        # Two warpgroups make one each.
        if W == 1:
          score(queries, keys, key_tiles, scores_s, stage_dstate)
          score(dout, values, value_tiles, dp_s)
        else:
          make = lambda *arguments: lambda: score(*arguments, stage_dstate)
          pl.when(w == 0)(make(queries, keys, key_tiles, scores_s))
          pl.when(w == 1)(make(dout, values, value_tiles, dp_s))
        plgpu.commit_smem()
        # The gradients of the chunk before have left.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        meet(0)
        pl.when((w == 0) & (n < steps - 1))(lambda: fetch_tokens(n + 1, 1 - slot))

        plgpu.barrier_wait(state_full)
        dq, constant = [], jnp.zeros((), jnp.float32)
        for i in range(my_keys):
          at = mine(i, my_keys)
          terms = [(dout.at[t], turned(state_s.at[at, t])) for t in range(value_tiles)]
          across = mosaic.products((C, TILE), terms) * along_rows(from_start, TILE)
          dq += mosaic.accumulate(simulated, (across, dp_s, keys.at[at]))
          for t in range(value_tiles):
            constant += (load(state_s.at[at, t]) * dstate[i][t]).sum(1) * carry

        dk, dv = [], []
        for i in range(my_keys):
          at = mine(i, my_keys)
          terms = [(values.at[t], turned(dstate_s.at[at, t])) for t in range(value_tiles)]
          across = mosaic.products((C, TILE), terms) * along_rows(to_end, TILE)
          constant += (across * load(keys.at[at])).sum(1)
          dk += mosaic.accumulate(simulated, (across, turned(dp_s), queries.at[at]))
        for i in range(my_values):
          at = mine(i, my_values)
          terms = [(keys.at[t], dstate_s.at[t, at]) for t in range(key_tiles)]
          across = mosaic.products((C, TILE), terms) * along_rows(to_end, TILE)
          dv += mosaic.accumulate(simulated, (across, turned(scores_s), dout.at[at]))

        weights = factors(gates_s.at[slot], axis=1).from_start * scale
        db, after = jnp.zeros((), jnp.float32), []
        for i in range(my_keys):
          at = mine(i, my_keys)
          db += (dq[i] * load(queries.at[at])).sum(1) - (dk[i] * load(keys.at[at])).sum(1)
          weighted = load(turned(queries.at[at])) * along_columns(weights, TILE)
          weighted = weighted.astype(dtype)
          if simulated:
            queries_s[w] = weighted
            weighted = queries_s.at[w]
          after.append(
            mosaic.accumulate(
              simulated,
              *((dstate[i][t] * carry, weighted, dout.at[t]) for t in range(value_tiles)),
            )
          )
        meet(1)
        pl.when((w == 0) & (n < steps - 1))(lambda: fetch_states(n + 1))

        db_s[w, 0], db_s[w, 1] = db, constant
        for i in range(my_keys):
          queries[mine(i, my_keys)] = dq[i].astype(dtype)
          keys[mine(i, my_keys)] = dk[i].astype(dtype)
        for i in range(my_values):
          values[mine(i, my_values)] = dv[i].astype(dtype)
        plgpu.commit_smem()
        rows = rows_of(n)
        for part in range(2):
          plgpu.copy_smem_to_gmem(db_s.at[w, part], db_hbm.at[batch, head, w, part, rows])
        for source, target, of in (
          (queries, dq_hbm, my_keys), (keys, dk_hbm, my_keys), (values, dv_hbm, my_values)
        ):  # fmt: skip
          for i in range(of):
            at = mine(i, of)
            plgpu.copy_smem_to_gmem(source.at[at], target.at[batch, rows, head, columns(at)])
        return after

      part = lambda i, j: (batch, head, columns(mine(i, my_keys)), columns(j))
      at_end = lambda i, j: after_hbm.at[batch, head, segment, *part(i, j)[2:]]

      @pl.when(w == 0)
      def _():
        fetch_tokens(jnp.int32(0), jnp.int32(0))
        fetch_states(jnp.int32(0))

      dstate = [
        [plgpu.load(at_end(i, j), layout=WGMMA, optimized=False) for j in range(value_tiles)]
        for i in range(my_keys)
      ]
      dstate = lax.fori_loop(0, steps, step, dstate)

      @pl.when(segment == 0)
      def _():
        for i in range(my_keys):
          for j in range(value_tiles):
            start_hbm[part(i, j)] = dstate[i][j]

      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    pl.run_scoped(
      run,
      tile(STAGES, key_tiles), tile(STAGES, key_tiles), tile(STAGES, value_tiles),
      tile(STAGES, value_tiles), plgpu.SMEM((STAGES, C), jnp.float32),
      tile(key_tiles, value_tiles), tile(key_tiles, value_tiles), tile(), tile(),
      tile(W) if simulated else None, plgpu.SMEM((W, 2, C), jnp.float32),
      plgpu.Barrier(num_arrivals=1 + 2 * (key_tiles + value_tiles), num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=key_tiles * value_tiles),
      plgpu.Barrier(num_arrivals=W, num_barriers=2),
      collective_axes="thread",
    )  # fmt: skip

  like = lambda *shape: jax.ShapeDtypeStruct((B, T, H, *shape), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[
      like(K),
      like(K),
      like(V),
      jax.ShapeDtypeStruct((B, H, W, 2, T), jnp.float32),
      jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
    ],
    grid=(-(-chunks // per_segment), H, B),
    grid_names=("segment", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, do, gates, before, after)
