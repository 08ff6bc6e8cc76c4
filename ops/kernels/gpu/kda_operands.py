"""What the scan over chunks takes for the delta rule with a decay per row of the state.

With G the sums of gates from a chunk's start, up to its last C,

  q~ = scale q exp(G)    k~ = k exp(G)    k^ = k exp(G_C - G)    carry = exp(G_C)
  A_ij = scale sum_d q_id k_jd exp(G_id - G_jd), i >= j
  T = (I + diag(beta) P)^-1 diag(beta),  P_ij = sum_d k_id k_jd exp(G_id - G_jd), i > j

A program is two chunks of one head, all at the same time: four warpgroups hide each other's waits.
One has 64 of K of a chunk, then one of the two matrices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import delta_rule_inverse, mosaic
from ops.kernels.gpu.delta_rule_forward import load_transposed
from ops.kernels.gpu.kda_gates import (
  AFTER,
  CHUNK,
  FROM_MIDDLE,
  TERMS,
  TILE,
  UP_TO,
  choices,
  for_each_level,
  positions,
  store_split,
  sums,
)
from ops.kernels.gpu.mosaic import TILED, WGMMA, along_columns, along_rows
from ops.kernels.gpu.vector_decay_gates import Documents
from ops.triangular import unit_lower_inverse

STRIDE = delta_rule_inverse.STRIDE
SIDES = 2  # chunks of a program
CHOICES = 3  # those of `kda_gates.choices` that every chunk needs


def operands(q, k, log_decay, beta, documents, scale: float, terms: int, interpret=None):
  """q~, k~, k^ [B H T K] like q, carry float32 [B H N K], A [B H N C C] like q, and T as a sum of
  `terms` matrices, [B H N terms C C] like q.

  Args:
    q, k: bfloat16 [B T Hq K], T a multiple of the chunk; H is a multiple of Hq.
    log_decay: float32 [B T H K].
    beta: float32 [B H T].
    documents: float32 [B T], starts of documents since the chunk's start, or None.
  """
  (B, T, H, K), Hq = log_decay.shape, q.shape[2]
  C, dtype, simulated = CHUNK, q.dtype, interpret is not None
  W, chunks = K // TILE, T // C

  def kernel(q_hbm, k_hbm, g_hbm, beta_hbm, documents_hbm, choices_hbm, *outputs):
    *weighed_hbm, carry_hbm, scores_hbm, inverse_hbm = outputs
    batch, head, pair = (lax.axis_index(name) for name in ("batch", "head", "pair"))
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")  # the place of what is a warpgroup's own
    side, part = lax.div(w, jnp.int32(W)), lax.rem(w, jnp.int32(W))
    # Where there is no second chunk, both sides make the same.
    chunk = jnp.minimum(pair * SIDES + side, chunks - 1)
    rows, mine = pl.ds(chunk * C, C), pl.ds(part * TILE, TILE)

    def run(q_s, k_s, y_s, split_s, matrix_s, beta_s, carry_s, spare_s, *rest):
      choices_s, left_s, documents_s, full, ready, met = rest

      def left(x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        left_s[w] = x
        return left_s.at[w]

      def meet():
        plgpu.barrier_arrive(met.at[side])
        plgpu.barrier_wait(met.at[side])

      for source, target in ((q_hbm, q_s), (k_hbm, k_s)):
        plgpu.copy_gmem_to_smem(source.at[batch, rows, key_head, mine], target.at[w], full.at[w])
      plgpu.copy_gmem_to_smem(beta_hbm.at[batch, head, rows], beta_s.at[w], full.at[w])
      if documents is not None:
        here = documents_hbm.at[batch, rows]
        plgpu.copy_gmem_to_smem(here, documents_s.at[w], full.at[w])
      for n in range(CHOICES):
        pl.when(w == 0)(
          functools.partial(plgpu.copy_gmem_to_smem, choices_hbm.at[n], choices_s.at[n], ready)
        )
      g = plgpu.load(g_hbm.at[batch, rows, head, mine], layout=WGMMA, optimized=False)
      split = split_s.at[w]
      store_split(g, split)
      plgpu.barrier_wait(full.at[w])
      q, k = (plgpu.load(x.at[w], layout=WGMMA) for x in (q_s, k_s))
      wide = lambda x: x.astype(jnp.float32)

      plgpu.barrier_wait(ready)
      factors = lambda n: jnp.exp(sums(choices_s.at[n], split))
      from_start, to_end = factors(UP_TO), factors(AFTER)
      total = sum(load_transposed(split.at[term], simulated).sum(1) for term in range(TERMS))
      carry = jnp.exp(total)
      if documents is not None:
        document = Documents(documents_s.at[w])
        from_start, to_end = document.before(from_start), document.after(to_end)
        carry = jnp.where(document.last == 0.0, carry, 0.0)
      q_s[w] = (wide(q) * from_start * scale).astype(dtype)
      k_s[w] = (wide(k) * from_start).astype(dtype)
      y_s[w] = (wide(k) * to_end).astype(dtype)
      carry_s[w] = carry
      plgpu.commit_smem()
      for source, target in zip((q_s, k_s, y_s), weighed_hbm):
        plgpu.copy_smem_to_gmem(source.at[w], target.at[batch, head, rows, mine])
      plgpu.copy_smem_to_gmem(carry_s.at[w], carry_hbm.at[batch, head, chunk, mine])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

      def level(pairs_of, weights, columns, pairs):
        """Adds to the scores of q, of k, or of both what a level gives."""
        for x, target in ((q, q_s), (k, k_s)):
          target[w] = (wide(x) * weights).astype(dtype)
        y_s[w] = (wide(k) * columns).astype(dtype)
        plgpu.commit_smem()
        products = [
          mosaic.product((C, C), x.at[w], y_s.at[w].transpose((1, 0))) for x in (q_s, k_s)
        ]
        i, j = positions()
        kept = i > j if pairs is None else pairs(i, j)
        if documents is not None:
          kept = kept & Documents(documents_s.at[w]).pairs()
        return [x + jnp.where(kept, y, 0) for x, y in zip(pairs_of, products)]

      scores, pairs = for_each_level(
        choices_s.at[FROM_MIDDLE],
        choices_hbm,
        split,
        spare_s.at[w],
        left,
        level,
        [mosaic.zeros(C, C)] * 2,
      )
      i, j = positions()
      scores = jnp.where(i == j, along_rows((wide(q) * wide(k)).sum(1), C), scores)

      matrix = matrix_s.at[side]
      here = matrix.at[:, pl.ds(0, C)]
      # Each warpgroup has the sums over its part of K: the first is given those of the scores.
      if W == 2:

        @pl.when(part == 1)
        def _():
          here[...] = scores

        meet()

      @pl.when(part == 0)
      def _():
        x = scores if W == 1 else scores + plgpu.load(here, layout=WGMMA, optimized=False)
        q_s[w] = (x * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[w], scores_hbm.at[batch, head, chunk])
        if W == 2:
          here[...] = pairs

      if W == 2:
        meet()

      @pl.when(part == W - 1)
      def _():
        step = plgpu.load(beta_s.at[w], layout=WGMMA.reduce(1))
        x = pairs if W == 1 else pairs + plgpu.load(here, layout=WGMMA, optimized=False)
        here[...] = x * along_rows(step, C)
        if simulated:
          here[...] = unit_lower_inverse(here[...])
        else:
          delta_rule_inverse._invert(matrix)
        step = plgpu.load(beta_s.at[w], layout=WGMMA.reduce(0))
        inverse = plgpu.load(here, layout=WGMMA, optimized=False) * along_columns(step, C)
        tiles = (k_s, y_s)[:terms]
        for target in tiles:
          target[w] = inverse.astype(dtype)
          inverse = inverse - wide(inverse.astype(dtype))
        plgpu.commit_smem()
        for term, source in enumerate(tiles):
          plgpu.copy_smem_to_gmem(source.at[w], inverse_hbm.at[batch, head, chunk, term])

      plgpu.wait_smem_to_gmem(0)

    n = SIDES * W
    tile = lambda *shape: plgpu.SMEM((n, *shape, TILE, TILE), dtype, transforms=TILED)
    vector = lambda: plgpu.SMEM((n, TILE), jnp.float32)
    pl.run_scoped(
      run,
      tile(), tile(), tile(), tile(TERMS), plgpu.SMEM((SIDES, C, STRIDE), jnp.float32),
      vector(), vector(), vector(), plgpu.SMEM((CHOICES, C, C), dtype, transforms=TILED),
      tile() if simulated else None,
      None if documents is None else vector(),
      plgpu.Barrier(num_arrivals=3 if documents is None else 4, num_barriers=n),
      plgpu.Barrier(num_arrivals=CHOICES),
      plgpu.Barrier(num_arrivals=W, num_barriers=SIDES),
      collective_axes="thread",
    )  # fmt: skip

  struct = jax.ShapeDtypeStruct
  weighed = struct((B, H, T, K), dtype)
  return plgpu.kernel(
    kernel,
    out_type=[
      weighed, weighed, weighed, struct((B, H, chunks, K), jnp.float32),
      struct((B, H, chunks, C, C), dtype), struct((B, H, chunks, terms, C, C), dtype),
    ],
    grid=(-(-chunks // SIDES), H, B),
    grid_names=("pair", "head", "batch"),
    num_threads=SIDES * W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, log_decay, beta, documents, choices())  # fmt: skip
