"""Synthetic tasks with a right answer at every target, drawn on the fly, trained at one length and
evaluated at several.
"""

import abc
import json
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp

from experiments import metrics, models, plots, processes
from experiments.data import pipeline
from experiments.data.batches import JoinedRows
from experiments.errors import UserError
from experiments.tasks.arrow import TOKEN_CHANNELS, ArrowBatches, ArrowTokenBatches
from experiments.tasks.evaluator import FIRST_SEED, LengthEvaluator
from experiments.tasks.parity import ParityBatches
from experiments.tasks.rays import CHANNELS as RAY_CHANNELS
from experiments.tasks.rays import RayBatches
from experiments.tasks.task import Measured
from lm_models import lm, vision


class Supervised(abc.ABC):
  """What the synthetic tasks share; see `Task`."""

  tokens_per_byte = None
  binary = False  # whether F1 of class 1 is measured too
  fields = ()  # of the group `data`, those of examples and scale that mean something

  def __init__(self, config):
    self.config = config
    # Ranked by the length that it is trained at, whichever others are looked at.
    self.lengths = tuple(dict.fromkeys((self.length, *config.eval.lengths)))
    if any(not isinstance(length, int) or length < 1 for length in config.eval.lengths):
      raise UserError(f"eval.lengths is {config.eval.lengths}, must be of ints of at least 1")
    self.best_metric = f"validation/loss/{self.length}"
    seed, data = config.train.seed, config.data
    if any(0 <= seed - first < len(self.lengths) for first in FIRST_SEED.values()):
      raise UserError(
        f"train.seed is {seed}, with which examples are made to evaluate: take another"
      )
    for field, neutral in (("examples", 0), ("scale", 1.0)):
      if field not in self.fields and data[field] != neutral:
        raise UserError(
          f"data.{field} is {data[field]}, must be {neutral} with data.name={data.name!r}"
        )

  @property
  @abc.abstractmethod
  def length(self) -> int:
    """The length that is trained at."""

  @abc.abstractmethod
  def batches(self, length: int, rows: int, seed: int, examples: int, part: slice):
    """Batches of any length, batches[n] a pure function of (seed, n); `part` of the rows."""

  @abc.abstractmethod
  def logits(self, params, batch, key=None):
    """Logits of each target, and what layers watch; `key` is given in training."""

  def nats(self, logits, targets):
    """Cross-entropy of each target, float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

  def counted(self, batch):
    """bool, as the targets: which count."""
    return jnp.ones(batch["targets"].shape, bool)

  def init_carry(self, rows):
    return None

  def count(self, batch):
    return jnp.sum(self.counted(batch))

  def forward(self, params, batch, carry, key):
    logits, watched = self.logits(params, batch, key)
    counted = self.counted(batch)
    total = lambda x: jnp.sum(jnp.where(counted, x, 0.0))
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    nats = total(self.nats(logits, batch["targets"]))
    return Measured(nats, {"accuracy": total(right)}, watched), None

  def train_batches(self, rows=pipeline.ALL_ROWS):
    data, train = self.config.data, self.config.train
    order = {
      "name": data.name,
      "seed": train.seed,
      "length": self.length,
      "batch_size": train.batch_size,
      "examples": data.examples,
    }
    make = lambda part: self.batches(self.length, train.batch_size, train.seed, data.examples, part)
    batches = JoinedRows(make, rows)
    return pipeline.TrainBatches(batches, order, None, None, data.prefetch)

  def example_batch(self):
    rows = self.config.train.batch_size
    batch = self.batches(self.length, rows, 0, self.config.data.examples, slice(None))[0]
    return {name: batch[name] for name in self.arrays}

  def evaluator(self, mesh):
    return LengthEvaluator(self, mesh)

  def evaluate(self, evaluator, params, directory: pathlib.Path, progress):
    """Measures both splits, prints and writes them; returns the files written."""
    found = {}
    for split in FIRST_SEED:
      result = evaluator(params, split)
      progress.say(f"{split}: {result.summary}")
      found |= {f"{split}/{name}": value for name, value in result.metrics.items()}
    path = directory / "evaluation.json"
    if processes.is_first():
      path.write_text(json.dumps(found, indent=2) + "\n")
    return [path]

  def finish(self, workdir, params, evaluator, progress):
    directory = pathlib.Path(workdir)
    written = self.evaluate(evaluator, params, directory, progress)
    figure = directory / "accuracy.png"
    if processes.is_first():
      plots.accuracy_curve(directory / metrics.FILE_NAME, figure)
    progress.say(f"in {directory}:")
    for path, what in (
      (figure, "accuracy against steps, at each length"),
      (written[0], "the figures above"),
      (directory / metrics.FILE_NAME, "one line for each logged step"),
      (directory / "checkpoints", "to go on from and to evaluate"),
    ):
      progress.say(f"  {path.name:<36}{what}")

  def sample(self, params):
    """Raises UserError: there is no text in these tasks."""
    raise UserError(
      f"data.name is {self.config.data.name!r}, of which no text can be sampled; try --mode=eval"
    )


class Parity(Supervised):
  """A language model that says, at each bit, whether the number of ones so far is odd."""

  unit = "tokens"
  arrays: ClassVar[dict[str, int]] = {"inputs": 2, "targets": 2, "counted": 2}

  def __init__(self, config):
    super().__init__(config)
    self.model = models.language_model(config)
    self.targets_per_row = config.data.T
    if self.model.vocab_size < 2:
      raise UserError(f"model.vocab_size is {self.model.vocab_size}, must be at least 2 for parity")

  @property
  def length(self):
    return self.config.data.T

  def batches(self, length, rows, seed, examples, part):
    return ParityBatches(rows, length, seed, part, supervise=self.config.data.supervise)

  def counted(self, batch):
    return batch["counted"]

  def init(self, key):
    return lm.init(self.model, key)

  def logits(self, params, batch, key=None):
    return lm.apply_and_metrics(self.model, params, batch["inputs"])

  def parameter_count(self):
    return lm.parameter_count(self.model)

  def flops_per_target(self):
    return lm.flops_per_token(self.model, self.config.data.T)

  def describe(self):
    config, model = self.config, self.model
    return [
      f"{' '.join(model.pattern)}: {self.parameter_count():,} parameters,"
      f" {model.L} blocks of width {model.D}",
      f"parity of {config.train.batch_size} rows of {self.length} bits, new ones at each step",
    ]


class _Images(Supervised):
  """Images to classes, one for the whole or one for each cell."""

  channels: int  # of the images

  def __init__(self, config):
    super().__init__(config)
    self.model = model = models.vision_model(config)
    for field, allowed, said in (
      ("channels", model.channels == self.channels, f"{self.channels}"),
      ("outputs", model.outputs >= 2, "at least 2"),
      *self._demands(model),
    ):
      if not allowed:
        value = getattr(model, field)
        raise UserError(
          f"model.{field} is {value!r}, must be {said} with data.name={config.data.name!r}"
        )
    for side in self.lengths:
      if side % model.patch:
        raise UserError(
          f"model.patch is {model.patch}, must divide data.side and eval.lengths, such as {side}"
        )

  @abc.abstractmethod
  def _demands(self, model):
    """(field of the model, whether it is as it must be, what it must be) for each that matters."""

  @property
  def length(self):
    return self.config.data.side

  def init(self, key):
    return vision.init(self.model, key)

  def logits(self, params, batch, key=None):
    return vision.apply_and_metrics(self.model, params, batch["images"], key)

  def parameter_count(self):
    return vision.parameter_count(self.model)

  def flops_per_target(self):
    return vision.flops(self.model, self.length, self.length) / self.targets_per_row

  def describe(self):
    config, model = self.config, self.model
    seen = f"{config.data.examples:,} of them" if config.data.examples else "new ones at each step"
    return [
      f"{' '.join(model.pattern)}: {self.parameter_count():,} parameters,"
      f" {model.L} blocks of width {model.D}",
      f"{config.data.name}, {config.train.batch_size} images of {self.length} x {self.length},"
      f" {seen}",
    ]


class Rays(_Images):
  """Which cells of a grid lie on the ray that starts at its arrow."""

  unit = "cells"
  arrays: ClassVar[dict[str, int]] = {"images": 4, "targets": 3}
  binary = True
  channels = len(RAY_CHANNELS)

  def _demands(self, model):
    return [("patch", model.patch == 1, "1"), ("pooling", model.pooling == "none", "'none'")]

  @property
  def targets_per_row(self):
    return self.length**2

  def batches(self, length, rows, seed, examples, part):
    return RayBatches(rows, length, seed, part)


class Arrow(_Images):
  """Whether the arrow in an image points at the disc."""

  unit = "images"
  arrays: ClassVar[dict[str, int]] = {"images": 4, "targets": 1}
  fields = ("examples", "scale")
  targets_per_row = 1
  channels = 3

  def _demands(self, model):
    return [("pooling", model.pooling != "none", "'corners' or 'mean'")]

  def batches(self, length, rows, seed, examples, part):
    return ArrowBatches(rows, length, seed, part, examples=examples, scale=self.config.data.scale)


class ArrowTokens(Arrow):
  """The same scenes on a grid of tokens, of which one holds the arrow and one the disc."""

  channels = len(TOKEN_CHANNELS)
  fields = ()

  def batches(self, length, rows, seed, examples, part):
    return ArrowTokenBatches(rows, length, seed, part)
