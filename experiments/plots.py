"""Figures of a run, as they stand in a run directory or a README page."""

import functools
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments import floors, metrics
from experiments.errors import UserError

# Told apart in print and by colour-blind readers alike.
COLORS = {"train": "#4477aa", "validation": "#cc6633", "test": "#228855"}
# Of implementations, then of whatever else there is.
MARK_COLORS = {
  "recurrent": "#999933",
  "parallel": "#cc6633",
  "chunked": "#4477aa",
  "pallas": "#aa3377",
}
MORE_COLORS = ("#228855", "#333333", "#ddaa33", "#66ccee", "#bb99cc")
MARKS = "osD^v<>pP*"
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


def accuracy_curve(metrics_path: str | os.PathLike, png: str | os.PathLike) -> None:
  """Draws the validation accuracy, or F1 where it was measured, at each length against steps.

  Args:
    metrics_path: A metrics.jsonl, or the run directory that holds one.
    png: The file to write.

  Raises:
    UserError: The log holds no validation.
  """
  rows = metrics.read(metrics_path)
  keys = dict.fromkeys(key for row in rows for key in row if key.startswith("validation/"))
  kind = "f1" if any(key.startswith("validation/f1/") for key in keys) else "accuracy"
  curves = {key.split("/")[2]: key for key in keys if key.startswith(f"validation/{kind}/")}
  if not curves:
    raise UserError(f"{metrics_path} has no validation/accuracy to draw")
  with matplotlib.rc_context(STYLE):
    figure, axes = _canvas()
    for (length, key), color, mark in zip(
      curves.items(), itertools.cycle([*MARK_COLORS.values(), *MORE_COLORS]), itertools.cycle(MARKS)
    ):
      steps, values = _series(rows, key)
      axes.plot(
        steps, values, color=color, marker=mark, markersize=4, linewidth=1.8, label=f"at {length}"
      )
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("F1" if kind == "f1" else "accuracy")
    axes.legend(loc="lower right")
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


def roofline(rows: Iterable[Mapping[str, Any]], png: str | os.PathLike) -> None:
  """Draws what the rows of a benchmark attain, under the roofs of the device.

  Horizontally the operations per byte that must move, vertically the operations per second. A row
  on the slanted roof moves its bytes as fast as a large copy does. Colours are implementations,
  hollow marks include the backward pass, shapes of marks are shapes of arrays.

  Args:
    rows: from `experiments.benchmark`; those that failed are left out.
    png: The file to write.

  Raises:
    UserError: There is nothing to draw.
  """
  rows = [row for row in rows if row.get("ms") and row.get("flop_per_byte")]
  if not rows:
    raise UserError(f"nothing was measured that {png} could show")
  others = {row["implementation"] for row in rows} - set(MARK_COLORS)
  colors = {**MARK_COLORS, **dict(zip(sorted(others), itertools.cycle(MORE_COLORS)))}
  colors = {name: color for name, color in colors.items() if _having(rows, implementation=name)}
  sizes = {_batch(row): None for row in rows}
  marks = dict(zip(sizes, itertools.cycle(MARKS)))
  with matplotlib.rc_context(STYLE):
    figure, axes = _canvas(9.0, 5.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in rows:
      color = colors[row["implementation"]]
      axes.plot(
        row["flop_per_byte"],
        row["tflop_per_s"],
        marks[_batch(row)],
        color=color,
        markerfacecolor="white" if row["pass"] == "forward_backward" else color,
        markersize=5.5,
        markeredgewidth=1.2,
      )
    _roofs(axes, rows)
    _name_columns(axes, rows)
    _legend(axes, rows, colors, marks)
    _few_ticks(axes)
    axes.set_xlabel("operations per byte that must move (FLOP/byte)")
    _write(figure, png)


def _few_ticks(axes) -> None:
  """Ticks at 1, 2 and 5, or at 1 alone on a long axis; operations in the unit that keeps them
  short."""
  unit, scale = ("T", 1.0) if axes.get_ylim()[1] > 3 else ("G", 1e3)
  axes.set_ylabel(f"attained ({unit}FLOP/s)")
  axes.xaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_major_formatter(lambda y, _: f"{y * scale:g}")
  for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
    axis.set_major_locator(LogLocator(subs=(1,) if high > 1e4 * low else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())


def _having(rows, **wanted):
  return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _batch(row) -> str:
  return f"B{row['B']} T{row['T']}"


def _roofs(axes, rows) -> None:
  """The bandwidth of a copy, and the rate of products where that is known."""
  bandwidth = max(row["copy_gb_per_s"] for row in rows) / 1e3
  intensities = [row["flop_per_byte"] for row in rows]
  attained = [row["tflop_per_s"] for row in rows]
  low, high = min(intensities) / 2, max(intensities) * 2
  rates = floors.RATES.get(rows[0]["device"])
  limit = np.inf
  if rates is not None and _having(rows, dtype="bfloat16"):
    limit = rates.bfloat16_flops / 1e12
  x = np.geomspace(low, high, 200)
  label = f"a large copy, {bandwidth * 1e3:.4g} GB/s"
  if limit < bandwidth * high:
    label += f";\nproducts, {limit:.4g} TFLOP/s"
  axes.plot(x, np.minimum(bandwidth * x, limit), color=INK, linewidth=1.2, label=label)
  axes.set_xlim(low, high)
  axes.set_ylim(min(attained) / 2, 1.6 * max(*attained, min(bandwidth * high, limit)))


def _name_columns(axes, rows) -> None:
  """The name of the op above each column of marks, with lines down to it."""
  columns: dict[tuple[str, str, float], float] = {}
  for row in rows:
    key = row["op"], row["pass"], round(row["flop_per_byte"], 2)
    columns[key] = max(row["tflop_per_s"], columns.get(key, 0))
  low, high = np.log(axes.get_xlim())
  ordered = sorted(columns, key=lambda key: key[2])
  wanted = [(np.log(x) - low) / (high - low) for *_, x in ordered]
  for (op, pass_, x), at in zip(ordered, _spread(wanted, 0.03)):
    axes.annotate(
      op.replace("_", " ") + (" + backward" if pass_ == "forward_backward" else ""),
      (x, columns[op, pass_, x]),
      xytext=(at, 1.02),
      textcoords="axes fraction",
      rotation=60,
      rotation_mode="anchor",
      fontsize=8,
      color=INK,
      arrowprops={
        "arrowstyle": "-",
        "color": "#cccccc",
        "linewidth": 0.7,
        "shrinkB": 4,
        "relpos": (0, 0),
      },
    )


def _spread(wanted: Sequence[float], apart: float) -> list[float]:
  """Ascending positions near those wanted and at least `apart`, their mean kept group by group."""
  groups: list[list[float]] = []
  for position in wanted:
    groups.append([position])
    while len(groups) > 1 and _right(groups[-2], apart) + apart > _left(groups[-1], apart):
      groups[-2:] = [groups[-2] + groups[-1]]
  return [_left(g, apart) + apart * i for g in groups for i in range(len(g))]


def _left(group, apart) -> float:
  return sum(group) / len(group) - apart * (len(group) - 1) / 2


def _right(group, apart) -> float:
  return _left(group, apart) + apart * (len(group) - 1)


def _legend(axes, rows, colors, marks) -> None:
  line = functools.partial(Line2D, [], [], linestyle="")
  handles = [line(marker="o", color=color, label=name) for name, color in colors.items()]
  passes = {"forward": INK, "forward_backward": "white"}
  handles += [
    line(marker="o", color=INK, markerfacecolor=face, label=name.replace("_", " + "))
    for name, face in passes.items()
    if _having(rows, **{"pass": name})
  ]
  if len(marks) > 1:
    handles += [line(marker=mark, color="#999999", label=name) for name, mark in marks.items()]
  handles += axes.get_legend_handles_labels()[0]
  device = rows[0]["device"]
  title = device if len(device) > 3 else device.upper()
  axes.legend(
    handles=handles,
    title=title,
    alignment="left",
    loc="center left",
    bbox_to_anchor=(1.0, 0.5),
    fontsize=8.5,
  )


def _canvas(width: float = 7.2, height: float = 4.2):
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
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
