"""From places in a token stream to the dict that a training step takes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.data.token_store import TokenStore


class JoinedRows:
  """Some rows of the batches of a kind: several slices of each batch's rows, one below the other.

  Args:
    make: what makes the batches of one slice of the rows.
    rows: the slices.
  """

  def __init__(self, make: Callable[[slice], Any], rows: Sequence[slice]):
    self._parts = [make(part) for part in rows]

  @property
  def tokens_per_byte(self) -> float:
    """That of the batches."""
    return self._parts[0].tokens_per_byte

  def __len__(self) -> int:
    return len(self._parts[0])

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return (self[n] for n in range(len(self)))

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    parts = [part[n] for part in self._parts]
    if len(parts) == 1:
      return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def make_batch(
  store: TokenStore, places: np.ndarray, cuts: np.ndarray | tuple = ()
) -> dict[str, np.ndarray]:
  """Gathers a batch from the stream.

  Args:
    store: the tokens.
    places: index in the stream of each input token [B T]; -1 is padding, at the end of a row only.
    cuts: indices in the stream where a segment begins, as it does where a document begins.

  Returns:
    int32 arrays [B T]: inputs; targets (the token after the input in the stream, which is the
    boundary where a document ends); segment_ids (0, 1, ... for the documents of a row in order, or
    for their pieces between cuts; -1 at padding); positions (index of the input in its document,
    whose boundary has 0). At padding inputs, targets and positions are 0.
  """
  real = places >= 0
  known = np.where(real, places, 0)
  inputs = store.tokens[known].astype(np.int32)
  targets = store.tokens[known + 1].astype(np.int32)
  begins = (inputs == store.boundary) | np.isin(known, cuts)
  begins[:, 0] = True
  # Segments numbered through all rows: each lies in one document.
  segment = np.cumsum(begins).reshape(begins.shape) - 1
  document = np.searchsorted(store.starts, known[begins], side="right") - 1
  positions = known - store.starts[document][segment]
  return {
    "inputs": np.where(real, inputs, 0),
    "targets": np.where(real, targets, 0),
    "segment_ids": np.where(real, segment - segment[:, :1], -1).astype(np.int32),
    "positions": np.where(real, positions, 0).astype(np.int32),
  }
