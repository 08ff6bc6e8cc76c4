"""What a run trains: a model, its data and its loss, behind one interface.

The trainer knows nothing else of what it trains. A new task is a subclass, and a line in
`experiments.tasks.make_task`.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

from experiments.data.pipeline import ALL_ROWS


class Measured(NamedTuple):
  """What a forward pass over a batch measures."""

  nats: Array  # cross-entropy, summed over the targets that count
  sums: dict[str, Array]  # further sums over these targets, such as how many answers are right
  largest: dict[str, Array]  # the largest values of what layers watch, by name


class Task(Protocol):
  """A model, its data and its loss.

  Attributes:
    config: the experiment.
    model: the model's own Config.
    unit: what a target is called in the plural: tokens, images, cells.
    arrays: the arrays of a batch that a step takes, each with its number of axes, rows first.
    targets_per_row: how many targets a row has, padding included.
    tokens_per_byte: of the text, or None where there is none to count bytes of.
    best_metric: key of the metric by which checkpoints are ranked, the lowest first.
  """

  config: Any
  model: Any
  unit: str
  arrays: dict[str, int]
  targets_per_row: int
  tokens_per_byte: float | None
  best_metric: str

  def init(self, key: Array) -> Any:
    """Initial parameters, float32."""

  def init_carry(self, rows: int) -> Any:
    """The model's state before a first batch of so many rows; None where none is carried."""

  def count(self, batch: dict[str, Array]) -> Array:
    """How many targets of a batch count."""

  def forward(
    self, params: Any, batch: dict[str, Array], carry: Any, key: Array
  ) -> tuple[Measured, Any]:
    """The losses of a batch, and the state after it, None where none is carried.

    `key` is another one at each step, for what a model drops at random while it is trained.
    """

  def parameter_count(self) -> int:
    """Number of parameters."""

  def flops_per_target(self) -> float:
    """Floating-point operations of a forward pass, for each target; training takes thrice."""

  def describe(self) -> list[str]:
    """Lines for the person who starts a run: the model, and the data."""

  def train_batches(self, rows: Sequence[slice] = ALL_ROWS) -> Any:
    """An endless iterator over batches with `get_state` and `set_state`.

    Args:
      rows: which rows of the global batches to make, slices of them in order.

    Raises:
      UserError: a field that is wrong, or data that cannot be had.
    """

  def example_batch(self) -> dict[str, np.ndarray]:
    """A batch as a step takes it, made without any data, to trace, compile and time with."""

  def evaluator(self, mesh: Any) -> Any:
    """`evaluator(params, split, brief)` measures a split, or with `brief` as much of it as a
    validation during training reads; the result has `metrics` (dict of floats) and `summary`.
    """

  def evaluate(
    self, evaluator: Any, params: Any, directory: pathlib.Path, progress: Any
  ) -> list[pathlib.Path]:
    """Measures all splits in full, prints and writes the figures; returns the files written."""

  def finish(self, workdir: str, params: Any, evaluator: Any, progress: Any) -> None:
    """Evaluates, draws, and says where everything lies, at the end of a run."""

  def sample(self, params: Any) -> Iterator[str]:
    """Text, piece by piece.

    Raises:
      UserError: there is no text in this task.
    """
