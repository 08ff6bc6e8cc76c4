"""What the scan over chunks takes for the delta rule with a decay per row of the state.

With G the sums of gates from a chunk's start, up to its last C,

  q~ = scale q exp(G)    k~ = k exp(G)    k^ = k exp(G_C - G)    carry = exp(G_C)
  A_ij = scale sum_d q_id k_jd exp(G_id - G_jd), i >= j
  T = (I + diag(beta) P)^-1 diag(beta),  P_ij = sum_d k_id k_jd exp(G_id - G_jd), i > j

A program is one chunk of one head, all at the same time. A warpgroup has 32 of K: four hide each
other's waits. The first makes A, the second T.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import delta_rule_inverse, mosaic
from ops.kernels.gpu.kda_gates import (
  AFTER,
  CHUNK,
  FROM_MIDDLE,
  NARROW,
  TERMS,
  UP_TO,
  WIDTH,
  choices,
  for_each_level,
  largest,
  positions,
  store_split,
  sums,
)
from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows
from ops.kernels.gpu.vector_decay_gates import Documents
from ops.triangular import unit_lower_inverse

STRIDE = delta_rule_inverse.STRIDE
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
  W, chunks = K // WIDTH, T // C

  def kernel(q_hbm, k_hbm, g_hbm, beta_hbm, documents_hbm, choices_hbm, *outputs):
    *weighed_hbm, carry_hbm, scores_hbm, inverse_hbm = outputs
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    key_head = lax.div(head, jnp.int32(H // Hq))
    w = lax.axis_index("thread")
    rows, mine = pl.ds(chunk * C, C), pl.ds(w * WIDTH, WIDTH)

    def run(x_s, y_s, split_s, choices_s, out_s, matrix_s, sums_s, beta_s, *rest):
      carry_s, spare_s, own_s, left_s, documents_s, full, ready, met = rest

      def left(x):
        """The left operand of a product, in registers; the interpreter wants it in memory."""
        if not simulated:
          return x
        left_s[w] = x
        return left_s.at[w]

      def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

      for n, source in enumerate((q_hbm, k_hbm)):
        here = source.at[batch, rows, key_head, mine]
        plgpu.copy_gmem_to_smem(here, x_s.at[n, w], full.at[w])

      @pl.when(w == 0)
      def _():
        for n in range(CHOICES):
          plgpu.copy_gmem_to_smem(choices_hbm.at[n], choices_s.at[n], ready)
        plgpu.copy_gmem_to_smem(beta_hbm.at[batch, head, rows], beta_s, ready)
        if documents is not None:
          plgpu.copy_gmem_to_smem(documents_hbm.at[batch, rows], documents_s, ready)

      g = plgpu.load(g_hbm.at[batch, rows, head, mine], layout=WGMMA, optimized=False)
      split = split_s.at[w]
      store_split(g, split)
      plgpu.barrier_wait(full.at[w])
      plgpu.barrier_wait(ready)
      q, k = (plgpu.load(x_s.at[n, w], layout=WGMMA) for n in range(2))
      wide = lambda x: x.astype(jnp.float32)
      own_s[w] = (wide(q) * wide(k)).sum(1)

      def decide():
        meet()
        return functools.reduce(jnp.maximum, [largest(spare_s.at[n]) for n in range(W)])

      def level(products, weights, opposite, pairs):
        """Adds to the scores of q, in the first warpgroup, or of k what a level gives."""
        for n, x in enumerate((q, k)):
          x_s[n, w] = (wide(x) * weights).astype(dtype)
        y_s[w] = (wide(k) * opposite).astype(dtype)
        plgpu.commit_smem()
        meet()

        def more(products):
          tiles = [(x_s.at[w, n], y_s.at[n].transpose((1, 0))) for n in range(W)]
          i, j = positions()
          kept = i > j if pairs is None else pairs(i, j)
          if documents is not None:
            kept = kept & Documents(documents_s).pairs()
          return products + jnp.where(kept, mosaic.products((C, C), tiles), 0)

        products = lax.cond(w < 2, more, lambda products: products, products)
        meet()
        return products

      middle, spare, none = choices_s.at[FROM_MIDDLE], spare_s.at[w], mosaic.zeros(C, C)
      products = for_each_level(middle, choices_hbm, split, spare, decide, left, level, none)

      @pl.when(w == 0)
      def _():
        i, j = positions()
        own = sum(plgpu.load(own_s.at[n], layout=WGMMA.reduce(1)) for n in range(W))
        out_s[0] = (jnp.where(i == j, along_rows(own, C), products) * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[0], scores_hbm.at[batch, head, chunk])

      @pl.when(w == 1)
      def _():
        here = matrix_s.at[:, pl.ds(0, C)]
        here[...] = products * along_rows(plgpu.load(beta_s, layout=WGMMA.reduce(1)), C)
        if simulated:
          here[...] = unit_lower_inverse(here[...])
        else:
          delta_rule_inverse._invert(matrix_s)
        step = plgpu.load(beta_s, layout=WGMMA.reduce(0))
        inverse = plgpu.load(here, layout=WGMMA, optimized=False) * along_columns(step, C)
        for term in range(terms):
          out_s[1 + term] = inverse.astype(dtype)
          inverse = inverse - wide(inverse.astype(dtype))
        plgpu.commit_smem()
        for term in range(terms):
          plgpu.copy_smem_to_gmem(out_s.at[1 + term], inverse_hbm.at[batch, head, chunk, term])

      from_start, to_end = (jnp.exp(sums(choices_s.at[n], split)) for n in (UP_TO, AFTER))
      if documents is not None:
        document = Documents(documents_s)
        from_start, to_end = document.before(from_start), document.after(to_end)
      x_s[0, w] = (wide(q) * from_start * scale).astype(dtype)
      x_s[1, w] = (wide(k) * from_start).astype(dtype)
      y_s[w] = (wide(k) * to_end).astype(dtype)
      sums_s[w, :, pl.ds(0, WIDTH)] = from_start
      last = sums_s.at[w, C - 1, pl.ds(0, WIDTH)]
      carry_s[w] = plgpu.load(last, layout=WGMMA.reduce(0), optimized=False)
      plgpu.commit_smem()
      for source, target in zip((x_s.at[0], x_s.at[1], y_s), weighed_hbm):
        plgpu.copy_smem_to_gmem(source.at[w], target.at[batch, head, rows, mine])
      plgpu.copy_smem_to_gmem(carry_s.at[w], carry_hbm.at[batch, head, chunk, mine])
      plgpu.wait_smem_to_gmem(0)

    memory = lambda *shape: plgpu.SMEM(shape, dtype, transforms=NARROW)
    parts = lambda *shape: memory(*shape, C, WIDTH)
    vectors = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    pl.run_scoped(
      run,
      parts(2, W), parts(W), parts(W, TERMS), memory(CHOICES, C, C), memory(1 + terms, C, C),
      vectors(C, STRIDE), vectors(W, C, WIDTH + 8), vectors(C), vectors(W, WIDTH), vectors(W, C),
      vectors(W, C), memory(W, C, C) if simulated else None,
      None if documents is None else vectors(C),
      plgpu.Barrier(num_arrivals=2, num_barriers=W),
      plgpu.Barrier(num_arrivals=CHOICES + (1 if documents is None else 2)),
      plgpu.Barrier(num_arrivals=W),
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
    grid=(chunks, H, B),
    grid_names=("chunk", "head", "batch"),
    num_threads=W,
    thread_name="thread",
    interpret=interpret,
    compiler_params=mosaic.PARAMS,
  )(q, k, log_decay, beta, documents, choices())  # fmt: skip
