"""Rows of measurements, and the table of them that a person reads."""

import datetime
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments import floors, workspace
from experiments.benchmark_cases import Workload
from experiments.errors import UserError

LETTERS = "BTHGKVDNW"
HEAD = (
  f"  {'implementation':<24}{'ms':>10}{'of floor':>10}{'GB/s':>8}{'TFLOP/s':>9}{'peak MB':>10}"
  f"{'compile s':>11}{'error':>9}"
)


def make_row(
  workload: Workload,
  implementation: str,
  pass_: str,
  work: floors.Work,
  bandwidth: float,
  *,
  ms: float | None = None,
  peak_bytes: int | None = None,
  compile_s: float | None = None,
  error: float | None = None,
  error_shape: str | None = None,
  failure: str | None = None,
  device: str | None = None,
  versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """One measurement, as the JSON files hold it.

  Args:
    workload: what was measured.
    implementation: the name of one of ours, or of a peer.
    pass_: forward or forward_backward.
    work: the least that the workload must do.
    bandwidth: bytes per second of a large copy on the device.
    ms: median milliseconds of a call; None if it failed.
    peak_bytes: beside the inputs.
    compile_s: seconds to trace and compile, or of the first call of a peer.
    error: largest deviation from the float64 oracle, in root mean squares of what it deviates from.
    error_shape: at which the error was measured.
    failure: why there is no measurement.
    device: its name; None is the first of jax.
    versions: beside those of a run.
  """
  sizes, kind = workload.sizes, jax.devices()[0].device_kind
  floor = floors.floor_seconds(work, bandwidth, floors.RATES.get(device or kind), workload.dtype)
  return {
    "op": workload.op,
    "implementation": implementation,
    **{letter: sizes.get(letter) for letter in LETTERS},
    "dtype": workload.dtype,
    "gate_dtype": workload.gate_dtype,
    "pass": pass_,
    "ms": ms,
    "floor_ms": 1e3 * floor,
    "gb_per_s": None if ms is None else work.bytes / ms / 1e6,
    "tflop_per_s": None if ms is None else work.flops / ms / 1e9,
    "flop_per_byte": work.flops / work.bytes,
    "copy_gb_per_s": bandwidth / 1e9,
    "peak_bytes": peak_bytes,
    "compile_s": compile_s,
    "error": error,
    "error_shape": error_shape,
    "failure": failure,
    **environment(),
    **({} if device is None else {"device": device}),
    **({} if versions is None else {"versions": {**workspace.versions(), **versions}}),
  }


def environment() -> dict[str, Any]:
  """Where and when a row was measured."""
  return {
    "device": jax.devices()[0].device_kind,
    "versions": workspace.versions(),
    "date": datetime.date.today().isoformat(),
  }


def shape_text(sizes: Mapping[str, int | None]) -> str:
  """B2 T4096 ..., without what the op does not have; G only where it is not H."""
  letters = [letter for letter in LETTERS if sizes.get(letter)]
  if sizes.get("G") == sizes.get("H") and "G" in letters:
    letters.remove("G")
  return " ".join(f"{letter}{sizes[letter]}" for letter in letters)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows as a person reads them."""
  return "\n".join([HEAD, *lines(rows)])


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The table below its head: rows under a line for each op, shape and pass."""
  found = []
  for title, group in itertools.groupby(rows, _title):
    found += [title, *map(_line, group)]
  return found


def _title(row) -> str:
  dtype = row["dtype"]
  if row["gate_dtype"] != dtype:
    dtype += f", gates {row['gate_dtype']}"
  return (
    f"{row['op']} {shape_text(row)} {dtype}, {row['pass'].replace('_', ' + ')}: "
    f"floor {row['floor_ms']:.3f} ms"
  )


def _line(row) -> str:
  name = f"  {row['implementation']:<24}"
  if row["failure"]:
    return f"{name}failed: {row['failure']}"
  share = row["floor_ms"] / row["ms"]
  peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
  error = "" if row["error"] is None else f"{row['error']:.1e}"
  compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.2f}"
  return (
    f"{name}{row['ms']:>10.3f}{share:>10.1%}{_short(row['gb_per_s']):>8}{row['tflop_per_s']:>9.3g}"
    f"{peak:>10}{compile_s:>11}{error:>9}"
  )


def write_rows(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """One JSON list of the rows, one in a line."""
  path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _short(number: float) -> str:
  return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """What `write_rows` wrote; nothing where there is no file.

  Raises:
    UserError: something else wrote it.
  """
  text = path.read_text() if path.exists() else ""
  try:
    rows = json.loads(text or "[]")
  except ValueError:
    rows = None
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise UserError(f"{path} holds no rows of a benchmark: name another file")
  return rows


def merged(
  earlier: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
  """`rows` in the places of those of `earlier` that measured the same; the others at the end."""
  found = {_key(row): row for row in earlier}
  return list((found | {_key(row): row for row in rows}).values())


def _key(row) -> tuple:
  names = ("op", "implementation", *LETTERS, "dtype", "gate_dtype", "pass", "device")
  return tuple(row.get(name) for name in names)
