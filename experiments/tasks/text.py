"""Language modelling: the next token of the documents that the group `data` names."""

import jax.numpy as jnp
import numpy as np

from experiments import models, report
from experiments.data import pipeline
from experiments.errors import UserError
from experiments.evaluate import Evaluator
from experiments.tasks.task import Measured
from lm_models import lm


class Text:
  """A language model on text; see `Task`."""

  unit = "tokens"
  best_metric = "validation/bits_per_byte"

  def __init__(self, config):
    self.config = config
    self.model = models.language_model(config)
    self.targets_per_row = config.data.T
    self.arrays = {"inputs": 2, "targets": 2, "segment_ids": 2}
    self._streams = config.data.mode == "streaming"
    if self._streams:
      self.arrays["continues"] = 1
    self._batches = None

  @property
  def tokens_per_byte(self):
    return self._batches.tokens_per_byte

  def init(self, key):
    return lm.init(self.model, key)

  def init_carry(self, rows):
    return lm.init_state(self.model, rows) if self._streams else None

  def count(self, batch):
    return jnp.sum(batch["segment_ids"] >= 0)

  def forward(self, params, batch, carry, key):
    if self._streams:
      carry = lm.keep_state(carry, batch["continues"])
    nats, carry, watched = lm.token_nats_and_metrics(
      self.model, params, batch["inputs"], batch["targets"], carry, batch["segment_ids"]
    )
    total = jnp.sum(jnp.where(batch["segment_ids"] >= 0, nats, 0.0))
    # Packed rows start afresh: a state kept for nothing would be saved, and not be expected back.
    return Measured(total, {}, watched), carry if self._streams else None

  def parameter_count(self):
    return lm.parameter_count(self.model)

  def flops_per_target(self):
    return lm.flops_per_token(self.model, self.config.data.T)

  def describe(self):
    config, model = self.config, self.model
    rows = f"{config.train.batch_size} rows of {config.data.T} tokens"
    return [
      f"{' '.join(model.pattern)}: {self.parameter_count() / 1e6:.2f}M parameters,"
      f" {model.L} blocks of width {model.D}",
      f"data {config.data.name}, {config.data.mode}, {rows},"
      f" {self.tokens_per_byte:.3f} tokens per byte",
    ]

  def train_batches(self, rows=pipeline.ALL_ROWS):
    tokenizer = pipeline.tokenizer(self.config.data)
    if tokenizer.vocab_size > self.model.vocab_size:
      raise UserError(
        f"model.vocab_size is {self.model.vocab_size}, must be at least the tokenizer's"
        f" {tokenizer.vocab_size}"
      )
    self._batches = pipeline.train_batches(
      self.config.data,
      batch_size=self.config.train.batch_size,
      seed=self.config.train.seed,
      rows=rows,
    )
    return self._batches

  def example_batch(self):
    rows, T = self.config.train.batch_size, self.config.data.T
    tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, (rows, T + 1), np.int32)
    batch = {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": np.zeros((rows, T), np.int32),
      "continues": np.ones(rows, bool),
    }
    return {name: batch[name] for name in self.arrays}

  def evaluator(self, mesh):
    return Evaluator(self.config, mesh)

  def evaluate(self, evaluator, params, directory, progress):
    results = report.evaluate_splits(self.config, evaluator, params, progress)
    return report.write_evaluation(results, directory)

  def sample(self, params):
    return report.sample_text(self.config, self.model, params)

  def finish(self, workdir, params, evaluator, progress):
    report.finish(self.config, workdir, self.model, params, evaluator, progress)
