"""Bits per byte of a split, as a whole and by position in the document."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments import processes, sharding
from experiments.data import pipeline
from experiments.models import language_model
from lm_models import lm
from ops import sharded

# Bucket i holds the positions 2^i - 1 .. 2^(i+1) - 2.
BUCKETS = 31
# Number of axes of each array that a batch holds.
ARRAYS = {"inputs": 2, "targets": 2, "segment_ids": 2, "positions": 2, "continues": 1}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What `evaluate` measured over the tokens of a split.

  Attributes:
    bits_per_byte: the mean.
    tokens: how many targets were predicted.
    by_position: (first position, last position, tokens, bits per byte) for each power of two.
  """

  bits_per_byte: float
  tokens: int
  by_position: tuple[tuple[int, int, int, float], ...]

  @property
  def metrics(self) -> dict[str, float]:
    """What is logged."""
    return {"bits_per_byte": self.bits_per_byte}

  @property
  def summary(self) -> str:
    """What is printed."""
    return f"{self.bits_per_byte:.3f} bits/byte"


class Evaluator:
  """Evaluates parameters on splits; compiles once."""

  def __init__(self, config, mesh: jax.sharding.Mesh):
    """Args: config: the experiment. mesh: from `sharding.make_mesh`."""
    sharding.check_rows(mesh, ARRAYS, "eval.batch_size", config.eval.batch_size)
    sharding.check_lengths(mesh, ARRAYS, "eval.T", (config.eval.T,))
    self._config, self._mesh = config, mesh
    self._model = language_model(config)
    start = functools.partial(lm.init_state, self._model, config.eval.batch_size)
    carried = sharding.state_shardings(mesh, jax.eval_shape(start))
    self._start = jax.jit(start, out_shardings=carried)
    step = sharded.exchange(config.mesh.exchange)(functools.partial(_step, self._model))
    self._step = processes.lined_up(
      jax.jit(step, donate_argnums=2, out_shardings=(sharding.replicated(mesh), carried))
    )

  def __call__(self, params, split: str, brief: bool = False) -> Evaluation:
    """Reads a split from its start.

    Args:
      params: of the model.
      split: "validation" or "test", whose TFDS names are in the group `data`.
      brief: stops after about `eval.max_tokens` rather than `eval.final_max_tokens`; 0 of either
        is the whole split.
    """
    config, mesh = self._config, self._mesh
    max_tokens = config.eval.max_tokens if brief else config.eval.final_max_tokens
    batches = pipeline.evaluation_batches(
      config.data,
      config.data[f"{split}_split"],
      batch_size=config.eval.batch_size,
      T=config.eval.T,
      max_tokens=max_tokens or None,
      rows=sharding.rows_of_process(mesh, config.eval.batch_size),
    )
    carry = self._start()
    nats, counts = np.zeros(BUCKETS), np.zeros(BUCKETS, np.int64)
    pending = None
    for batch in batches:
      if not config.eval.carry_state:
        batch["continues"] = np.zeros_like(batch["continues"])
      sums, carry = self._step(params, sharding.place_batch(mesh, batch), carry)
      if pending is not None:
        nats, counts = nats + np.asarray(pending[0]), counts + np.asarray(pending[1])
      pending = sums
    if pending is not None:
      nats, counts = nats + np.asarray(pending[0]), counts + np.asarray(pending[1])
    bits_per_nat = batches.tokens_per_byte / math.log(2)
    return Evaluation(
      bits_per_byte=float(nats.sum() / max(counts.sum(), 1) * bits_per_nat),
      tokens=int(counts.sum()),
      by_position=tuple(
        (2**i - 1, 2 ** (i + 1) - 2, int(counts[i]), float(nats[i] / counts[i] * bits_per_nat))
        for i in range(BUCKETS)
        if counts[i]
      ),
    )


def _step(model, params, batch, carry):
  """Sums over one batch: nats and targets in each bucket of positions, and the state after it."""
  carry = lm.keep_state(carry, batch["continues"])
  nats, carry = lm.token_nats(
    model, params, batch["inputs"], batch["targets"], carry, batch["segment_ids"]
  )
  real = batch["segment_ids"] >= 0
  edges = 2 ** jnp.arange(1, BUCKETS, dtype=jnp.int32) - 1
  bucket = jnp.searchsorted(edges, batch["positions"], side="right")
  sums = jnp.zeros(BUCKETS).at[bucket].add(jnp.where(real, nats, 0.0))
  counts = jnp.zeros(BUCKETS, jnp.int32).at[bucket].add(real)
  return (sums, counts), carry
