"""An op, forward and backward, whose time is split over devices: times, bytes sent, memory.

Gradients are those of the arrays along time. Those of parameters are summed over devices whenever
these work on one batch, however states move, and are left out.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from experiments import benchmark_timing as timing
from experiments import sharding
from experiments.benchmark_error import make_cotangent, make_pass
from experiments.benchmark_report import environment
from experiments.collectives import collectives, totals
from experiments.scaling_cases import UNSPLIT, Problem
from ops import dispatch

SCALINGS = ("weak", "strong")
# What is not run need not be fast: the same HLO, sooner.
UNTIMED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
Key = tuple[str, int, int]  # method, P, T


def measure_op(
  problem: Problem,
  *,
  methods: Sequence[str],
  tokens: int,
  counts: Sequence[int],
  devices: Sequence[jax.Device],
  scalings: Sequence[str] = SCALINGS,
  timed: bool = True,
  seconds: float = 0.5,
) -> list[dict[str, Any]]:
  """Measures weak and strong scaling of an op.

  Args:
    problem: the op and its sizes.
    methods: what to measure of those that the op has.
    tokens: T on all devices together, of strong scaling, and of weak scaling with the most devices.
    counts: numbers of devices to measure with, P.
    devices: at least as many as the largest.
    scalings: of SCALINGS.
    timed: whether programs are run; else they are compiled only.
    seconds: to spend on the calls of each program.

  Returns:
    A row for each, in JSON's types; the unit of a number is in its name.
  """
  fake, share = devices[0].platform == "cpu", tokens // max(counts)
  chosen = [name for name in problem.methods if name in methods]
  rows = [(UNSPLIT, 1), *((method, P) for P in sorted(counts) if P > 1 for method in chosen)]
  keys = {
    (scaling, method, P): (method, P, share * P if scaling == "weak" else tokens)
    for scaling in scalings
    for method, P in rows
  }
  # The work that one device does for comparison.
  alone = {
    row: (UNSPLIT, 1, share if row[0] == "weak" and not fake else T)
    for row, (*_, T) in keys.items()
  }
  programs = Programs(problem, devices, timed)
  wanted = [*keys.values(), *(alone.values() if timed else ())]
  found = programs.measure(list(dict.fromkeys(wanted)), seconds)
  facts = {
    "state_bytes": problem.state_bytes(),
    "fake_devices": fake,
    "cores": os.cpu_count(),
    **environment(),
    "device": devices[0].device_kind,
  }
  return [
    {
      "op": problem.op,
      "scaling": row[0],
      "method": method,
      "P": P,
      "T": T,
      **problem.own_sizes,
      "dtype": problem.dtype,
      **found[method, P, T],
      "efficiency": _efficiency(found.get(alone[row]), found[method, P, T], row, fake),
      **facts,
    }
    for row, (method, P, T) in keys.items()
  ]


def _efficiency(alone, split, row, fake: bool) -> float | None:
  """Of fake devices, which share the cores, the time of all the work on one over that of P; of real
  ones, the part of P times the speed of one that they reach."""
  scaling, _, P = row
  if not alone or not alone["ms"] or not split["ms"]:
    return None
  return alone["ms"] / split["ms"] / (P if scaling == "strong" and not fake else 1)


class Programs:
  """One op, split and unsplit, compiled and run; a program that two keys share, once."""

  def __init__(self, problem: Problem, devices: Sequence[jax.Device], timed: bool):
    self._problem, self._devices, self._timed = problem, devices, timed
    self._facts: dict[str, dict[str, Any]] = {}  # by the text of a program
    self._calls: dict[str, Callable[[], Any]] = {}
    self._inputs: dict[int, Any] = {}  # by T
    self._arrays: dict[tuple[int, int], Any] = {}  # by P and T

  def measure(self, keys: Sequence[Key], seconds: float) -> dict[Key, dict[str, Any]]:
    """What is known of each: times, bytes, or why it failed."""
    texts = {key: self._compile(*key) for key in keys}
    queued = self._devices[0].platform != "cpu"
    calls = list(self._calls.values())
    times = timing.time_calls(calls, queued=queued, seconds=seconds * len(calls))
    for text, ms in zip(self._calls, times):
      self._facts[text]["ms"] = ms
    return {key: self._facts[text] for key, text in texts.items()}

  def _compile(self, method: str, P: int, T: int) -> str:
    """Compiles and runs it once; returns the key of its facts."""
    mesh = sharding.make_mesh({**dict.fromkeys(sharding.AXES, 1), "seq": P}, self._devices[:P])
    over_time = NamedSharding(mesh, jax.P(None, "seq"))
    placed = over_time, sharding.replicated(mesh), over_time

    def output(parameters, **arrays):
      return self._problem.call(method, arrays, parameters)[0]

    def step(arrays, parameters, cotangent):
      op = lambda **arrays: output(parameters, **arrays)
      return make_pass(op, "forward_backward")(arrays, cotangent)

    began = time.perf_counter()
    inputs = self._problem.shapes(T)
    with jax.set_mesh(mesh), dispatch.for_platform(self._devices[0].platform):
      cotangent = jax.eval_shape(output, inputs[1], **inputs[0])
      jitted = jax.jit(step, in_shardings=placed, out_shardings=over_time)
      lowered = jitted.lower(*inputs, cotangent)
      text = lowered.as_text()
      if text in self._facts:
        return text
      facts = self._facts[text] = dict.fromkeys(FACTS)
      try:
        compiled = lowered.compile(compiler_options={} if self._timed else UNTIMED)
        seconds = time.perf_counter() - began
        facts |= {**_sent(compiled), **_memory(compiled)}
        if self._timed:
          facts["compile_s"] = seconds
          arrays = self._place(P, T, cotangent, placed)
          jax.block_until_ready(compiled(*arrays))
          self._calls[text] = lambda: compiled(*arrays)
      except timing.FAILURES as failure:
        facts["failure"] = timing.describe(failure)
    return text

  def _place(self, P, T, cotangent, placed):
    """The arguments of a program, which several share."""
    if T not in self._inputs:
      self._inputs[T] = jax.device_get((*self._problem.inputs(T), make_cotangent(cotangent)))
    if (P, T) not in self._arrays:
      self._arrays[P, T] = jax.device_put(self._inputs[T], placed)
    return self._arrays[P, T]


FACTS = (
  "ms", "compile_s", "sent_bytes", "collectives", "sent",
  "argument_bytes", "output_bytes", "temporary_bytes", "failure",
)  # fmt: skip


def _sent(compiled) -> dict[str, Any]:
  """By the device that sends the most."""
  kinds = totals(collectives(compiled.as_text()))
  return {
    "sent_bytes": sum(total.bytes for total in kinds.values()),
    "collectives": sum(total.count for total in kinds.values()),
    "sent": {kind: {"count": t.count, "bytes": t.bytes} for kind, t in kinds.items()},
  }


def _memory(compiled) -> dict[str, int]:
  """Of each device."""
  memory = compiled.memory_analysis()
  return {
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }
