"""Parity: was the number of ones so far odd? No linear model without negative eigenvalues can say.

Every bit changes the answer, so the state must be kept exactly, however long the sequence: a model
that has learnt the rule answers right far beyond the lengths it was trained on.
"""

import numpy as np

from experiments.errors import UserError
from experiments.tasks import randomness

_SUPERVISE = ("all", "last")


class ParityBatches:
  """`batches[n]` is batch n, a pure function of (seed, n): examples n batch_size and on.

  Fair independent bits x_t, and targets y_t = x_0 + ... + x_t mod 2. Each batch is a dict of arrays
  [B T]: int32 inputs, targets, segment_ids (all 0) and positions (0, 1, ...), as batches of text
  have them, and bool `counted`: whether the target counts in losses and accuracies. It is to be
  combined with segment_ids >= 0 by "and". Targets that are not counted hold the parity all the
  same.

  Args:
    batch_size: rows of the global batch.
    T: bits per row.
    seed: 0 <= seed < 2**64. Data of other lengths, and of other splits, need a seed of their own.
    rows: which rows of the global batch to make, a contiguous slice; all by default.
    supervise: "all" counts every target, "last" only that of the last position.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    batch_size: int,
    T: int,
    seed: int,
    rows: slice = slice(None),
    supervise: str = "all",
  ):
    randomness.check(batch_size, seed)
    if T < 1:
      raise UserError(f"T={T} bits per row: at least 1 is needed")
    if supervise not in _SUPERVISE:
      raise UserError(f"supervise={supervise!r} is unknown: allowed are {', '.join(_SUPERVISE)}")
    self._batch_size, self._T, self._seed, self._supervise = batch_size, T, seed, supervise
    self._begin, self._end, _ = rows.indices(batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    first, count = n * self._batch_size + self._begin, self._end - self._begin
    words = randomness.words(self._seed, first, count, -(-self._T // 64))
    inputs = randomness.bits(words, self._T)
    shape = inputs.shape
    positions = np.arange(self._T, dtype=np.int32)
    counted = positions == self._T - 1 if self._supervise == "last" else positions >= 0
    return {
      "inputs": inputs.astype(np.int32),
      "targets": np.bitwise_xor.accumulate(inputs, axis=1).astype(np.int32),
      "counted": np.tile(counted, (count, 1)),
      "segment_ids": np.zeros(shape, np.int32),
      "positions": np.tile(positions, (count, 1)),
    }
