import numpy as np
import pytest

from experiments.tasks import drawing


def stroke(start, end, width, shape=(40, 40)):
  ink = np.zeros((1, *shape), bool)
  drawing.draw_strokes(ink, np.array([[start]]), np.array([[end]]), np.array([width]))
  return ink[0]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_level_and_upright_strokes_are_as_wide_as_said(width):
  for ends in [((10, 20), (25, 20)), ((25, 20), (10, 20))]:
    ink = stroke(*ends, width)
    assert (ink.sum(0)[10:26] == width).all() and ink.sum() == 16 * width
    assert ink[20, 10:26].all()
    upright = stroke(*(end[::-1] for end in ends), width)
    assert (upright.sum(1)[10:26] == width).all() and upright.sum() == 16 * width


@pytest.mark.parametrize("width", [0.5, 2, 3])
def test_strokes_cover_their_line_and_nothing_far_from_it(width):
  y, x = np.mgrid[:40, :40]
  for angle in np.linspace(0, 2 * np.pi, 50):
    start = np.array([20.7, 19.2])
    end = start + 12 * np.array([np.cos(angle), np.sin(angle)])
    ink = stroke(start, end, width)
    line = np.floor(start) + np.linspace(0, 1, 200)[:, None] * (np.floor(end) - np.floor(start))
    away = np.hypot(x[..., None] - line[:, 0], y[..., None] - line[:, 1])
    reach, nearest = max(width, 1) / 2, away.argmin(-1)
    assert ink[(away.min(-1) < reach - 0.1) & (nearest > 0) & (nearest < 199)].all()
    assert away.min(-1)[ink].max() < np.hypot(reach, 0.5) + 0.1
    # No gap: some ink within a pixel of each point of the line.
    assert away[ink].min(0).max() < 1


def test_a_stroke_without_length_is_a_dot():
  ink = stroke((5.2, 5.9), (5.8, 5.1), 3)
  assert np.argwhere(ink).tolist() == [[4, 5], [5, 5], [6, 5]]


def test_discs_fill_their_boxes():
  centres = np.array([[12.3, 25.9], [20.4, 20.7], [3.0, 36.5]])
  radii = np.array([10.4, 0.2, 3.0])
  ink = np.zeros((3, 40, 40), bool)
  drawing.draw_discs(ink, centres, radii)
  y, x = np.mgrid[:40, :40]
  for picture, centre, radius in zip(ink, centres, radii):
    rows, columns = np.nonzero(picture.any(1))[0], np.nonzero(picture.any(0))[0]
    low, high = np.floor(centre - radius), np.floor(centre + radius)
    assert [columns[0], rows[0]] == low.tolist() and [columns[-1], rows[-1]] == high.tolist()
    away = np.hypot(x - centre[0], y - centre[1])
    assert picture[away < radius - 1.5].all() and not picture[away > radius + 1.5].any()
  assert ink[1].sum() == 1


def test_what_is_outside_is_not_drawn():
  ink = np.zeros((2, 20, 20), bool)
  drawing.draw_discs(ink, np.array([[-3.0, 10.0], [19.0, 25.0]]), np.array([5.0, 8.0]))
  y, x = np.mgrid[:20, :20]
  assert ink[0, 10, :3].all() and not ink[0][np.hypot(x + 3, y - 10) > 6].any()
  assert ink[1, 18:, 19].all() and not ink[1][np.hypot(x - 19, y - 25) > 9].any()
