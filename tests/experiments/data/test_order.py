import numpy as np
import pytest

from experiments.data.order import ShuffledEpochs


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_epoch_is_a_new_permutation(count):
  order = ShuffledEpochs(count, seed=1)
  sequence = order[0 : 20 * count]
  epochs = sequence.reshape(20, count)
  assert (np.sort(epochs, axis=1) == np.arange(count)).all()
  if count > 5:
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 15
  for start, stop in [(0, 1), (count // 2, 3 * count), (5 * count - 1, 5 * count + 1)]:
    assert np.array_equal(order[start:stop], sequence[start:stop])


def test_the_order_is_fixed_for_ever():
  # If these change, no run can be resumed exactly after an upgrade.
  assert ShuffledEpochs(8, seed=0)[0:16].tolist() == [
    0,
    2,
    1,
    5,
    4,
    3,
    6,
    7,
    5,
    3,
    7,
    2,
    4,
    1,
    0,
    6,
  ]


def test_places_are_equally_likely():
  firsts = [ShuffledEpochs(4, seed)[0:1].item() for seed in range(2000)]
  assert np.abs(np.bincount(firsts, minlength=4) - 500).max() < 100
