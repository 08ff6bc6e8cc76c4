import numpy as np
import pytest

from experiments.tasks import arrow
from experiments.tasks.arrow import ArrowBatches, ArrowTokenBatches


def points_at(place, cos, sin, disc, radius):
  """Whether the arrows point at the discs, and how far off the edge of the margin they are."""
  seen = ((disc - place) @ [1, 1j]) * (cos - 1j * sin)
  ahead, aside = seen.real > 0, np.abs(seen.imag)
  inside, outside = radius / 1.2 - aside, np.where(ahead, aside - 1.2 * radius, np.inf)
  return ahead & (aside < radius), np.maximum(np.where(ahead, inside, -np.inf), outside)


@pytest.mark.parametrize(("seed", "side"), [(100042, 192), (100043, 384), (7, 181)])
def test_labels_are_true_and_scenes_as_promised(seed, side):
  scenes = arrow.scenes(seed, range(2000), side)
  truth, margin = points_at(
    scenes.arrow,
    np.cos(scenes.direction),
    np.sin(scenes.direction),
    scenes.disc,
    scenes.radius,
  )
  assert np.array_equal(scenes.label, truth)
  assert margin.min() > -1e-9
  # All of the allowed cone is used, up to its edge.
  assert margin.min() < 0.1 and margin[scenes.label == 1].max() > 10
  assert abs(scenes.label.mean() - 0.5) < 5 / 2 / np.sqrt(2000)
  away = np.abs(scenes.disc - scenes.arrow)
  assert (away >= 2 * scenes.radius[:, None]).all()
  for place in (scenes.arrow, scenes.disc):
    assert place.min() >= 30 and place.max() <= side - 30
    assert place.min() < 32 and place.max() > side - 32
  assert scenes.radius.min() >= 15 and scenes.radius.max() < 30
  assert set(scenes.length) == set(range(15, 30)) and set(scenes.width) == {2, 3}


def test_numbers_are_drawn_in_the_published_order():
  side = 192
  scenes = arrow.scenes(42, range(100, 120), side)
  start = np.random.default_rng(42).integers(2**62)
  for i in range(20):
    rng = np.random.default_rng(start + 100 + i)
    label = rng.uniform() < 0.5
    length, width = int(rng.uniform(15, 30)), int(rng.uniform(2, 4))
    x, y = 132 * rng.random(), 132 * rng.random()
    radius = 15 + 15 * rng.random()
    disc = [a + 2 * radius + (132 - 4 * radius) * rng.random() for a in (x, y)]
    disc = np.array([c - 132 if c > 132 else c for c in disc])
    distance = np.hypot(*(disc - [x, y]))
    reach = radius / 1.2 if label else radius * 1.2
    half = np.arccos(np.sqrt(1 - reach**2 / distance**2))
    span = 2 * half if label else 2 * np.pi - 2 * half
    turn = rng.random() * span + (-half if label else half)
    assert (scenes.label[i], scenes.length[i], scenes.width[i]) == (label, length, width)
    np.testing.assert_allclose(scenes.arrow[i], [x + 30, y + 30], rtol=1e-12)
    np.testing.assert_allclose(scenes.radius[i], radius, rtol=1e-12)
    np.testing.assert_allclose(scenes.disc[i], disc + 30, rtol=1e-12)
    direction = np.arctan2(disc[1] - y, disc[0] - x) + turn
    np.testing.assert_allclose(scenes.direction[i], direction, rtol=1e-9)


@pytest.mark.parametrize(("side", "scale"), [(192, 1.0), (384, 1.0), (96, 0.5)])
def test_pictures_show_the_scenes(side, scale):
  scenes = arrow.scenes(3, range(40), side / scale)
  ink = arrow.draw(scenes, side, scale)
  y, x = np.mgrid[:side, :side]
  for i, picture in enumerate(ink):
    away = np.hypot(x - scale * scenes.disc[i, 0], y - scale * scenes.disc[i, 1])
    near = away < scale * scenes.radius[i] + 2.5
    area = np.pi * (scale * scenes.radius[i]) ** 2
    assert abs(picture[near].sum() / area - 1) < 0.15 * (1 / scale)
    # The rest is the arrow: as long and as wide as it should be, with the wide end in front.
    rows, columns = np.nonzero(picture & ~near)
    direction = np.exp(-1j * scenes.direction[i])
    seen = (columns + 1j * rows - scale * (scenes.arrow[i] @ [1, 1j])) * direction
    half = scale * (scenes.length[i] // 2)
    assert np.abs(np.array([seen.real.min() + half, seen.real.max() - half])).max() < 3
    assert np.abs(seen.imag).max() < scale * (scenes.length[i] / 2.5 * np.sin(0.5) + 1.5) + 1.5
    front, back = (np.abs(seen.imag[s * seen.real > half / 5]) for s in (1, -1))
    assert front.max() > back.max()


def test_images_are_normalised_black_on_white():
  batches = ArrowBatches(3, 192, seed=42, examples=0)
  batch = batches[1]
  assert batch["images"].shape == (3, 192, 192, 3) and batch["images"].dtype == np.float32
  scenes = arrow.scenes(42, range(3, 6), 192)
  assert np.array_equal(batch["targets"], scenes.label) and batch["targets"].dtype == np.int32
  ink = arrow.draw(scenes, 192)
  pixels = batch["images"] * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
  np.testing.assert_allclose(pixels, np.repeat(~ink[..., None], 3, axis=-1), atol=1e-6)


def test_an_epoch_is_every_example_once():
  batches = ArrowBatches(4, 192, seed=9, examples=10)
  pictures = [image.tobytes() for n in range(5) for image in batches[n]["images"]]
  known = {
    arrow.colors(picture).tobytes() for picture in arrow.draw(arrow.scenes(9, range(10), 192), 192)
  }
  assert set(pictures[:10]) == set(pictures[10:]) == known and len(known) == 10
  assert pictures[:10] != pictures[10:]


@pytest.mark.parametrize("side", [7, 8, 16])
def test_tokens_hold_all_that_the_label_needs(side):
  batch = ArrowTokenBatches(1000, side, seed=4)[1]
  images = batch["images"].astype(float)
  place, others = {}, {}
  for channel, name in enumerate(("arrow", "disc")):
    here = images[..., channel] == 1
    assert (here.sum((1, 2)) == 1).all()
    _, rows, columns = np.nonzero(here)
    assert min(rows.min(), columns.min()) == 1 and max(rows.max(), columns.max()) == side - 2
    place[name] = np.stack([columns, rows], axis=1) + images[here][:, 5:]
    assert np.abs(images[here][:, 5:]).max() <= 0.5
    others[name] = images[here]
  assert not images[(images[..., :2] == 0).all(-1)].any()
  assert not others["arrow"][:, [1, 4]].any() and not others["disc"][:, [0, 2, 3]].any()
  radius = others["disc"][:, 4]
  assert radius.min() >= 0.5 and radius.max() <= 1
  truth, margin = points_at(place["arrow"], *others["arrow"][:, 2:4].T, place["disc"], radius)
  assert np.array_equal(batch["targets"], truth) and margin.min() > -1e-5
