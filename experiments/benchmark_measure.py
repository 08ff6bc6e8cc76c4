"""Measures the implementations of one op at one shape."""

from collections.abc import Callable, Iterator, Sequence

import jax

from experiments import benchmark_error as oracle
from experiments import benchmark_report as report
from experiments import benchmark_timing as timing
from experiments import floors
from experiments.benchmark_cases import CASES, Workload, abstract, calls_of, refusal
from experiments.floors import PASSES
from ops.dispatch import IMPLEMENTATIONS


def benchmark_op(
  workload: Workload,
  *,
  implementations: Sequence[str] = IMPLEMENTATIONS,
  passes: Sequence[str] = PASSES,
  check: bool = True,
  seconds: float = 2.0,
  say: Callable[[str], None] = print,
) -> Iterator[tuple[str, list[dict]]]:
  """Measures the implementations that can run here.

  Args:
    workload: the op, its shape and dtype.
    implementations: by name.
    passes: forward, forward_backward.
    check: compare with the oracle.
    seconds: to spend on the calls of one pass.
    say: is told, in one line each, what is left out because it needs more memory than there is.

  Yields:
    Each pass, with the rows of the implementations.
  """
  op, inputs = CASES[workload.op].op, workload.inputs()
  calls = calls_of(op, **abstract(inputs))
  runnable = [name for name in implementations if refusal(calls, name) is None]
  output = jax.eval_shape(op, **abstract(inputs))[0]
  arguments = inputs, oracle.make_cotangent(output)
  checker = oracle.Checker(workload, arguments) if check and runnable else None
  wanted = [(pass_, name) for pass_ in passes for name in runnable]
  # All before the first is timed: compiling tries kernels out on a GPU.
  compiled = {which: _compile(op, *which, arguments) for which in wanted}
  for pass_ in passes:
    work = floors.least_work(workload.op, workload.sizes, inputs, output, pass_)
    programs, rows = {}, []
    for name in runnable:
      row = dict(workload=workload, implementation=name, pass_=pass_, work=work)
      try:
        program = compiled[pass_, name]
        if isinstance(program, Exception):
          raise program
        if program.needed_bytes > timing.device_memory():
          where = f"{workload.op} {report.shape_text(workload.sizes)} {pass_}"
          needed = f"{program.needed_bytes / 1e9:.1f} GB"
          say(f"left out: {where} {name} needs {needed}, more than this device has")
          continue
        outputs = jax.block_until_ready(program.run(*arguments))
        row |= dict(compile_s=program.compile_s, peak_bytes=program.peak_bytes)
        if checker is not None:
          row |= dict(error=checker.error(program.run, outputs), error_shape=checker.shape)
        del outputs
        programs[name] = program.run
      except timing.FAILURES as failure:
        row |= dict(failure=timing.describe(failure))
      rows.append(row)
    runs = [lambda run=run: run(*arguments) for run in programs.values()]
    times = dict(zip(programs, timing.time_calls(runs, seconds=seconds)))
    bandwidth = timing.copy_bandwidth()
    measured = [
      report.make_row(**row, bandwidth=bandwidth, ms=times.get(row["implementation"]))
      for row in rows
    ]
    yield pass_, measured


def _compile(op, pass_, name, arguments) -> timing.Program | Exception:
  function = lambda **inputs: op(**inputs, implementation=name)[0]
  try:
    return timing.compile_program(oracle.make_pass(function, pass_), *arguments)
  except timing.FAILURES as failure:
    return failure
