"""Gradients of the matrix-state recurrence with one decay per head, chunk by chunk.

With S the state before a chunk, dS' the gradient of the state after it, b the sums of its gates:

  A_ij  = scale q_i . k_j exp(b_i - b_j)         dP_ij = scale dO_i . V_j exp(b_i - b_j)   i >= j
  dV    = A^T dO + exp(b_C - b) (K dS')
  dQ    = dP K   + scale exp(b) (dO S^T)
  dK    = dP^T Q + exp(b_C - b) (V dS'^T)
  db_i  = q_i . dq_i - k_i . dk_i
  dg_t  = sum_{i >= t} db_i + <S', dS'>               S' = exp(b_C) S + K^T (exp(b_C - b) V)

Every chunk is a program of its own. All tiles are 64 by 64; warpgroup w makes the w-th share of the
columns of each gradient. With a state for every pair of chunks only, S is that before and dS' that
after the pair, their factors are those to the pair's ends, and tokens of one chunk meet those of
the other directly: the second's rows of A and dP with the first's columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.scalar_decay_gates import CHUNK, Gates, factors, pairs

TILE = 64


def gradients(
  q, k, v, do, gates: Gates, before, after, scale: float, every: int = 1, interpret=None
):
  """dq, dk [B T H K], dv [B T H V], and float32 [B H W 2 T]: db, and parts of <S', dS'> that each
  chunk sums; W shares are to be added, and of dq and dk the heads of V that share one of Q and K.

  Args:
    q, k, v, do: [B T Hq K], [B T H V], T a multiple of the chunk.
    gates: float32 [B H T] and [B T].
    before, after: [B H N K V] like `q`, the states before and their gradients after every chunk or
      pair of chunks.
    every: chunks per state, 1 or 2, a divisor of their number.
  """
  (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
  C, dtype = CHUNK, q.dtype
  W = 2 if K == V == 128 else 1
  key_tiles, value_tiles = K // TILE, V // TILE
  my_keys, my_values = key_tiles // W, value_tiles // W
  columns = lambda tile: pl.ds(tile * TILE, TILE)

  def kernel(q_hbm, k_hbm, v_hbm, do_hbm, gates_hbm, before_hbm, after_hbm, *outputs):
    dq_hbm, dk_hbm, dv_hbm, db_hbm = outputs
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    shared, rows = lax.div(head, jnp.int32(H // Hq)), pl.ds(chunk * C, C)
    w = lax.axis_index("thread")

    def run(
      q_s, k_s, v_s, do_s, state_s, scores_s, dp_s, gates_s, other_s, db_s, ready, met, odd=None
    ):
      def meet(n):
        plgpu.barrier_arrive(met.at[n])
        plgpu.barrier_wait(met.at[n])

      def fetch_states(source, barrier):
        for i in range(key_tiles):
          for j in range(value_tiles):
            here = source.at[batch, head, lax.div(chunk, jnp.int32(every)), columns(i), columns(j)]
            plgpu.copy_gmem_to_smem(here, state_s.at[i, j], ready[barrier])

      @pl.when(w == 0)
      def _():
        gates_hbm.fetch(batch, head, chunk, gates_s, ready[0])
        if every == 2:
          gates_hbm.fetch(batch, head, chunk - 1 if odd else chunk + 1, other_s, ready[0])
        for source, target, h, tiles in (
          (q_hbm, q_s, shared, key_tiles), (k_hbm, k_s, shared, key_tiles),
          (v_hbm, v_s, head, value_tiles), (do_hbm, do_s, head, value_tiles),
        ):  # fmt: skip
          for i in range(tiles):
            here = source.at[batch, rows, h, columns(i)]
            plgpu.copy_gmem_to_smem(here, target.at[i], ready[0])
        fetch_states(before_hbm, 1)

      plgpu.barrier_wait(ready[0])
      from_start, to_end, carry = factors(gates_s)
      if odd is True:
        other = factors(other_s)
        low_row, low_column = from_start * scale, factors(other_s, axis=1).to_end
        from_start, carry = from_start * other.carry, carry * other.carry * 0.5
      elif odd is False:
        other = factors(other_s)
        low_row, low_column = other.from_start * scale, factors(gates_s, axis=1).to_end
        to_end, carry = to_end * other.carry, carry * other.carry * 0.5
      from_start = from_start * scale

      def score(left, right, tiles, target):
        """scale left right^T exp(b_i - b_j), rounded, for i >= j."""
        products = total([(left.at[t], right.at[t].transpose((1, 0))) for t in range(tiles)])
        target[...] = (products * (pairs(gates_s) * scale)).astype(dtype)

      def total(terms):
        return mosaic.products((C, TILE), terms)

      # Two warpgroups make one each.
      if W == 1:
        score(q_s, k_s, key_tiles, scores_s)
        score(do_s, v_s, value_tiles, dp_s)
      else:
        pl.when(w == 0)(lambda: score(q_s, k_s, key_tiles, scores_s))
        pl.when(w == 1)(lambda: score(do_s, v_s, value_tiles, dp_s))
      plgpu.commit_smem()
      meet(0)

      load = lambda ref: plgpu.load(ref, layout=WGMMA).astype(jnp.float32)
      plgpu.barrier_wait(ready[1])
      dq, states = [], []
      for tile in range(my_keys):
        at = w * my_keys + tile
        across = total(
          [(do_s.at[t], state_s.at[at, t].transpose((1, 0))) for t in range(value_tiles)]
        )
        inside = total([(dp_s, k_s.at[at])])
        dq.append(across * along_rows(from_start, TILE) + inside)
        states.append([plgpu.load(state_s.at[at, t], layout=WGMMA) for t in range(value_tiles)])
      meet(1)
      pl.when(w == 0)(lambda: fetch_states(after_hbm, 2))

      dk = [total([(dp_s.transpose((1, 0)), q_s.at[w * my_keys + t])]) for t in range(my_keys)]
      dv = [
        total([(scores_s.transpose((1, 0)), do_s.at[w * my_values + t])]) for t in range(my_values)
      ]
      plgpu.barrier_wait(ready[2])
      constant = jnp.zeros((), jnp.float32)
      for tile in range(my_keys):
        at = w * my_keys + tile
        across = total(
          [(v_s.at[t], state_s.at[at, t].transpose((1, 0))) for t in range(value_tiles)]
        ) * along_rows(to_end, TILE)  # fmt: skip
        keys = load(k_s.at[at])
        constant += (across * keys).sum(1)
        dk[tile] += across
        for t in range(value_tiles):
          both = states[tile][t].astype(jnp.float32) * load(state_s.at[at, t])
          constant += both.sum(1) * carry
      for tile in range(my_values):
        at = w * my_values + tile
        across = total([(k_s.at[t], state_s.at[t, at]) for t in range(key_tiles)])
        dv[tile] += across * along_rows(to_end, TILE)
      if every == 2:
        # The other chunk's tokens, where the states were: the second takes keys and values of the
        # first for dQ, the first queries and output gradients of the second for dK and dV.
        meet(3)
        near = lambda n: state_s.at[n // value_tiles, n % value_tiles]

        @pl.when(w == 0)
        def _():
          there = pl.ds((chunk - 1 if odd else chunk + 1) * C, C)
          keys, values = (k_hbm, v_hbm) if odd else (q_hbm, do_hbm)
          for i in range(key_tiles):
            here = keys.at[batch, there, shared, columns(i)]
            plgpu.copy_gmem_to_smem(here, near(i), ready[3])
          for i in range(value_tiles):
            here = values.at[batch, there, head, columns(i)]
            plgpu.copy_gmem_to_smem(here, near(key_tiles + i), ready[3])

        plgpu.barrier_wait(ready[3])

        def low_score(terms, target):
          weights = along_rows(low_row, C) * along_columns(low_column, C)
          target[...] = (total(terms) * weights).astype(dtype)

        turned = lambda ref: ref.transpose((1, 0))
        if odd:
          terms = [(do_s.at[t], turned(near(key_tiles + t))) for t in range(value_tiles)]
          pl.when(w == 0)(lambda: low_score(terms, dp_s))
        else:
          outs = [(near(key_tiles + t), turned(v_s.at[t])) for t in range(value_tiles)]
          keys = [(near(t), turned(k_s.at[t])) for t in range(key_tiles)]
          pl.when(w == 0)(lambda: low_score(outs, dp_s))
          pl.when(w == W - 1)(lambda: low_score(keys, scores_s))
        plgpu.commit_smem()
        meet(4)
        for tile in range(my_keys):
          at = near(w * my_keys + tile) if W == 1 else state_s.at[0, w]
          if odd:
            dq[tile] += total([(dp_s, at)])
          else:
            dk[tile] += total([(turned(dp_s), at)])
        for tile in range(my_values):
          at = near(key_tiles + tile) if W == 1 else state_s.at[1, w]
          if not odd:
            dv[tile] += total([(turned(scores_s), at)])
      db = jnp.zeros((), jnp.float32)
      for tile in range(my_keys):
        at = w * my_keys + tile
        db += (dq[tile] * load(q_s.at[at])).sum(1) - (dk[tile] * load(k_s.at[at])).sum(1)
      meet(2)

      db_s[w, 0], db_s[w, 1] = db, constant
      for tile in range(my_keys):
        q_s[w * my_keys + tile] = dq[tile].astype(dtype)
        k_s[w * my_keys + tile] = dk[tile].astype(dtype)
      for tile in range(my_values):
        v_s[w * my_values + tile] = dv[tile].astype(dtype)
      plgpu.commit_smem()
      for n in range(2):
        plgpu.copy_smem_to_gmem(db_s.at[w, n], db_hbm.at[batch, head, w, n, rows])
      for source, target, tiles in (
        (q_s, dq_hbm, my_keys), (k_s, dk_hbm, my_keys), (v_s, dv_hbm, my_values)
      ):  # fmt: skip
        for tile in range(tiles):
          at = w * tiles + tile
          plgpu.copy_smem_to_gmem(source.at[at], target.at[batch, rows, head, columns(at)])
      plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=TILED)
    arrivals = [every * gates.copies + 2 * (key_tiles + value_tiles), key_tiles * value_tiles]

    def run_either(*refs):
      refs = (*refs[:-5], refs[-5:-1], refs[-1])
      if every == 1:
        run(*refs)
      else:
        odd = lax.rem(chunk, jnp.int32(2)) == 1
        pl.when(odd)(lambda: run(*refs, odd=True))
        pl.when(~odd)(lambda: run(*refs, odd=False))

    rows_of_states = key_tiles if every == 1 else max(key_tiles, -(-key_tiles // value_tiles) + 1)
    pl.run_scoped(
      run_either,
      tile(key_tiles), tile(key_tiles), tile(value_tiles), tile(value_tiles),
      tile(rows_of_states, value_tiles), tile(), tile(),
      gates.scratch(), gates.scratch() if every == 2 else None, plgpu.SMEM((W, 2, C), jnp.float32),
      plgpu.Barrier(num_arrivals=arrivals[0]), plgpu.Barrier(num_arrivals=arrivals[1]),
      plgpu.Barrier(num_arrivals=arrivals[1]),
      plgpu.Barrier(num_arrivals=key_tiles + value_tiles),
      plgpu.Barrier(num_arrivals=W, num_barriers=5),
      collective_axes="thread",
    )  # fmt: skip

  like = lambda *shape: jax.ShapeDtypeStruct((B, T, H, *shape), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[like(K), like(K), like(V), jax.ShapeDtypeStruct((B, H, W, 2, T), jnp.float32)],
    grid=(T // C, H, B),
    grid_names=("chunk", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, v, do, gates, before, after)
