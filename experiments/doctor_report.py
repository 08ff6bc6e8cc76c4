"""What the doctor found, for the terminal and for files."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Sequence

import numpy as np

import ops
from experiments import workspace
from experiments.doctor_limits import Verdict


@dataclasses.dataclass(frozen=True)
class Cell:
  """One tensor of one family: what failed or passed."""

  op: str
  implementation: str
  dtype: str
  shape: str
  family: str
  tensor: str
  verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Examination:
  """All cells of one op, implementation and dtype."""

  op: str
  implementation: str
  dtype: str
  cells: list[Cell]
  seconds: float

  @property
  def failures(self) -> list[Cell]:
    return [cell for cell in self.cells if not cell.verdict.passed]

  def worst(self, kind: str) -> Cell:
    """The cell nearest to its limit, or furthest beyond, of "output", "state" or "gradient"."""
    names = {"output": "o", "state": "state"}
    if kind in names:
      chosen = [cell for cell in self.cells if cell.tensor == names[kind]]
    else:
      chosen = [cell for cell in self.cells if cell.tensor not in names.values()]
    return max(chosen, key=lambda cell: cell.verdict.share)


HEAD = (
  f"{'op':<20}{'implementation':<16}{'dtype':<10}{'output':>9}  {'(worst in)':<28}{'state':>9}  "
  f"{'(worst in)':<28}{'gradient':>9}  {'(worst in)':<36}{'verdict':<9}{'s':>6}"
)


def line(examination: Examination) -> str:
  """A row of the table in the terminal."""
  text = f"{examination.op:<20}{examination.implementation:<16}{examination.dtype:<10}"
  for kind, width in (("output", 28), ("state", 28), ("gradient", 36)):
    worst = examination.worst(kind)
    text += f"{worst.verdict.error:>9.1e}  {_where(worst):<{width}}"
  return text + f"{_verdict(examination):<9}{examination.seconds:>6.1f}"


def _where(cell: Cell) -> str:
  return (f"{cell.tensor}: " if cell.tensor not in ("o", "state") else "") + cell.family


def _verdict(examination: Examination) -> str:
  return f"{len(examination.failures)} FAIL" if examination.failures else "pass"


def describe(cell: Cell) -> str:
  """One failure in one line."""
  place = f"{cell.op} {cell.implementation} {cell.dtype} {cell.shape}, {cell.family}"
  error, limit = cell.verdict
  said = f"{error:.2e}, limit {limit:.0e}" if np.isfinite(error) else "not finite"
  return f"FAIL {place}: {cell.tensor} {said}"


def environment() -> str:
  """What the figures were measured with."""
  found = workspace.versions()
  return (
    f"{found['device']} ({ops.dispatch.platform()}), Python {found['python']}, jax {found['jax']}, "
    f"jaxlib {found['jaxlib']}, {datetime.date.today().isoformat()}"
  )


def markdown(examinations: Sequence[Examination], verdict: str) -> str:
  """The table as a page."""
  rows = [
    "| op | implementation | dtype | output | state | gradient | verdict |",
    "|---|---|---|---|---|---|---|",
  ]
  for examination in examinations:
    worst = [examination.worst(kind) for kind in ("output", "state", "gradient")]
    errors = " | ".join(f"{cell.verdict.error:.1e} ({_where(cell)})" for cell in worst)
    place = f"{examination.op} | {examination.implementation} | {examination.dtype}"
    rows.append(f"| {place} | {errors} | {_verdict(examination)} |")
  about = (
    "Written by `python -m experiments.doctor --markdown=FILE`. Errors against float64, of the\n"
    "worst family of inputs (in brackets): in float32 and float64 the largest in units of the\n"
    "largest entry, in bfloat16 in units of the root mean square. Limits:\n"
    "`experiments/doctor_limits.py`."
  )
  failures = [cell for examination in examinations for cell in examination.failures]
  details = "\n".join(f"    {describe(cell)}" for cell in failures)
  parts = ["# Doctor", environment(), about, "\n".join(rows), verdict, details]
  return "\n\n".join(part for part in parts if part) + "\n"


def write_json(cells: Sequence[Cell], path: pathlib.Path) -> None:
  """One object: the device, the versions, the date, and a list of all comparisons."""
  here = {"device": ops.dispatch.platform(), "versions": workspace.versions()}
  here["date"] = datetime.date.today().isoformat()
  rows = []
  for cell in cells:
    row = {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)[:-1]}
    error, limit = cell.verdict
    # JSON has no infinity.
    row |= {"error": error if np.isfinite(error) else None, "limit": limit}
    rows.append({**row, "pass": cell.verdict.passed})
  path.write_text(json.dumps({**here, "cells": rows}, indent=1) + "\n")
