"""Scaling over fake devices: what is measured and printed, and the memory of a split step."""

import json

import matplotlib.image
import pytest

from experiments import benchmark_timing as timing
from experiments import scaling, scaling_measure, scaling_memory, scaling_report
from experiments.scaling_cases import ATTENTION, OPS, SMALL, Problem
from tests.quick_compilation import quick_compilation as quick_compilation

ROW = {
  "op": "ssd",
  "scaling": "strong",
  "method": "all_scan",
  "P": 8,
  "T": 64,
  "B": 1,
  "H": 2,
  "K": 4,
  "V": 4,
  "dtype": "float32",
  "ms": 2.5,
  "efficiency": 0.8,
  "sent_bytes": 3 * 2**10,
  "collectives": 20,
  "argument_bytes": 2**20,
  "output_bytes": 2**20,
  "temporary_bytes": 2**19,
  "compile_s": 1.25,
  "state_bytes": 512,
  "failure": None,
  "fake_devices": True,
  "cores": 2,
}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
  """The fewest rounds."""
  time_calls = timing.time_calls
  quick = lambda calls, **options: time_calls(calls, **options | {"seconds": 0})
  monkeypatch.setattr(timing, "time_calls", quick)


SMALLEST = ["--op=linear_scan", "--shape=D4", "--tokens=32", "--devices=2,4"]


def test_a_command_from_end_to_end(tmp_path, capsys):
  files = [f"--json={tmp_path / 'rows.json'}", f"--plot={tmp_path / 'scaling.png'}"]
  chosen = ["--method=all_gather", "--method=auto"]
  assert scaling.main([*SMALLEST, *chosen, *files]) == 0
  rows = json.loads((tmp_path / "rows.json").read_text())
  found = {(row["scaling"], row["method"], row["P"]): row for row in rows}
  lengths = {key: row["T"] for key, row in found.items()}
  assert len(rows) == len(found) == 10 and lengths == {
    ("weak", "unsplit", 1): 8,
    ("strong", "unsplit", 1): 32,
    **{("weak", method, P): 8 * P for method in ("all_gather", "auto") for P in (2, 4)},
    **{("strong", method, P): 32 for method in ("all_gather", "auto") for P in (2, 4)},
  }
  for row in rows:
    assert row["ms"] > 0 and row["failure"] is None and row["fake_devices"]
    # States both ways and transitions once, each of B1 D4 in float32; between two devices no
    # transition is of use.
    count = {1: 0, 2: 2, 4: 3}[row["P"]]
    assert row["collectives"] == count and row["sent_bytes"] == count * (row["P"] - 1) * 16
    # Of a, b and what the backward pass starts from; of the output and two gradients.
    size = 3 * 16 * row["T"] / row["P"]
    assert row["argument_bytes"] == size
    assert row["output_bytes"] == pytest.approx(size, abs=64)  # with pointers to them
  # One program, two names.
  assert found["weak", "auto", 4]["ms"] == found["strong", "all_gather", 4]["ms"]
  one = {T: next(r["ms"] for r in rows if (r["P"], r["T"]) == (1, T)) for T in (8, 32)}
  split = found["strong", "auto", 2]
  assert split["efficiency"] == pytest.approx(one[32] / split["ms"])
  printed = capsys.readouterr().out
  assert "linear_scan B1 D4 float32, forward + backward\n" in printed
  assert "These devices are fake: 4 share the" in printed
  assert "| linear_scan B1 D4 | 0.0 KiB | 0.1 KiB in 3 | 0.1 KiB in 3 |" in printed
  assert matplotlib.image.imread(tmp_path / "scaling.png").shape[2] == 4


def test_without_time_each_split_is_only_compiled(tmp_path, capsys):
  path = tmp_path / "rows.json"
  command = [*SMALLEST, "--no-time", "--scaling=weak", "--method=doubling", f"--json={path}"]
  assert scaling.main(command) == 0
  rows = json.loads(path.read_text())
  assert [(row["scaling"], row["P"], row["T"], row["ms"]) for row in rows] == [
    ("weak", 1, 8, None), ("weak", 2, 16, None), ("weak", 4, 32, None),
  ]  # fmt: skip
  # 2 (1 + log2 P) states and 2 log2 P transitions, but what is not needed is not sent.
  assert [row["collectives"] for row in rows][2] > rows[1]["collectives"] > 0


def test_a_failure_is_reported_and_the_others_go_on(monkeypatch, capsys):
  place = scaling_measure.Programs._place

  def short_of_memory(self, P, *others):
    if P == 2:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
    return place(self, P, *others)

  monkeypatch.setattr(scaling_measure.Programs, "_place", short_of_memory)
  assert scaling.main([*SMALLEST, "--method=all_scan", "--scaling=strong"]) == 1
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["strong", "all_scan", "2", "32", "failed:", "RuntimeError:"] in [x[:6] for x in lines]
  assert ["strong", "all_scan", "4", "32"] in [x[:4] for x in lines if len(x) == 10]


def test_efficiency_says_what_devices_are():
  facts = lambda ms: {"ms": ms}
  efficiency = lambda scaling, fake: scaling_measure._efficiency(
    facts(8.0), facts(4.0), (scaling, "auto", 4), fake
  )
  assert efficiency("strong", True) == efficiency("weak", True) == 2
  assert efficiency("strong", False) == 0.5 and efficiency("weak", False) == 2
  assert scaling_measure._efficiency(None, facts(4.0), ("weak", "auto", 4), False) is None


def test_the_tables():
  line = scaling_report.table([ROW]).splitlines()
  assert line[0] == "ssd B1 H2 K4 V4 float32, forward + backward"
  assert line[1].split() == [
    *("strong", "all_scan", "8", "64", "2.50", "80%", "3.0", "20", "2.5", "1.2")
  ]
  assert len(line[1]) == len(scaling_report.HEAD)
  untimed = scaling_report.table([{**ROW, "ms": None, "efficiency": None, "compile_s": None}])
  assert untimed.split()[-5:] == ["8", "64", "3.0", "20", "2.5"]
  other = {**ROW, "op": ATTENTION, "method": "ring", "state_bytes": 0, "sent_bytes": 2**21}
  fewer = {**ROW, "P": 2, "method": "doubling"}
  assert scaling_report.sent_table([ROW, other, fewer], 8).splitlines()[1:] == [
    "| op | state | all_scan | ring |",
    "| --- | --- | --- | --- |",
    "| ssd B1 H2 K4 V4 | 0.5 KiB | 3.0 KiB in 20 |  |",
    "| softmax_attention B1 H2 K4 V4 | none |  | 2,048 KiB in 20 |",
  ]
  assert "on it alone" not in scaling_report.note(ROW, 8)
  assert "one device / P" in scaling_report.note({**ROW, "fake_devices": False}, 8)


@pytest.mark.parametrize(
  ("command", "said"),
  [
    (["--devices=1,x"], "--devices is '1,x', must be numbers such as 1,2,4,8"),
    (["--devices=0,2"], "--devices is '0,2', must be"),
    (["--devices=16", "--tokens=16"], "--devices has 16, but there are 8 devices"),
    (["--tokens=12"], "--tokens is 12, must be a multiple of each of --devices, [1, 2, 4, 8]"),
    (["--tokens=12", "--memory"], "--tokens is 12, must be a multiple of each of --devices, [8]"),
    (["--tokens=-8"], "--tokens is -8, must be a multiple"),
    (["--shape=T8"], "--shape has 'T8', must be letters with sizes such as B1,H4,K64,V64"),
    (["--op=ssd", "--method=ring"], "--method is ring, must be one of all_gather, all_scan"),
    (["--json=/nowhere/x.json"], "--json is '/nowhere/x.json', must be a file in a directory"),
  ],
)
def test_what_cannot_be_measured_is_told_in_a_line(command, said, capsys):
  with pytest.raises(SystemExit, match="2"):
    scaling.main(command)
  error = capsys.readouterr().err
  assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("op", OPS)
def test_inputs_have_the_shapes_that_are_compiled_for(op):
  sizes = {**SMALL, "H": 2, "K": 4, "V": 6, "D": 8}
  problem = Problem(op, sizes, "bfloat16")
  arrays, parameters = problem.inputs(3)
  assert all(x.shape[:2] == (1, 3) for x in arrays.values())
  shapes = {name: (x.shape, x.dtype) for name, x in (arrays | parameters).items()}
  expected = {name: (x.shape, x.dtype) for part in problem.shapes(3) for name, x in part.items()}
  assert shapes == expected
  assert "bfloat16" in {x.dtype.name for x in arrays.values()}
  state = {"ssd": 2 * 4 * 6, "selective_scan": 8 * 16, "newton_scan": 8, ATTENTION: 0}
  assert problem.state_bytes() == 4 * state.get(op, problem.state_bytes() / 4)


def test_a_split_step_takes_a_sixth_of_the_memory():
  T = 4096
  row = scaling_memory.measure("paragru", T, 8)
  assert row["ratio"] <= 1 / 6
  split, unsplit = row["split_parts_bytes"], row["unsplit_parts_bytes"]
  assert split["parameters"] == unsplit["parameters"]
  assert split["batch"] * 8 == pytest.approx(unsplit["batch"], abs=8)
  # On no device does an array span all of time.
  arrays = [array["array"] for array in row["largest_split_arrays"]]
  sizes = [array.partition("[")[2].partition("]")[0].split(",") for array in arrays]
  assert sizes and not any(str(T) in size for size in sizes)
  line = scaling_memory.line(row)
  assert line.split()[:3] == ["paragru", "4096", "8"] and len(line) == len(scaling_memory.HEAD)
