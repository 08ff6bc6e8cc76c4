"""Figures show what the log holds, at any length, and are images of a sensible size."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments import plots
from experiments.errors import UserError


@pytest.fixture
def drawn(monkeypatch):
  """The axes of each figure as it is written."""
  axes = []
  write = plots._write

  def spy(figure, png):
    axes.append(figure.axes[0])
    write(figure, png)

  monkeypatch.setattr(plots, "_write", spy)
  return axes


def log(path, steps, **series):
  rows = [
    {"step": int(step), **{key: values(step) for key, values in series.items()}} for step in steps
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_image(path):
  image = matplotlib.image.imread(path)
  assert image.shape == (630, 1080, 4)
  assert (image[0, 0] == 1).all() and (image[..., :3] < 0.9).any(-1).mean() > 0.005


@pytest.mark.parametrize("count", [1, 2, 7, 400])
def test_loss_curve_at_any_length(tmp_path, drawn, count):
  log(
    tmp_path / "metrics.jsonl",
    range(10, 10 * count + 1, 10),
    **{
      "train/bits_per_byte": lambda step: 2 + 6 * np.exp(-step / 50),
      "validation/bits_per_byte": lambda step: 2.1 if step % 50 == 0 or step == 10 else None,
      "train/tokens": lambda step: step * 100,
    },
  )
  plots.loss_curve(tmp_path, tmp_path / "loss.png")
  check_image(tmp_path / "loss.png")
  axes = drawn[0]
  raw, smooth, validation = axes.lines
  np.testing.assert_array_equal(raw.get_xdata(), np.arange(10, 10 * count + 1, 10))
  assert len(smooth.get_ydata()) == count and set(validation.get_ydata()) == {2.1}
  assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "validation"]
  assert [child.get_xlabel() for child in axes.child_axes] == ["tokens"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
  if count == 400:
    # The fall from chance level is cut off, the rest is not.
    assert 2.0 < axes.get_ylim()[1] < 4 and axes.get_ylim()[0] < 2


def test_loss_curve_of_training_or_validation_alone(tmp_path, drawn):
  log(tmp_path / "metrics.jsonl", [1, 2], **{"train/bits_per_byte": lambda step: None})
  with pytest.raises(UserError, match=r"has no train/bits_per_byte or validation/bits_per_byte"):
    plots.loss_curve(tmp_path, tmp_path / "loss.png")
  for key in ("train/bits_per_byte", "validation/bits_per_byte"):
    log(tmp_path / "metrics.jsonl", [1, 2, 3], **{key: float})
    plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    check_image(tmp_path / "loss.png")
  assert [len(axes.lines) for axes in drawn] == [2, 1]
  assert not drawn[0].child_axes


def test_smoothing_is_a_mean_that_keeps_lines_straight():
  line = np.arange(1000.0)
  np.testing.assert_allclose(plots._smooth(line)[:990], line[:990])
  noise = np.random.default_rng(0).normal(size=1000)
  assert plots._smooth(noise)[50:].std() < 0.3
  values = np.random.default_rng(1).normal(size=300)
  assert plots._smooth(values)[100] == pytest.approx(values[97:104].mean())
  assert plots._smooth(values)[1] == pytest.approx(values[:3].mean())
  assert plots._smooth(values)[299] == pytest.approx(values[296:].mean())


def test_bits_per_byte_by_position(tmp_path, drawn):
  rows = [
    {"split": split, "first": 2**i - 1, "last": 2 ** (i + 1) - 2, "bits_per_byte": 4 - i / 4}
    for i in reversed(range(12))
    for split in ("validation", "test")
  ]
  plots.bits_per_byte_by_position(rows, tmp_path / "position.png")
  check_image(tmp_path / "position.png")
  axes = drawn[0]
  assert axes.get_xscale() == "log" and len(axes.lines) == 2
  for line, split in zip(axes.lines, ("validation", "test")):
    assert line.get_label() == split
    # From left to right, whatever the order of the rows; the first token at 1.
    assert line.get_xdata()[0] == 1 and (np.diff(line.get_xdata()) > 0).all()
    np.testing.assert_array_equal(line.get_ydata(), 4 - np.arange(12) / 4)
  with pytest.raises(ValueError, match="rows is empty"):
    plots.bits_per_byte_by_position([], tmp_path / "none.png")
  assert not (tmp_path / "none.png").exists()


def test_counts_are_short():
  counts = {0: "0", 500: "500", 1000: "1k", 2_500_000: "2.5M", 1e9: "1G"}
  assert {number: plots._count(number) for number in counts} == counts


def _row(**fields):
  row = {"op": "gla", "implementation": "chunked", "pass": "forward", "dtype": "bfloat16"}
  row |= {"B": 2, "T": 16, "ms": 1.0, "flop_per_byte": 50.0, "tflop_per_s": 5.0}
  return row | {"copy_gb_per_s": 3000.0, "device": "NVIDIA H200"} | fields


def test_roofline_marks_every_row_under_its_roofs(tmp_path, drawn):
  rows = [
    _row(),
    _row(**{"pass": "forward_backward", "flop_per_byte": 60.0, "T": 32}),
    _row(implementation="a peer", op="ssd", flop_per_byte=400.0, tflop_per_s=100.0),
    _row(ms=None, tflop_per_s=None, implementation="pallas"),
    {"op": "train_step", "ms": 3.0},
  ]
  plots.roofline(rows, tmp_path / "roofline.png")
  assert matplotlib.image.imread(tmp_path / "roofline.png").shape == (810, 1350, 4)
  (axes,) = drawn
  *marks, roof = axes.lines
  assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [
    (50.0, 5.0),
    (60.0, 5.0),
    (400.0, 100.0),
  ]
  filled, hollow, peer = marks
  assert hollow.get_markerfacecolor() == "white" != filled.get_markerfacecolor()
  assert filled.get_marker() != hollow.get_marker() and peer.get_color() != filled.get_color()
  x, y = roof.get_data()
  np.testing.assert_allclose(y, np.minimum(3.0 * x, 800.0))
  assert [text.get_text() for text in axes.texts] == ["gla", "gla + backward", "ssd"]
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend[:4] == ["chunked", "a peer", "forward", "forward + backward"]
  assert legend[4:6] == ["B2 T16", "B2 T32"] and legend[6].startswith("a large copy, 3000 GB/s")
  with pytest.raises(UserError, match="nothing was measured"):
    plots.roofline(rows[3:], tmp_path / "none.png")


def test_names_stand_apart_and_in_order():
  spread = plots._spread([0.1, 0.5, 0.5, 0.51, 0.9], 0.03)
  assert spread[0] == 0.1 and spread[4] == 0.9 and (np.diff(spread) >= 0.03 - 1e-9).all()
  assert sum(spread[1:4]) / 3 == pytest.approx((0.5 + 0.5 + 0.51) / 3)
