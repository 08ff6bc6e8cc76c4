"""The tables of `experiments.scaling` that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmark_report import shape_text

HEAD = (
  f"  {'scaling':<9}{'method':<12}{'P':>3}{'T':>9}{'ms':>10}{'efficiency':>12}{'sent KiB':>11}"
  f"{'in calls':>10}{'memory MiB':>12}{'compile s':>11}"
)
FAKE = """\
These devices are fake: {P} share the {cores} cores of one machine. Times show what splitting
costs, not what it gains: efficiency is the time of the same tokens on one of them, which may use
all cores, over that of the split work; it can exceed 100%, where one leaves cores idle."""
REAL = """\
efficiency: of strong scaling, the time on one device / P / the time on P; of weak scaling, the time
of one device's share on it alone / the time on P."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows of one op."""
  title = f"{_workload(rows[0])} {rows[0]['dtype']}, forward + backward"
  return "\n".join([title, *map(_line, rows)])


def _workload(row) -> str:
  return f"{row['op']} {shape_text({**row, 'T': None})}"


def _line(row) -> str:
  name = f"  {row['scaling']:<9}{row['method']:<12}{row['P']:>3}{row['T']:>9}"
  if row["failure"]:
    return f"{name}  failed: {row['failure']}"
  ms = "" if row["ms"] is None else f"{row['ms']:.2f}"
  efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
  compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.1f}"
  memory = sum(row[part] for part in ("argument_bytes", "output_bytes", "temporary_bytes"))
  return (
    f"{name}{ms:>10}{efficiency:>12}{_kib(row['sent_bytes']):>11}{row['collectives']:>10}"
    f"{memory / 2**20:>12,.1f}{compile_s:>11}"
  )


def note(row: Mapping[str, Any], P: int) -> str:
  """What times mean."""
  return FAKE.format(P=P, cores=row["cores"]) if row["fake_devices"] else REAL


def sent_table(rows: Sequence[Mapping[str, Any]], P: int) -> str:
  """What each device sends among P of them, in Markdown: a line for each op, a column for each
  method.

  Args:
    rows: of all ops.
    P: devices.
  """
  rows = [row for row in rows if row["P"] == P and row["scaling"] == "strong" and P > 1]
  rows = [row for row in rows if not row["failure"]]
  methods = list(dict.fromkeys(row["method"] for row in rows))
  lines = [f"| op | state | {' | '.join(methods)} |", "| --- " * (2 + len(methods)) + "|"]
  for op in dict.fromkeys(row["op"] for row in rows):
    own = {row["method"]: row for row in rows if row["op"] == op}
    first = next(iter(own.values()))
    state = f"{_kib(first['state_bytes'])} KiB" if first["state_bytes"] else "none"
    cells = [_cell(own[method]) if method in own else "" for method in methods]
    lines.append(f"| {_workload(first)} | {state} | {' | '.join(cells)} |")
  title = f"sent by each device in a forward and a backward pass, P = {P}"
  return "\n".join([title, *lines])


def _cell(row) -> str:
  return f"{_kib(row['sent_bytes'])} KiB in {row['collectives']}"


def _kib(count: float) -> str:
  return f"{count / 1024:,.1f}" if count < 2**20 else f"{count / 1024:,.0f}"
