"""The order in which items are visited: epoch after epoch, each shuffled anew, forever."""

import functools

import numpy as np


class ShuffledEpochs:
  """The endless sequence permutation_0, permutation_1, ... of range(count), with random access.

  A permutation is the order of the raw 64-bit outputs of a Philox generator keyed by (seed, epoch):
  numpy promises those bits for ever, so a run resumed years later reads on in the same order.

  Args:
    count: number of items, >= 1.
    seed: 0 <= seed < 2**64.
  """

  def __init__(self, count: int, seed: int):
    self._count = count
    self._seed = seed
    self._permutation = functools.lru_cache(maxsize=2)(self._permutation)

  def __getitem__(self, places: slice) -> np.ndarray:
    """Returns the items [stop - start] int64 at places start to stop of the sequence."""
    parts = []
    for epoch in range(places.start // self._count, -(-places.stop // self._count)):
      first = epoch * self._count
      parts.append(self._permutation(epoch)[max(0, places.start - first) : places.stop - first])
    return np.concatenate(parts)

  def _permutation(self, epoch: int) -> np.ndarray:
    generator = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))
    return np.argsort(generator.random_raw(self._count), kind="stable")
