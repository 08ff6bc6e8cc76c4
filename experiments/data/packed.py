"""Packed batches: rows of T tokens cut from the whole stream, in a new order each epoch."""

import numpy as np

from experiments.data.batches import make_batch
from experiments.data.order import ShuffledEpochs
from experiments.data.token_store import TokenStore


class PackedBatches:
  """`batches[n]` is batch n, a pure function of (seed, n).

  Row i of the split is stream[i T : i T + T] with the targets one further on, so every target of
  the split is in exactly one row. The last row is filled up with padding. Rows are dealt into
  batches without regard to where an epoch ends: none is dropped.

  Args:
    store: the split.
    batch_size: rows of the global batch.
    T: tokens per row.
    seed: of the order of the rows.
    rows: which rows of the global batch to make; all by default.
  """

  def __init__(
    self, store: TokenStore, batch_size: int, T: int, seed: int, rows: slice = slice(None)
  ):
    self._store, self._batch_size, self._T = store, batch_size, T
    self._targets = len(store.tokens) - 1
    self._order = ShuffledEpochs(-(-self._targets // T), seed)
    self._begin, self._end, _ = rows.indices(batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    first = n * self._batch_size
    rows = self._order[first + self._begin : first + self._end]
    places = rows[:, None] * self._T + np.arange(self._T)
    return make_batch(self._store, np.where(places < self._targets, places, -1))
