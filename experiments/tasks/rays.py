"""Rays: one token of a grid holds an arrow; which cells does it point at?

The answer for a cell needs the arrow's place and direction, which a recurrence over the grid can
carry to cells at any distance: trained on small grids, a model that does so is right on larger
ones.
"""

import numpy as np

from experiments.errors import UserError
from experiments.tasks import randomness

CHANNELS = ("arrow", "cos", "sin", "offset_x", "offset_y")
# Half the width of a ray in cells: rays at any angle then cover cells that touch.
REACH = 0.75


class RayBatches:
  """`batches[n]` is batch n, a pure function of (seed, n): examples n batch_size and on.

  A grid has side x side cells of side 1; x counts columns to the right, y rows downward, and angles
  turn from x to y. The arrow starts at a point p that is uniform over the grid, edges included, and
  has a uniform direction u = (cos, sin). Each batch is a dict of

    images   float32 [B Y X 5]: zero but for the cell that p is in, which has CHANNELS: 1, cos, sin,
             and p minus the cell's centre, each coordinate in [-.5, .5);
    targets  int32 [B Y X]: 1 where the cell's centre c is on the forward ray, which is in front of
             the arrow, (c - p) . u > 0, and less than REACH cells from its line.

  The arrow's own cell is judged as every other, so its target is 1 for half of all arrows; an arrow
  at an edge that points outward may have no other, or none. Targets being rare (a tenth of the
  cells or fewer), F1 over all cells of all examples tells more than accuracy.

  Args:
    batch_size: rows of the global batch.
    side: cells along each side of the grid.
    seed: 0 <= seed < 2**64. Grids of other sides, and other splits, need a seed of their own.
    rows: which rows of the global batch to make, a contiguous slice; all by default.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(self, batch_size: int, side: int, seed: int, rows: slice = slice(None)):
    randomness.check(batch_size, seed)
    if side < 1:
      raise UserError(f"side={side} cells: at least 1 is needed")
    self._batch_size, self._side, self._seed = batch_size, side, seed
    self._begin, self._end, _ = rows.indices(batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    first, count = n * self._batch_size + self._begin, self._end - self._begin
    numbers = randomness.uniform(randomness.words(self._seed, first, count, 3))
    start = numbers[:, :2] * self._side
    angle = numbers[:, 2] * (2 * np.pi)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return {
      "images": self._images(start, direction),
      "targets": _on_ray(start, direction, self._side).astype(np.int32),
    }

  def _images(self, start: np.ndarray, direction: np.ndarray) -> np.ndarray:
    images = np.zeros((len(start), self._side, self._side, len(CHANNELS)), np.float32)
    cell = np.floor(start).astype(int)
    images[np.arange(len(start)), cell[:, 1], cell[:, 0]] = np.concatenate(
      [np.ones((len(start), 1)), direction, start - cell - 0.5], axis=1
    )
    return images


def _on_ray(start: np.ndarray, direction: np.ndarray, side: int) -> np.ndarray:
  """Returns whether each cell [B Y X] of the grid is on the forward ray of each arrow [B 2]."""
  centre = np.arange(side) + 0.5
  x = (centre - start[:, :1])[:, None, :]
  y = (centre - start[:, 1:])[:, :, None]
  cos, sin = direction.T[:, :, None, None]
  return (x * cos + y * sin > 0) & (np.abs(x * sin - y * cos) < REACH)
