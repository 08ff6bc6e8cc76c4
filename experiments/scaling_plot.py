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
  """A column for each op: efficiency of weak and of strong scaling, or memory where nothing was
  timed, and what a device sends, against devices, a line for each method.

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
  timed = any(row["efficiency"] is not None for row in rows)
  kinds = [*(("weak", "strong") if timed else ("memory",)), "sent"]
  with matplotlib.rc_context(STYLE):
    size = (1.6 + 2.3 * len(names), 0.9 + 2.1 * len(kinds))
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
      for axes, kind in zip(grid[:, column], kinds):
        own = [row for row in rows if row["op"] == name]
        scaling = kind if timed and kind != "sent" else own[-1]["scaling"]
        _lines(axes, [row for row in own if row["scaling"] == scaling], kind)
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


def _value(row, kind: str) -> float | None:
  """In the unit of the axis; None where there is no point."""
  if kind == "memory":
    return sum(row[f"{part}_bytes"] for part in ("argument", "output", "temporary")) / 2**20
  if kind == "sent":
    return row["sent_bytes"] / 2**10 or None  # none on a logarithmic axis
  return None if row["efficiency"] is None else 100 * row["efficiency"]


def _lines(axes, rows, kind: str) -> None:
  """One for each method, from the point of one device."""
  for method in dict.fromkeys(row["method"] for row in rows if row["method"] != UNSPLIT):
    own = sorted((row for row in rows if row["method"] in (method, UNSPLIT)), key=lambda r: r["P"])
    points = [(row["P"], _value(row, kind)) for row in own if _value(row, kind) is not None]
    axes.plot(
      *zip(*points),
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
    "memory": "memory of each\ndevice (MiB)",
    "sent": "sent by each\ndevice (KiB)",
  }
  for kind, line in zip(kinds, grid):
    line[0].set_ylabel(names[kind])
    for axes in line:
      axes.grid(axis="y")
      axes.set_axisbelow(True)
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:.0f}")
      axes.set_xticks(counts)
      axes.xaxis.set_minor_locator(NullLocator())
      if kind in ("sent", "memory"):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
      else:
        axes.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
  said = f"fake devices on {rows[0]['cores']} cores" if fake else rows[0]["device"]
  if "memory" in kinds:
    said += f"; memory with {total:,} tokens in all"
  else:
    said += f"; 100% is {'all tokens on one device' if fake else 'P times the speed of one'}"
  grid[0, 0].figure.suptitle(said, x=0.01, ha="left", fontsize=9, color=INK)
