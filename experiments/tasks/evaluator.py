"""Accuracy of a synthetic task at the length it is trained at, and at those of `eval.lengths`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import processes, sharding
from experiments.data.batches import JoinedRows
from ops import sharded

# Added to the number of a length, these are the seeds of what is evaluated: no run trains on them.
FIRST_SEED = {"validation": 100_042, "test": 200_042}


@dataclasses.dataclass(frozen=True)
class Accuracies:
  """What was measured.

  Attributes:
    metrics: loss (nats per target) and accuracy, F1 of class 1 where the task is binary, each as
      "<name>/<length>".
  """

  metrics: dict[str, float]

  @property
  def summary(self) -> str:
    """What is printed."""
    said = (f"{name} {x:.4f}" for name, x in self.metrics.items() if not name.startswith("loss/"))
    return "   ".join(said)


class LengthEvaluator:
  """Evaluates parameters of a task; compiles once for each length."""

  def __init__(self, task, mesh: jax.sharding.Mesh):
    """Args: task: a `Supervised` task. mesh: from `sharding.make_mesh`."""
    self._task, self._mesh, config = task, mesh, task.config
    sharding.check_rows(mesh, task.arrays, "eval.batch_size", config.eval.batch_size)
    sharding.check_lengths(mesh, task.arrays, "eval.lengths", config.eval.lengths)
    measure = sharded.exchange(config.mesh.exchange)(self._measure)
    self._step = processes.lined_up(jax.jit(measure, out_shardings=sharding.replicated(mesh)))

  def __call__(self, params, split: str, brief: bool = False) -> Accuracies:
    """Measures `eval.examples` examples at each length, a tenth of them with `brief`.

    Args:
      params: of the model.
      split: "validation" or "test": other examples, the same ones at every call.
      brief: a quick look, during training.
    """
    config, found = self._task.config, {}
    rows = config.eval.batch_size
    examples = -(-config.eval.examples // (10 if brief else 1))
    for place, length in enumerate(self._task.lengths):
      seed = FIRST_SEED[split] + place
      batches = JoinedRows(
        functools.partial(self._task.batches, length, rows, seed, config.eval.examples),
        sharding.rows_of_process(self._mesh, rows),
      )
      total = None
      for n in range(-(-examples // rows)):
        read = batches[n]
        batch = {name: read[name] for name in self._task.arrays}
        # Of the last batch only as many rows count as examples are left.
        known = np.int32(min(rows, examples - n * rows))
        sums = self._step(params, sharding.place_batch(self._mesh, batch), known)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
      found |= {f"{name}/{length}": x for name, x in self._means(jax.device_get(total)).items()}
    return Accuracies(found)

  def _measure(self, params, batch, known):
    logits, _ = self._task.logits(params, batch)
    targets, answers = batch["targets"], jnp.argmax(logits, axis=-1)
    rows = jnp.arange(targets.shape[0]).reshape(-1, *(1,) * (targets.ndim - 1))
    counted = self._task.counted(batch) & (rows < known)
    total = lambda x: jnp.sum(jnp.where(counted, x, 0))
    return {
      "targets": total(1),
      "right": total(answers == targets),
      "nats": total(self._task.nats(logits, targets)),
      "hits": total((answers == 1) & (targets == 1)),
      "ones": total(jnp.asarray(answers == 1, jnp.int32) + (targets == 1)),
    }

  def _means(self, total) -> dict[str, float]:
    targets = max(int(total["targets"]), 1)
    means = {"loss": float(total["nats"]) / targets, "accuracy": int(total["right"]) / targets}
    if self._task.binary:
      means["f1"] = 2 * int(total["hits"]) / max(int(total["ones"]), 1)
    return means
