"""How fast each implementation of each op is on this device, beside the floor that the device sets.

python -m experiments.benchmark --op=selective_scan --shape=B4,T2048,D512,N16
python -m experiments.benchmark --preset=hopper --plot=roofline.png   (or --preset=cpu)
python -m experiments.benchmark --op=gla --dtype=bfloat16 --peers     (beside other libraries' ops)
python -m experiments.benchmark --training      (training steps, beside Hugging Face transformers)
python run.py --config=configs/quickstart.py --mode=bench       (the ops and the step of a config)

Times are medians of calls that are compiled and warm; the implementations of one shape are timed in
turn, round by round, so that a machine that slows down slows all of them. A GPU or a TPU is given
many calls before it is waited for, so that the device is timed and not the start of a call.

`floor_ms` is the least that the op can take: each input and output moved once at the bandwidth of a
large copy, measured in the same run, or the exponentials or products, if they take longer on a
device whose rates are known (`experiments.floors`); what fits into caches can be faster. GB/s
counts the same bytes, TFLOP/s the operations of the form in chunks. `error` is the largest
deviation from the float64 oracle, of outputs and gradients, in multiples of their root mean square,
in a window of tokens, rows and heads where the oracle would take too long for all. What would not
fit into the device's memory is left out, and said; what fails is reported, the others go on, and
the exit status is 1.

--peers adds rows of flash-linear-attention (needs torch with CUDA) and of causal softmax attention
(jax's, and torch's if it is installed) at the same shapes.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

from experiments import benchmark_report as report
from experiments import benchmark_training, plots
from experiments.benchmark_cases import (
  CASES,
  PRESETS,
  Workload,
  make_workload,
  preset_implementations,
)
from experiments.benchmark_measure import benchmark_op
from experiments.benchmark_peers import Peers
from experiments.errors import UserError, check_writable
from experiments.floors import PASSES
from experiments.memory import keep_memory
from ops import dispatch


def main(argv: Sequence[str] | None = None) -> int:
  """The command line of this module; returns the exit status."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  try:
    check_writable("--json", arguments.json)
    check_writable("--plot", arguments.plot)
    if arguments.training:
      rows = benchmark_training.compare_training()
      print(benchmark_training.table(rows))
      if arguments.json:
        report.write_rows(rows, arguments.json)
    else:
      rows = _measure(arguments)
      if not rows:
        raise UserError("nothing was timed: what was asked for cannot run here", status=1)
      if arguments.plot:
        kept = report.read_rows(arguments.json) if arguments.json else rows
        plots.roofline(kept, arguments.plot)
  except UserError as error:
    parser.exit(error.status, f"error: {error}\n")
  return int(any(row.get("failure") for row in rows))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.benchmark", description="Times ops on the device at hand."
  )
  parser.add_argument("--preset", choices=sorted(PRESETS), help="a table of ops and shapes")
  parser.add_argument("--op", choices=sorted(CASES), action="append", help="default: all")
  parser.add_argument("--shape", default="", help="sizes such as B4,T2048,H16,K128,V128")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument(
    "--gate-dtype", choices=["float32", "bfloat16"], help="of decays, betas and steps: float32"
  )
  parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, action="append")
  parser.add_argument("--pass", dest="passes", choices=PASSES, action="append")
  parser.add_argument("--no-check", action="store_true", help="leave the oracle out")
  parser.add_argument("--peers", action="store_true", help="other libraries' ops too")
  parser.add_argument(
    "--training", action="store_true", help="train small models here and in transformers instead"
  )
  parser.add_argument(
    "--seconds", type=float, default=2.0, help="of calls for each pass of an op; 2 unless given"
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="also write the rows here, over those of the same programs"
  )
  parser.add_argument(
    "--plot", type=pathlib.Path, help="also draw the roofline, a png, of all rows that --json holds"
  )
  return parser


def _measure(arguments) -> list[dict]:
  """Measures, and prints each pass of each workload as soon as it is done."""
  rows, passes = [], arguments.passes or PASSES
  earlier = report.read_rows(arguments.json) if arguments.json else []
  workloads = list(_workloads(arguments))
  peers = Peers() if arguments.peers else None

  def show(measured):
    rows.extend(measured)
    # As it goes: a long table may be interrupted.
    if arguments.json:
      report.write_rows(report.merged(earlier, rows), arguments.json)
    print(*report.lines(measured), sep="\n", flush=True)

  print(report.HEAD)
  for workload in workloads:
    for pass_, measured in benchmark_op(
      workload,
      implementations=arguments.implementation
      or preset_implementations(arguments.preset, workload.op),
      passes=passes,
      check=not arguments.no_check,
      seconds=arguments.seconds,
    ):
      show(measured + (peers.op_rows(workload, pass_) if peers else []))
    if peers:
      for measured in peers.attention_rows(workload, passes):
        show(measured)
  return rows


def _workloads(arguments) -> Iterator[Workload]:
  if arguments.preset:
    if arguments.shape or arguments.gate_dtype:
      raise UserError("--preset has its own shapes and dtypes: leave --shape and --gate-dtype out")
    if arguments.preset == "hopper" and dispatch.platform() != "gpu":
      raise UserError(
        f"--preset=hopper is for a GPU, this is a {dispatch.platform()}: --preset=cpu"
      )
    for workload in PRESETS[arguments.preset]:
      if workload.op in (arguments.op or CASES):
        yield workload
    return
  for name in arguments.op or CASES:
    gate_dtype = arguments.gate_dtype or "float32"
    yield make_workload(name, arguments.shape, arguments.dtype, gate_dtype)


if __name__ == "__main__":
  keep_memory()
  sys.exit(main())
