"""Compiling, running and timing on the device at hand."""

import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir

# What tracing, lowering, compiling and running a program raise where they do not raise a bug.
FAILURES = (
  RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ir.MLIRError,
)  # fmt: skip
BATCH = 20e-3  # seconds of work that a GPU or a TPU is given before it is waited for


class Program(NamedTuple):
  """A compiled function."""

  run: Callable[..., Any]
  compile_s: float
  peak_bytes: int | None  # temporary arrays and outputs, beside the inputs
  needed_bytes: int  # with the inputs


def compile_program(function: Callable, *arguments) -> Program:
  """Compiles `function` for `arguments`; the seconds include tracing."""
  began = time.perf_counter()
  program = jax.jit(function).lower(*arguments).compile()
  seconds = time.perf_counter() - began
  memory = program.memory_analysis()
  if memory is None:
    return Program(program, seconds, None, 0)
  peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return Program(program, seconds, peak, peak + memory.argument_size_in_bytes)


def time_calls(
  calls: Sequence[Callable[[], Any]],
  *,
  wait: Callable[[Any], Any] = jax.block_until_ready,
  queued: bool | None = None,
  seconds: float = 2.0,
) -> list[float]:
  """Median milliseconds of each call, taken in turn, round by round, after one to warm up.

  Args:
    calls: each has run before, so that it is compiled.
    wait: for what a call returns.
    queued: whether calls return before the device is done, one after the other: then many are made
      before the last is waited for, and what is measured is the device and not the start of a
      single call. None is yes, except on a CPU.
    seconds: to spend on all calls together; three rounds are made even if they take longer.
  """
  queued = jax.default_backend() != "cpu" if queued is None else queued
  repeats = [_repeats(call, wait) if queued else 1 for call in calls]
  times: list[list[float]] = [[] for _ in calls]
  turn, end, rounds = seconds / 10 / max(1, len(calls)), time.perf_counter() + seconds, 0
  while rounds < 3 or time.perf_counter() < end:
    rounds += 1
    for call, count, measured in zip(calls, repeats, times):
      until = time.perf_counter() + turn
      measured.append(_measure(call, wait, count))
      while time.perf_counter() < until:
        measured.append(_measure(call, wait, count))
  return [1e3 * float(np.median(measured)) for measured in times]


def _measure(call, wait, count: int) -> float:
  """Seconds of one call out of `count`."""
  began = time.perf_counter()
  for _ in range(count):
    result = call()
  wait(result)
  return (time.perf_counter() - began) / count


def _repeats(call, wait) -> int:
  _measure(call, wait, 1)
  return min(1000, math.ceil(BATCH / _measure(call, wait, 1)))


@functools.cache
def copy_bandwidth() -> float:
  """Bytes read and written per second, at best, in a copy of 256 MiB on the first device."""
  x = jnp.zeros(2**26, jnp.float32)
  # In place: the pages of a new array would have to be made first.
  carried, copy = [x], jax.jit(lambda x: x + 1, donate_argnums=0)

  def call():
    carried[:] = [copy(*carried)]
    return carried

  bytes_moved = 2 * x.nbytes
  repeats = _repeats(call, jax.block_until_ready)
  return bytes_moved / min(_measure(call, jax.block_until_ready, repeats) for _ in range(20))


def device_memory() -> float:
  """Bytes that programs may use on the first device; infinity if that is not known."""
  statistics = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in statistics:
    return statistics["bytes_limit"]
  if jax.default_backend() != "cpu":
    return math.inf
  meminfo = pathlib.Path("/proc/meminfo")
  if meminfo.exists():
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(failure: BaseException) -> str:
  """The kind of an exception and the first line of its message."""
  text = str(failure).strip()
  return f"{type(failure).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
