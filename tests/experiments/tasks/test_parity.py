import numpy as np
import pytest

from experiments.tasks.parity import ParityBatches


@pytest.mark.parametrize("T", [1, 32, 65, 300])
def test_targets_are_the_parity_so_far(T):
  batch = ParityBatches(64, T, seed=1)[7]
  assert all(values.shape == (64, T) for values in batch.values())
  assert np.array_equal(batch["targets"], np.cumsum(batch["inputs"], axis=1) % 2)
  assert batch["counted"].dtype == bool and batch["counted"].all()
  assert not batch["segment_ids"].any() and (batch["positions"] == np.arange(T)).all()
  last = ParityBatches(64, T, seed=1, supervise="last")[7]
  assert (last["counted"] == (np.arange(T) == T - 1)).all()
  assert all(np.array_equal(last[name], batch[name]) for name in batch if name != "counted")


def test_bits_are_fair_and_independent():
  inputs = ParityBatches(2000, 100, seed=2)[0]["inputs"]
  signs = 1.0 - 2 * inputs
  # Sums of n fair signs: four standard deviations for a mean, five for the largest of 10,000.
  assert set(np.unique(inputs)) == {0, 1}
  assert np.abs(signs.mean()) < 4 / np.sqrt(signs.size)
  products = signs.T @ signs / len(signs)
  assert np.abs(products - np.eye(100)).max() < 5 / np.sqrt(len(signs))
  assert len({row.tobytes() for row in inputs}) == 2000
