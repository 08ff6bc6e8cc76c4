import numpy as np
import pytest

from experiments.tasks.rays import CHANNELS, RayBatches


@pytest.mark.parametrize("side", [1, 8, 16])
def test_targets_follow_from_the_arrow_that_is_seen(side):
  batch = RayBatches(500, side, seed=1)[2]
  images, targets = batch["images"].astype(float), batch["targets"]
  assert images.shape == (500, side, side, len(CHANNELS)) and targets.shape == (500, side, side)
  arrow = images[..., 0] == 1
  assert (arrow.sum((1, 2)) == 1).all() and not images[~arrow].any()
  _, rows, columns = np.nonzero(arrow)
  _, cos, sin, right, down = images[arrow].T
  assert np.abs(np.abs(cos + 1j * sin) - 1).max() < 1e-6
  assert max(np.abs(right).max(), np.abs(down).max()) <= 0.5
  # In the frame of the arrow, cells are complex numbers: ahead is the positive real axis.
  centres = np.arange(side)[None, None, :] + 1j * np.arange(side)[None, :, None]
  place = (columns + right) + 1j * (rows + down)
  seen = (centres - place[:, None, None]) * (cos - 1j * sin)[:, None, None]
  clear = (np.abs(seen.real) > 1e-5) & (np.abs(np.abs(seen.imag) - 0.75) > 1e-5)
  truth = (seen.real > 0) & (np.abs(seen.imag) < 0.75)
  assert np.array_equal(targets[clear], truth[clear]) and clear.mean() > 0.999


def test_arrows_are_everywhere_and_point_anywhere():
  side, count = 8, 6400
  images = RayBatches(count, side, seed=3)[0]["images"]
  arrow = images[..., 0] == 1
  # 100 expected in each cell, 400 in each of 16 directions: five standard deviations.
  assert np.abs(arrow.sum(0) - 100).max() < 50
  angles = np.arctan2(images[arrow][:, 2], images[arrow][:, 1])
  assert np.abs(np.histogram(angles, 16, (-np.pi, np.pi))[0] - 400).max() < 100
  assert np.abs(images[arrow][:, 3:].mean(0)).max() < 5 * 12**-0.5 / 80
