"""How ops scale whose time is split over devices, by each way in which states reach other devices.

python -m experiments.scaling [--plot=scaling.png] [--json=scaling.json]
python -m experiments.scaling --op=gla --method=doubling --tokens=65536 --devices=1,2,4
python -m experiments.scaling --no-time         (what is sent, and memory: compiles only)
python -m experiments.scaling --memory          (of a training step, T on one device and split)

Strong scaling splits --tokens over 1, 2, 4, 8 devices; weak scaling gives each device the share
that it has where --tokens are split over the most. Passes are forward and backward; gradients are
those of arrays along time. Times are medians of calls that are compiled and warm, the programs of
an op timed in turn. Bytes sent and memory are those of one device, read from the compiled program;
what is sent does not depend on time, except by softmax_attention, which is here for comparison.

Several GPUs or TPUs are used where there are such. Else the devices are fake ones of the CPU, which
share its cores: what is sent and memory are as they would be on real ones, times show what
splitting costs and not what it gains.

--memory compiles the training step of small models with --tokens to a row, once for one device and
once with mesh.seq the largest of --devices.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from experiments import benchmark_report, scaling_memory, scaling_plot, scaling_report
from experiments.errors import UserError, check_writable
from experiments.memory import keep_memory
from experiments.scaling_cases import LARGE, OPS, RECURRENCES, SMALL, Problem, read_sizes
from experiments.scaling_measure import SCALINGS, measure_op

FAKE = "--xla_force_host_platform_device_count"


def main(argv: Sequence[str] | None = None) -> int:
  """The command line of this module; returns the exit status."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  try:
    check_writable("--json", arguments.json)
    check_writable("--plot", arguments.plot)
    counts = _counts(arguments)
    if arguments.memory:
      rows = _memory(arguments, max(counts))
    else:
      rows = _scaling(arguments, counts)
  except UserError as error:
    parser.exit(error.status, f"error: {error}\n")
  return int(any(row.get("failure") for row in rows))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.scaling", description="Times ops split over devices along time."
  )
  parser.add_argument(
    "--op", choices=OPS, action="append", help=f"default: {', '.join(RECURRENCES)}"
  )
  parser.add_argument(
    "--method",
    choices=["all_gather", "all_scan", "doubling", "auto", "ring"],
    action="append",
    help="default: all; ring is of softmax_attention",
  )
  parser.add_argument(
    "--tokens", type=int, help="T in all: 16384, 131072 on GPUs, 65536 of --memory"
  )
  parser.add_argument("--devices", default="1,2,4,8", help="how many, 1,2,4,8")
  parser.add_argument("--shape", default="", help="other sizes, such as B1,H16,K128,V128,D2048,N16")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], help="float32, on GPUs and TPUs bfloat16"
  )
  parser.add_argument("--scaling", choices=SCALINGS, action="append", help="default: both")
  parser.add_argument("--no-time", action="store_true", help="compile only")
  parser.add_argument("--memory", action="store_true", help="of a training step instead")
  parser.add_argument(
    "--model", choices=scaling_memory.MODELS, action="append", help="of --memory, default: all"
  )
  parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
  parser.add_argument("--plot", type=pathlib.Path, help="also draw weak and strong scaling, a png")
  return parser


def _counts(arguments) -> list[int]:
  """The numbers of devices, ascending, which divide the tokens; sees to it that there are so many.

  Raises:
    UserError: what is not such a list, or tokens that cannot be split so.
  """
  given = arguments.devices.split(",")
  if not all(part.isdecimal() and int(part) >= 1 for part in given):
    raise UserError(f"--devices is {arguments.devices!r}, must be numbers such as 1,2,4,8")
  counts = sorted({int(part) for part in given})
  if FAKE not in os.environ.get("XLA_FLAGS", ""):
    # JAX reads it when it is first asked for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE}={counts[-1]}".strip()
  return counts


def _check_tokens(tokens: int, counts: Sequence[int]) -> None:
  wrong = [P for P in counts if tokens % P]
  if tokens < 1 or wrong:
    raise UserError(f"--tokens is {tokens}, must be a multiple of each of --devices, {counts}")


def _devices(count: int) -> list[jax.Device]:
  """Those to measure on."""
  devices = jax.devices()
  if devices[0].platform == "cpu" or len(devices) == 1:
    devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(f"--devices has {count}, but there are {len(devices)} devices")
  return devices


def _scaling(arguments, counts: Sequence[int]) -> list[dict]:
  """Measures, and prints each op as soon as it is done."""
  devices = _devices(counts[-1])
  fake = devices[0].platform == "cpu"
  tokens = arguments.tokens or (2**14 if fake else 2**17)
  _check_tokens(tokens, counts)
  sizes = read_sizes(arguments.shape, SMALL if fake else LARGE)
  dtype = arguments.dtype or ("float32" if fake else "bfloat16")
  names, rows = arguments.op or RECURRENCES, []
  print(scaling_report.HEAD, flush=True)
  for name in names:
    problem = Problem(name, sizes, dtype)
    methods = arguments.method or problem.methods
    if not set(methods) & set(problem.methods):
      allowed = ", ".join(problem.methods)
      raise UserError(f"--method is {', '.join(methods)}, must be one of {allowed} for {name}")
    measured = measure_op(
      problem,
      methods=methods,
      tokens=tokens,
      counts=counts,
      devices=devices,
      scalings=arguments.scaling or SCALINGS,
      timed=not arguments.no_time,
    )
    print(scaling_report.table(measured), flush=True)
    rows += measured
    # As it goes: a long table may be interrupted.
    if arguments.json:
      benchmark_report.write_rows(rows, arguments.json)
  print(f"\n{scaling_report.note(rows[0], counts[-1])}\n")
  print(scaling_report.sent_table(rows, counts[-1]))
  if arguments.plot:
    scaling_plot.draw(rows, arguments.plot)
    print(f"wrote {arguments.plot}")
  return rows


def _memory(arguments, P: int) -> list[dict]:
  tokens = arguments.tokens or 2**16
  _check_tokens(tokens, [P])
  rows = []
  print(scaling_memory.HEAD, flush=True)
  for model in arguments.model or scaling_memory.MODELS:
    rows.append(scaling_memory.measure(model, tokens, P))
    print(scaling_memory.line(rows[-1]), flush=True)
    if arguments.json:
      benchmark_report.write_rows(rows, arguments.json)
  return rows


if __name__ == "__main__":
  keep_memory()
  # Programs that come from it keep no account of their memory.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
