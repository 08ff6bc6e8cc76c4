"""Figures of a run, as they stand in a run directory or a README page."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import metrics
from experiments.errors import UserError

# Told apart in print and by colour-blind readers alike.
COLORS = {"train": "#4477aa", "validation": "#cc6633", "test": "#228855"}
INK = "#333333"
STYLE = {
  "axes.edgecolor": "#999999",
  "axes.labelcolor": INK,
  "axes.linewidth": 0.8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": INK,
  "font.family": "DejaVu Sans",
  "font.size": 10,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "xtick.color": "#777777",
  "xtick.labelcolor": INK,
  "ytick.color": "#777777",
  "ytick.labelcolor": INK,
}


def loss_curve(metrics_path: str | os.PathLike, png: str | os.PathLike) -> None:
  """Draws bits per byte against steps, of training (raw, and smoothed) and validation.

  A second axis on top counts tokens, where the log has `train/tokens`. The vertical axis leaves out
  the first steps' fall from chance level, which would flatten everything else.

  Args:
    metrics_path: A metrics.jsonl, or the run directory that holds one.
    png: The file to write.

  Raises:
    UserError: The log is missing, or holds no bits per byte.
  """
  rows = metrics.read(metrics_path)
  train = _series(rows, "train/bits_per_byte")
  validation = _series(rows, "validation/bits_per_byte")
  if not len(train[0]) and not len(validation[0]):
    raise UserError(
      f"{metrics_path} has no train/bits_per_byte or validation/bits_per_byte to draw"
    )
  with matplotlib.rc_context(STYLE):
    figure, axes = _canvas()
    if len(train[0]):
      smooth = _smooth(train[1])
      axes.plot(*train, color=COLORS["train"], alpha=0.25, linewidth=0.8)
      axes.plot(train[0], smooth, color=COLORS["train"], linewidth=1.8, label="train")
    if len(validation[0]):
      axes.plot(
        *validation,
        color=COLORS["validation"],
        linewidth=1.8,
        marker="o",
        markersize=4,
        label="validation",
      )
      best = int(np.argmin(validation[1]))
      axes.annotate(
        f"{validation[1][best]:.3f}",
        (validation[0][best], validation[1][best]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        color=COLORS["validation"],
      )
    _limit(axes, train[1], validation[1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.legend(loc="upper right")
    _token_axis(axes, rows)
    _write(figure, png)


def bits_per_byte_by_position(rows: Iterable[Mapping[str, Any]], png: str | os.PathLike) -> None:
  """Draws bits per byte against the position in the document: what the model makes of context.

  Args:
    rows: One per bucket of positions, with `split` ("validation", "test"), `first` and `last` (the
      positions it spans, tokens from the document's start, both included, from 0), and
      `bits_per_byte`.
    png: The file to write.

  Raises:
    ValueError: There are no rows.
  """
  splits: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    splits.setdefault(row["split"], []).append(row)
  if not splits:
    raise ValueError("rows is empty; bits_per_byte_by_position needs at least one bucket")
  with matplotlib.rc_context(STYLE):
    figure, axes = _canvas()
    for split, buckets in splits.items():
      buckets = sorted(buckets, key=lambda row: row["first"])
      # Positions count from 1 here, so that the first has a place on the logarithmic axis.
      middle = [np.sqrt((row["first"] + 1) * (row["last"] + 1)) for row in buckets]
      values = [row["bits_per_byte"] for row in buckets]
      axes.plot(
        middle,
        values,
        color=COLORS.get(split),
        linewidth=1.8,
        marker="o",
        markersize=4,
        label=split,
      )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("bits per byte")
    axes.legend(loc="upper right")
    _write(figure, png)


def _canvas():
  figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.grid(axis="y")
  axes.set_axisbelow(True)
  return figure, axes


def _write(figure: Figure, png: str | os.PathLike) -> None:
  """Writes the figure in one step: whoever looks sees the old one or the new one."""
  scratch = f"{os.fspath(png)}.tmp"
  figure.savefig(scratch, format="png", facecolor="white")
  os.replace(scratch, png)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps at which a key was logged with a finite value, and the values."""
  points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
  return np.array([step for step, _ in points]), np.array([value for _, value in points])


def _smooth(values: np.ndarray) -> np.ndarray:
  """A running mean over a fiftieth of the curve, centred, over fewer values at the ends."""
  reach = len(values) // 100
  sums = np.concatenate([[0.0], np.cumsum(values)])
  place = np.arange(len(values))
  # At the steep start the window shrinks on both sides, or the mean would lie above the curve.
  left = np.minimum(reach, place)
  right = np.minimum(left, len(values) - 1 - place)
  return (sums[place + right + 1] - sums[place - left]) / (left + right + 1)


def _limit(axes, *curves: np.ndarray) -> None:
  values = np.concatenate(curves)
  low, high = values.min(), values.max()
  # The level that all but the first twentieth of training stays below.
  usual = max(curve[len(curve) // 20 :].max() for curve in curves if len(curve))
  margin = 0.06 * (usual - low) or 0.1
  axes.set_ylim(low - margin, min(high, usual) + margin)


def _token_axis(axes, rows: Sequence[Mapping[str, Any]]) -> None:
  steps, tokens = _series(rows, "train/tokens")
  if not len(steps) or not steps[-1]:
    return
  per_step = tokens[-1] / steps[-1]
  top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
  top.xaxis.set_major_formatter(lambda x, _: _count(x))
  top.set_xlabel("tokens")
  top.spines["top"].set_visible(False)
  top.tick_params(length=0)


def _count(number: float) -> str:
  """2500000 as 2.5M, 500 as 500."""
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(number) >= size:
      return f"{number / size:g}{unit}"
  return f"{number:g}"
