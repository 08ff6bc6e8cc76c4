"""Arrow pointing: a picture of an arrow and a disc; does the arrow point at the disc?

The task of "pLSTM: parallelizable Linear Source Transition Mark networks" (arXiv 2506.11997), made
on the fly. Arrow and disc have the same size in pixels at every size of the picture, so a model
trained on small pictures meets larger distances, and nothing else new, in large ones.

The scenes are those of the published generator, number for number: with a seed of theirs, such as
100042 and 100043 (validation, at 192 and 384 pixels) or 200042 and 200043 (test), example i here
has the label, places, sizes and direction of their example i. Of what is drawn, pixels at the edges
may differ.

A scene is made of nine random numbers U, uniform in [0, 1), in this order, in pixels:

  label      1 (points at the disc) where U < 1/2
  length     floor(15 + 15 U) of the arrow
  width      floor(2 + 2 U) of its strokes
  a_x, a_y   its middle, (side - 60) U each
  r          15 + 15 U, the radius of the disc
  c_x, c_y   the disc's centre, a + 2r + (side - 60 - 4r) U, less side - 60 where that is larger
  direction  angle(c - a) - h + 2h U         where the label is 1, h = asin(r / 1.2 / |c - a|)
             angle(c - a) + h + (2π - 2h) U  where it is 0, h = asin(1.2 r / |c - a|)

and 30 is added to all places at the end. So |c_x - a_x| and |c_y - a_y| are at least 2r, and the
arrow's line passes the disc's centre at less than r / 1.2 or at more than 1.2 r (or the disc is
behind): never in between. x counts columns to the right, y rows downward, and angles turn from x to
y.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data.order import ShuffledEpochs
from experiments.errors import UserError
from experiments.tasks import drawing, randomness

# Of the red, green and blue of ImageNet's pictures, which lie in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
TOKEN_CHANNELS = ("arrow", "disc", "cos", "sin", "radius", "offset_x", "offset_y")

_PADDING = 30
_RADIUS = 15, 30
_HEAD_ANGLES = np.array([-0.5, 0.5])
# From here up the disc finds a place at the distance it must have.
_LEAST_SIDE = 2 * _PADDING + 4 * _RADIUS[1] + 1
# Pixels of the pictures for a cell of the grids of tokens: padding 1, radius 1/2 to 1.
_CELL = 30


@dataclasses.dataclass(frozen=True)
class Scenes:
  """What is to be drawn, for B pictures, in pixels.

  Attributes:
    label: int32 [B], 1 where the arrow points at the disc.
    length, width: of the arrow and its strokes [B].
    arrow: the arrow's middle [B 2], x and y.
    direction: angle [B] in radians.
    radius: of the disc [B].
    disc: its centre [B 2].
  """

  label: np.ndarray
  length: np.ndarray
  width: np.ndarray
  arrow: np.ndarray
  direction: np.ndarray
  radius: np.ndarray
  disc: np.ndarray


def scenes(seed: int, indices: Sequence[int], side: float) -> Scenes:
  """Returns the scenes with these indices, for pictures of side x side pixels; see the module."""
  # What numpy's default_rng(seed).integers(2**62) yields, from raw words, which numpy promises to
  # keep for ever.
  start = int(np.random.PCG64(seed).random_raw()) >> 2
  words = np.stack([np.random.PCG64(start + int(index)).random_raw(9) for index in indices])
  u = randomness.uniform(words)
  free = side - 2 * _PADDING
  label = u[:, 0] < 0.5
  arrow = free * u[:, 3:5]
  radius = _RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * u[:, 5]
  offset = 2 * radius[:, None]
  disc = arrow + offset + (free - 2 * offset) * u[:, 6:8]
  disc = np.where(disc > free, disc - free, disc)
  away = disc - arrow
  cone = np.arcsin(np.where(label, radius / 1.2, radius * 1.2) / np.hypot(*away.T))
  turn = np.where(label, (2 * u[:, 8] - 1) * cone, cone + (2 * np.pi - 2 * cone) * u[:, 8])
  return Scenes(
    label=label.astype(np.int32),
    length=np.floor(15 + 15 * u[:, 1]),
    width=np.floor(2 + 2 * u[:, 2]),
    arrow=arrow + _PADDING,
    direction=np.arctan2(away[:, 1], away[:, 0]) + turn,
    radius=radius,
    disc=disc + _PADDING,
  )


def draw(scenes: Scenes, side: int, scale: float = 1.0) -> np.ndarray:
  """Returns where there is ink, bool [B side side], with all places and sizes times `scale`.

  Half the arrow's length is cut to whole pixels, as are the lengths of the two strokes of its head,
  2/5 of the length and half a radian off the shaft; then the ends of the strokes are.
  """
  ink = np.zeros((len(scenes.label), side, side), bool)
  drawing.draw_discs(ink, scale * scenes.disc, scale * scenes.radius)
  angle = scenes.direction[:, None]
  shaft = scenes.length[:, None, None] // 2 * _unit(angle)
  middle = scenes.arrow[:, None]
  tip = middle + shaft
  head = scenes.length[:, None, None] // 2.5 * _unit(angle + _HEAD_ANGLES)
  starts = np.concatenate([middle - shaft, tip - head], axis=1)
  ends = np.broadcast_to(tip, starts.shape)
  drawing.draw_strokes(ink, scale * starts, scale * ends, scale * scenes.width)
  return ink


class ArrowBatches:
  """`batches[n]` is batch n, a pure function of (seed, n).

  Each batch is a dict of

    images   float32 [B side side 3]: black on white, less MEAN, divided by DEVIATION;
    targets  int32 [B]: 1 where the arrow points at the disc.

  Args:
    batch_size: rows of the global batch.
    side: pixels along each side; 192 to train and 384 to extrapolate in the paper.
    seed: of the scenes and the order they come in; 0 <= seed < 2**64.
    rows: which rows of the global batch to make, a contiguous slice; all by default.
    examples: how many different ones there are, in a new order each epoch; batches are dealt
      without regard to where an epoch ends. 0 for an endless sequence of new ones, in order.
    scale: of all sizes but `side`, for a smaller copy of the task: scale .5 with side 96 and 192 is
      like 192 and 384. Below .5 an arrow is too few pixels to show a direction well.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    batch_size: int,
    side: int,
    seed: int,
    rows: slice = slice(None),
    examples: int = 100_000,
    scale: float = 1.0,
  ):
    randomness.check(batch_size, seed)
    if not 0 < scale < np.inf:
      raise UserError(f"scale={scale} must be a number greater than 0")
    if side < _LEAST_SIDE * scale:
      raise UserError(
        f"side={side} pixels: at least {_LEAST_SIDE} times the scale, {scale}, are needed"
      )
    if examples < 0:
      raise UserError(f"examples={examples} must be at least 0, which stands for no end of them")
    self._batch_size, self._side, self._seed, self._scale = batch_size, side, seed, scale
    self._order = ShuffledEpochs(examples, seed) if examples else None
    self._begin, self._end, _ = rows.indices(batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    first = n * self._batch_size
    places = slice(first + self._begin, first + self._end)
    indices = range(places.start, places.stop) if self._order is None else self._order[places]
    batch = scenes(self._seed, indices, self._side / self._scale)
    return {"images": colors(draw(batch, self._side, self._scale)), "targets": batch.label}


class ArrowTokenBatches:
  """Arrow pointing on a grid of tokens instead of pixels, with nothing to be seen but to compute.

  `batches[n]` is batch n, a pure function of (seed, n): scenes n batch_size and on, of pictures
  with 30 pixels to the side of a cell. Each batch is a dict of

    images   float32 [B Y X 7], zero but for two cells, which have TOKEN_CHANNELS: the arrow's has
             arrow = 1, cos, sin; the disc's has disc = 1 and its radius in cells, 1/2 to 1; both
             have what is left of their place less the cell's centre, in [-.5, .5). Cells at the
             edges of the grid are empty.
    targets  int32 [B]: 1 where the arrow points at the disc.

  Args:
    batch_size: rows of the global batch.
    side: cells along each side of the grid; 8 to train and 16 to extrapolate.
    seed: of the scenes; 0 <= seed < 2**64.
    rows: which rows of the global batch to make, a contiguous slice; all by default.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(self, batch_size: int, side: int, seed: int, rows: slice = slice(None)):
    randomness.check(batch_size, seed)
    least = -(-_LEAST_SIDE // _CELL)
    if side < least:
      raise UserError(f"side={side} cells: at least {least} are needed")
    self._batch_size, self._side, self._seed = batch_size, side, seed
    self._begin, self._end, _ = rows.indices(batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    first = n * self._batch_size
    indices = range(first + self._begin, first + self._end)
    batch = scenes(self._seed, indices, self._side * _CELL)
    images = np.zeros((len(indices), self._side, self._side, len(TOKEN_CHANNELS)), np.float32)
    zero, one = np.zeros((len(indices), 1)), np.ones((len(indices), 1))
    radius = batch.radius[:, None] / _CELL
    for place, values in (
      (batch.arrow / _CELL, [one, zero, _unit(batch.direction), zero]),
      (batch.disc / _CELL, [zero, one, zero, zero, radius]),
    ):
      cell = np.floor(place).astype(int)
      images[np.arange(len(indices)), cell[:, 1], cell[:, 0]] = np.concatenate(
        [*values, place - cell - 0.5], axis=1
      )
    return {"images": images, "targets": batch.label}


def colors(ink: np.ndarray) -> np.ndarray:
  """Returns normalised pictures float32 [B Y X 3]: black where there is ink, else white."""
  white, black = (
    ((value - np.array(MEAN)) / np.array(DEVIATION)).astype(np.float32) for value in (1, 0)
  )
  pictures = np.empty((*ink.shape, 3), np.float32)
  # Whole rows are copied faster than pixels.
  pictures.reshape(-1, ink.shape[-1] * 3)[:] = np.tile(white, ink.shape[-1])
  pictures.reshape(-1, 3)[np.flatnonzero(ink)] = black
  return pictures


def _unit(angle: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(angle), np.sin(angle)], axis=-1)
