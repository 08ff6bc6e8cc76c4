"""The figure of `experiments.scaling`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.errors import UserError
from experiments.plots import INK, STYLE
from experiments.scaling_cases import UNSPLIT

COLORS = {
  "all_gather": "#cc6633",
  "all_scan": "#4477aa",
  "doubling": "#228855",
  "auto": "#333333",
  "ring": "#aa3377",
}
MARKS = {"all_gather": "o", "all_scan": "s", "doubling": "^", "auto": "x", "ring": "D"}


def draw(rows: Sequence[Mapping[str, Any]], png: str | os.PathLike) -> None:
  """A column for each op: efficiency of weak and of strong scaling, and what a device sends,
  against devices, a line for each method.

  Args:
    rows: from `scaling_measure.measure_op`.
    png: the file to write.

  Raises:
    UserError: nothing was measured with several devices.
  """
  rows = [row for row in rows if not row["failure"]]
  if not any(row["P"] > 1 for row in rows):
    raise UserError(f"nothing was measured that {png} could show")
  names = list(dict.fromkeys(row["op"] for row in rows))
  kinds = {"weak": "efficiency", "strong": "efficiency", "sent": "sent_bytes"}
  if all(row["efficiency"] is None for row in rows):
    kinds = {"sent": "sent_bytes"}
  with matplotlib.rc_context(STYLE):
    size = (1.6 + 2.3 * len(names), 0.9 + 2.1 * len(kinds))
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
      for axes, (kind, value) in zip(grid[:, column], kinds.items()):
        scaling = "strong" if kind == "sent" else kind
        own = [row for row in rows if row["op"] == name and row["scaling"] == scaling]
        _lines(axes, own, value)
      grid[0, column].set_title(name.replace("_", " "), fontsize=10)
      grid[-1, column].set_xlabel("devices")
    _label(grid, rows, kinds)
    handles = {
      line.get_label(): line
      for axes in grid.flat
      for line in axes.lines
      if line.get_label()[0] != "_"
    }
    figure.legend(handles.values(), handles, loc="outside right upper")
    scratch = f"{os.fspath(png)}.tmp"
    figure.savefig(scratch, format="png", facecolor="white")
    os.replace(scratch, png)


def _lines(axes, rows, value: str) -> None:
  """One for each method, from the point of one device."""
  one = [row for row in rows if row["method"] == UNSPLIT and value == "efficiency"]
  for method in dict.fromkeys(row["method"] for row in rows if row["method"] != UNSPLIT):
    own = sorted([*one, *(row for row in rows if row["method"] == method)], key=lambda r: r["P"])
    axes.plot(
      [row["P"] for row in own],
      [row[value] / (2**10 if value == "sent_bytes" else 1e-2) for row in own],
      color=COLORS[method],
      marker=MARKS[method],
      markersize=4,
      linewidth=1.6,
      # It is one of the others: both are to be seen.
      linestyle="" if method == "auto" else "-",
      zorder=3 if method == "auto" else 2,
      label=method,
    )


def _label(grid, rows, kinds) -> None:
  fake = rows[0]["fake_devices"]
  counts = sorted({row["P"] for row in rows})
  share = min(row["T"] for row in rows)
  total = max(row["T"] for row in rows)
  names = {
    "weak": f"weak: {share:,} tokens\na device, efficiency (%)",
    "strong": f"strong: {total:,} tokens\nin all, efficiency (%)",
    "sent": "sent by each\ndevice (KiB)",
  }
  for (kind, _), line in zip(kinds.items(), grid):
    line[0].set_ylabel(names[kind])
    for axes in line:
      axes.grid(axis="y")
      axes.set_axisbelow(True)
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:.0f}")
      axes.set_xticks(counts)
      axes.xaxis.set_minor_locator(NullLocator())
      if kind == "sent":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
      else:
        axes.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
  said = f"fake devices on {rows[0]['cores']} cores" if fake else rows[0]["device"]
  if "weak" in kinds:
    said += f"; 100% is {'all tokens on one device' if fake else 'P times the speed of one'}"
  grid[0, 0].figure.suptitle(said, x=0.01, ha="left", fontsize=9, color=INK)
