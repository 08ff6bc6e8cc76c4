"""Black strokes and discs in pictures, all pictures of a batch at once, without antialiasing.

Coordinates are in pixels, x to the right and y downward, and a pixel's centre has whole numbers.
Nothing is looked at outside the box that a shape fits in, so large pictures cost little.
"""

import numpy as np


def draw_discs(ink: np.ndarray, centre: np.ndarray, radius: np.ndarray) -> None:
  """Inks the ellipses that fill the boxes of discs cut to whole pixels.

  The box spans the pixels floor(centre - radius) to floor(centre + radius), both included, as in
  common drawing libraries.

  Args:
    ink: pictures to draw on, bool [B Y X].
    centre: [B 2], x and y.
    radius: [B].
  """
  low, high = np.floor(centre - radius[:, None]), np.floor(centre + radius[:, None])
  middle, reach = (low + high) / 2, (high - low + 1) / 2
  window = _Window(ink, low, high)
  x = ((window.x - middle[:, :1]) / reach[:, :1])[:, None, :]
  y = ((window.y - middle[:, 1:]) / reach[:, 1:])[:, :, None]
  window.fill(x * x + y * y <= 1)


def draw_strokes(ink: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: np.ndarray) -> None:
  """Inks straight strokes with square ends, from and to whole pixels.

  Ink covers the pixels whose distance to the left of the stroke is in (-width/2, width/2]: `width`
  pixels where a stroke is level or upright, and no gap at any angle. The pixels of both ends are
  covered, and half a pixel beyond.

  Args:
    ink: pictures to draw on, bool [B Y X].
    starts, ends: [B S 2] for S strokes in each picture, x and y; cut to whole pixels.
    width: [B] pixels; at least 1 is drawn.
  """
  starts, ends = np.floor(starts), np.floor(ends)
  half = np.maximum(width, 1)[:, None, None] / 2
  points = np.concatenate([starts, ends], axis=1)
  margin = np.ceil(half[:, 0]) + 1
  window = _Window(ink, points.min(1) - margin, points.max(1) + margin)
  for start, end in zip(starts.swapaxes(0, 1), ends.swapaxes(0, 1)):
    length = np.hypot(*(end - start).T)[:, None]
    # A stroke too short for a direction is a dot as wide as the stroke.
    along = np.where(length > 0, (end - start) / np.maximum(length, 1), [1.0, 0.0])
    x, y = window.x - start[:, :1], window.y - start[:, 1:]
    cos, sin = along[:, :1], along[:, 1:]
    forward = (x * cos)[:, None, :] + (y * sin)[:, :, None]
    left = (y * cos)[:, :, None] - (x * sin)[:, None, :]
    # So that rounding does not decide about pixels at just half the width.
    left -= 1e-6
    inside = (forward >= -0.5) & (forward <= length[:, :, None] + 0.5)
    window.fill(inside & (left > -half) & (left <= half))


class _Window:
  """A square cut out of each picture, of one size in all, as near to the wanted boxes as can be.

  Attributes:
    x, y: coordinates of the columns and rows, [B size].
  """

  def __init__(self, ink: np.ndarray, low: np.ndarray, high: np.ndarray):
    side = min(ink.shape[1:])
    size = min(int((high - low).max(initial=0)) + 1, side)
    self._ink, self._size = ink, size
    self._corners = np.clip(low, 0, side - size).astype(int)
    self.x, self.y = (self._corners[:, :, None] + np.arange(size)).swapaxes(0, 1)

  def fill(self, inside: np.ndarray) -> None:
    """Inks the pixels where `inside` [B size size], rows before columns, is True."""
    for picture, (x, y), mask in zip(self._ink, self._corners.tolist(), inside):
      picture[y : y + self._size, x : x + self._size] |= mask
