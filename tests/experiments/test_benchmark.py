"""The benchmark: what it measures, that it reports honestly, and that it survives failures."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import (
  benchmark,
  benchmark_cases,
  benchmark_config,
  benchmark_measure,
)
from experiments import benchmark_error as oracle
from experiments import benchmark_report as report
from experiments import benchmark_timing as timing
from experiments.benchmark_cases import CASES, PRESETS, make_workload
from experiments.errors import UserError
from experiments.tasks import make_task
from ops import dispatch
from tests.experiments import small
from tests.quick_compilation import quick_compilation  # noqa: F401

TINY = "B1,T5,H2,K4,V4"
SIZES = {"B": 2, "T": 9, "H": 4, "G": 2, "K": 4, "V": 2, "D": 6, "N": 2, "W": 2}
KEYS = {
  *("op", "implementation", "B", "T", "H", "K", "V", "dtype", "pass", "ms", "floor_ms"),
  *("gb_per_s", "tflop_per_s", "peak_bytes", "compile_s", "error", "device", "versions", "date"),
}
MATRIX = ("linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda", "retention")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
  """Bandwidth from nowhere, and the fewest rounds."""
  monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e10)
  time_calls = timing.time_calls
  monkeypatch.setattr(
    timing, "time_calls", lambda calls, **kw: time_calls(calls, **{**kw, "seconds": 0})
  )


def test_shapes():
  workload = make_workload("gla", "B3,T7,H2,K5", "bfloat16")
  assert workload.sizes == {"B": 3, "T": 7, "H": 2, "G": 2, "K": 5, "V": 64}
  assert make_workload("ssd", "H8,G2", "float32").sizes["G"] == 2
  assert report.shape_text(workload.sizes) == "B3 T7 H2 K5 V64"
  for wrong, message in {
    "D5": r"--shape has 'D5', must be letters with sizes such as B2,T2048,H4,G4,K64,V64",
    "B0": r"--shape has 'B0'",
    "7": r"--shape has '7'",
    "H4,G3": r"--shape has H4, must be a multiple of G3",
  }.items():
    with pytest.raises(UserError, match=message):
      make_workload("gla", wrong, "float32")


def test_inputs_are_in_the_dtypes_asked_for():
  inputs = make_workload("kda", TINY, "bfloat16").inputs()
  assert {name: x.dtype.name for name, x in inputs.items()} == {
    **dict.fromkeys("qkv", "bfloat16"), **dict.fromkeys(("g", "beta"), "float32"),
  }  # fmt: skip
  assert inputs["q"].shape == (1, 5, 2, 4)
  np.testing.assert_allclose(jnp.linalg.norm(inputs["k"].astype("float32"), axis=-1), 1, atol=0.02)
  assert make_workload("gla", TINY, "bfloat16", "bfloat16").inputs()["g"].dtype == "bfloat16"


def test_presets_are_the_table_of_targets():
  hopper = {(w.op, report.shape_text(w.sizes), w.dtype) for w in PRESETS["hopper"]}
  for op in ("simple_gla", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"):
    assert (op, "B2 T16384 H16 K128 V128", "bfloat16") in hopper
    assert (op, "B4 T2048 H16 K128 V128", "bfloat16") in hopper
  assert ("linear_scan", "B4 T2048 D2048", "bfloat16") in hopper
  assert ("selective_scan", "B8 T2048 D2048 N16", "bfloat16") in hopper
  assert len(hopper) == 14
  assert {(report.shape_text(w.sizes), w.dtype) for w in PRESETS["cpu"]} == {
    ("B2 T4096 H4 K64 V64", "float32")
  }


def test_a_command_from_end_to_end(tmp_path, capsys):
  command = ["--op=gla", f"--shape={TINY}", "--implementation=recurrent"]
  files = [f"--json={tmp_path / 'rows.json'}", f"--plot={tmp_path / 'roofline.png'}"]
  assert benchmark.main(command + files) == 0
  rows = json.loads((tmp_path / "rows.json").read_text())
  assert [row["pass"] for row in rows] == ["forward", "forward_backward"]
  for row in rows:
    assert row.keys() >= KEYS and row["failure"] is None
    assert [row[letter] for letter in "BTHKVD"] == [1, 5, 2, 4, 4, None]
    assert row["ms"] > 0 and row["compile_s"] > 0 and row["peak_bytes"] > 0
    assert row["error"] < 1e-5 and row["error_shape"] == "B1 T5 H2"
    assert row["gb_per_s"] * row["ms"] == pytest.approx(row["floor_ms"] * 1e10 / 1e9)
    assert row["tflop_per_s"] / row["gb_per_s"] == pytest.approx(row["flop_per_byte"] / 1e3)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == report.HEAD
  assert printed[1].startswith("gla B1 T5 H2 K4 V4 float32, forward: floor 0.000 ms")
  assert printed[2].split()[0] == "recurrent" and len(printed[2]) == len(report.HEAD)
  assert matplotlib.image.imread(tmp_path / "roofline.png").shape[2] == 4


def test_a_failure_is_reported_and_the_others_go_on(monkeypatch, tmp_path, capsys):
  compile_program = timing.compile_program

  def broken(function, *arguments):
    if broken.calls.append(1) or len(broken.calls) == 1:
      raise ValueError("no such layout\nand more")
    return compile_program(function, *arguments)

  broken.calls = []
  monkeypatch.setattr(timing, "compile_program", broken)
  rows = f"--json={tmp_path / 'rows.json'}"
  assert benchmark.main(["--op=causal_conv", "--shape=B1,T3,D2", "--pass=forward", rows]) == 1
  failed, fine = json.loads((tmp_path / "rows.json").read_text())
  assert failed["failure"] == "ValueError: no such layout" and failed["ms"] is None
  assert fine["failure"] is None and fine["ms"] > 0
  assert "failed: ValueError: no such layout\n" in capsys.readouterr().out


def test_what_needs_too_much_memory_is_left_out(monkeypatch, capsys):
  monkeypatch.setattr(timing, "device_memory", lambda: 10)
  command = ["--op=causal_conv", "--shape=B1,T3,D2", "--pass=forward", "--no-check"]
  with pytest.raises(SystemExit, match="1"):
    benchmark.main([*command, "--implementation=parallel"])
  said = capsys.readouterr()
  assert "left out: causal_conv B1 T3 D2 W4 forward parallel needs 0.0 GB" in said.out
  assert said.err == "error: nothing was timed: what was asked for cannot run here\n"


def test_error_is_that_of_values_and_gradients(monkeypatch):
  workload = make_workload("causal_conv", "B2,T3,D2", "float32")
  case = CASES["causal_conv"]

  def measured_error(pass_):
    measure = benchmark_measure.benchmark_op(workload, implementations=["parallel"], passes=[pass_])
    ((_, (row,)),) = measure
    return row["error"]

  assert measured_error("forward_backward") < 1e-5

  def crooked(x, weight):
    # The values are right; the gradient is off by a hundredth.
    bent = 1.01 * weight - jax.lax.stop_gradient(0.01 * weight)
    return case.oracle(x, bent)

  monkeypatch.setitem(CASES, "causal_conv", dataclasses.replace(case, oracle=crooked))
  assert measured_error("forward") < 1e-5
  assert 1e-3 < measured_error("forward_backward") < 0.1
  assert oracle.deviation([np.array([1.0, 2.5])], [np.array([1.0, 2.0])]) == pytest.approx(
    0.5 / np.sqrt(2.5)
  )


def test_the_oracle_gets_what_it_can_bear():
  assert oracle.window(make_workload("gla", "T500", "float32").sizes) == {}
  big = {"B": 2, "T": 16384, "H": 16, "G": 16, "K": 128, "V": 128}
  # Heads 0 to 3 of row 0, and tokens that no chunk begins or ends with.
  middle = {"T": slice(7973, 8485), "H": slice(4), "G": slice(4), "B": slice(1)}
  assert oracle.window(big) == middle
  assert oracle.window({**big, "G": 1}).keys() == {"T", "B"}
  assert oracle.window({"B": 4, "T": 600, "D": 8}) == {"T": slice(81, 593)}


@pytest.mark.parametrize("op", ("ssd", "kda", "selective_scan", "causal_conv"))
def test_an_error_in_a_window(op, monkeypatch):
  monkeypatch.setattr(oracle, "TOKENS", 3)
  monkeypatch.setattr(oracle, "STATE_BYTES", 8 * 3 * 2 * 4)
  letters = "".join(dict.fromkeys("".join(CASES[op].axes.values())))
  workload = make_workload(
    op, ",".join(f"{letter}{SIZES[letter]}" for letter in letters), "float32"
  )
  assert "T" in oracle.window(workload.sizes) and len(oracle.window(workload.sizes)) > 1

  def errors():
    measured = benchmark_measure.benchmark_op(workload, implementations=["recurrent", "parallel"])
    return [row["error"] for _, rows in measured for row in rows]

  assert max(errors()) < 1e-5
  truth = oracle.Checker.truth.func
  crooked = functools.cached_property(lambda self: jax.tree.map(lambda x: 1.001 * x, truth(self)))
  crooked.__set_name__(oracle.Checker, "truth")
  monkeypatch.setattr(oracle.Checker, "truth", crooked)
  assert min(errors()) > 1e-4


def test_rows_take_the_place_of_those_of_the_same_program(tmp_path):
  command = ["--op=causal_conv", "--shape=B1,T3,D2", "--no-check", "--implementation=parallel"]
  path = tmp_path / "rows.json"
  files = [f"--json={path}"]
  assert benchmark.main(command + files) == 0
  before = json.loads(path.read_text())
  assert benchmark.main([*command[:1], "--shape=B2,T3,D2", *command[2:], *files]) == 0
  assert benchmark.main([*command, "--pass=forward", *files]) == 0
  rows = json.loads(path.read_text())
  assert [(row["B"], row["pass"]) for row in rows] == [
    (1, "forward"), (1, "forward_backward"), (2, "forward"), (2, "forward_backward"),
  ]  # fmt: skip
  assert rows[0]["compile_s"] != before[0]["compile_s"] and rows[1] == before[1]
  path.write_text("{}")
  with pytest.raises(SystemExit):
    benchmark.main(command + files)


@pytest.mark.parametrize("op", MATRIX)
def test_calls_of_an_op_are_its_workload(op):
  workload = make_workload(op, "B2,T6,H4,G2,K4,V3", "bfloat16")
  arguments = benchmark_cases.abstract(workload.inputs())
  calls = benchmark_cases.calls_of(CASES[op].op, **arguments)
  # With a constant decay retention is what SSD computes.
  expected = (
    make_workload("ssd", "B2,T6,H4,G2,K4,V3", "bfloat16") if op == "retention" else workload
  )
  assert benchmark_cases.workloads_of(calls) == {expected: "chunked"}
  assert benchmark_cases.refusal(calls, "recurrent") is None
  assert benchmark_cases.refusal(calls, "sideways")


def test_ops_of_a_model():
  config = small.make_config(("mamba", "attention"), train__batch_size=4, train__accumulate=2)
  calls = benchmark_config.calls_of_task(make_task(config))
  found = benchmark_cases.workloads_of(calls)
  assert {report.shape_text(w.sizes): w.op for w in found} == {
    "B2 T6 D32 W4": "causal_conv",
    "B2 T6 D32 N2": "selective_scan",
  }
  scan = next(chosen for w, chosen in found.items() if w.op == "selective_scan")
  assert scan == "recurrent"
  assert benchmark_cases.workloads_of([dispatch.Call("plstm", None, "chunked", {})]) == {}


def test_calls_are_timed_in_turn_and_in_batches(monkeypatch):
  monkeypatch.undo()
  order, waits, clock = [], [], [0.0]
  monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

  def call(name, seconds):
    order.append(name)
    clock[0] += seconds

  calls = [lambda: call("a", 0.001), lambda: call("b", 0.004)]
  times = timing.time_calls(calls, wait=waits.append, queued=False, seconds=0)
  assert times == pytest.approx([1, 4])
  assert order == ["a", "b"] * 3 and len(waits) == 6
  order.clear(), waits.clear()
  times = timing.time_calls(calls, wait=waits.append, queued=True, seconds=0)
  assert times == pytest.approx([1, 4])
  # Two single calls of each to see how long one takes, then batches of about 20 ms.
  assert order[4:] == (["a"] * 20 + ["b"] * 5) * 3 and len(waits) == 2 * 2 + 2 * 3
  order.clear()
  timing.time_calls(calls, wait=waits.append, queued=False, seconds=1)
  assert 0.4 < order.count("a") * 0.001 / (order.count("b") * 0.004) < 2.5 and clock[0] > 1


def test_bench_mode_writes_rows_and_a_figure(tmp_path, monkeypatch, capsys):
  benchmark_op = benchmark_measure.benchmark_op
  monkeypatch.setattr(
    benchmark_config,
    "benchmark_op",
    lambda workload, **kw: benchmark_op(workload, implementations=["recurrent"], **kw),
  )
  monkeypatch.setattr(benchmark_config, "time_calls", timing.time_calls)
  benchmark_config.benchmark_config(small.make_config(("mamba",)), str(tmp_path))
  rows = json.loads((tmp_path / "bench.json").read_text())
  assert [row["op"] for row in rows] == [
    *["causal_conv"] * 2, *["selective_scan"] * 2, "train_step", "decode", "decode",
  ]  # fmt: skip
  for row in rows[-3:]:
    assert row["tokens_per_second"] > 0 and row.keys() >= KEYS & {"B", "T", "ms", "device"}
  assert [row["B"] for row in rows[-2:]] == [1, 64]
  assert (tmp_path / "roofline.png").stat().st_size > 10_000
  printed = capsys.readouterr().out
  assert "the model runs selective_scan B8 T6 D32 N2 by recurrent\n" in printed
  assert "training step: " in printed and "decoding 64 rows: " in printed
