"""How far an implementation is from the float64 oracle.

The oracle is a loop over tokens, too slow for a large shape. There it sees a window of some rows,
heads or channels and tokens in the middle of time: where nothing is written to the state before the
window, and no cotangent comes from outside of it, outputs and gradients inside are those of the
window alone. So the very program that is timed is checked.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark_cases import CASES, Workload

TOKENS = 512
STATE_BYTES = 2**28  # of all the states that the oracle's gradient keeps
ODD = 37  # tokens by which a window misses the middle, and so the borders of chunks


def window(sizes: dict[str, int]) -> dict[str, slice]:
  """What the oracle sees of each letter that it does not see all of."""
  T = min(sizes["T"], TOKENS)
  states = max(1, STATE_BYTES // (8 * T * math.prod(sizes.get(letter, 1) for letter in "KVNW")))
  split, shared = ("H", sizes.get("G", 1)) if "H" in sizes else ("D", 1)
  # Heads that share a key stay together.
  group = sizes[split] // shared if split == "H" else 1
  groups = max(1, min(sizes[split], states) // group)
  kept = {split: groups * group, "B": max(1, min(sizes["B"], states // (groups * group)))}
  if split == "H":
    kept["G"] = groups
  start = max(0, min(sizes["T"] - T, (sizes["T"] - T) // 2 + ODD))
  found = {"T": slice(start, start + T), **{letter: slice(n) for letter, n in kept.items()}}
  return {x: part for x, part in found.items() if part.stop - (part.start or 0) < sizes[x]}


def make_pass(function: Callable, pass_: str) -> Callable:
  """(inputs by name, cotangent) to the output, or to the output and the inputs' gradients."""
  if pass_ == "forward":
    return lambda inputs, cotangent: function(**inputs)

  def forward_backward(inputs, cotangent):
    o, pull = jax.vjp(lambda inputs: function(**inputs), inputs)
    return o, pull(cotangent)[0]

  return forward_backward


def make_cotangent(output: Any) -> jax.Array:
  """What the backward pass starts from, in the output's shape and dtype."""
  values = np.random.default_rng(9).standard_normal(output.shape, np.float32)
  return jnp.asarray(values, output.dtype)


class Checker:
  """The truth about a workload."""

  def __init__(self, workload: Workload, arguments: tuple[dict[str, jax.Array], jax.Array]):
    self._case = case = CASES[workload.op]
    self._window = window(workload.sizes)
    sizes = {**workload.sizes, **{x: _length(part) for x, part in self._window.items()}}
    self.shape = " ".join(f"{letter}{sizes[letter]}" for letter in "BTHD" if letter in sizes)
    self._arguments = arguments
    if self._window:
      inputs, cotangent = arguments
      axes = case.axes[case.written]
      late = {"T": slice(self._window["T"].start, None)} if "T" in self._window else {}
      inputs = {**inputs, case.written: _only(inputs[case.written], axes, late)}
      self._arguments = inputs, _only(cotangent, axes, self._window)

  def error(self, run: Callable, outputs: Any) -> float:
    """The largest deviation of a pass, which gave `outputs` for the workload's own arguments.

    `run` takes the same arguments, and is called where the oracle does not see them whole.
    """
    if self._window:
      outputs = run(*self._arguments)
    o, gradients = self.truth
    if isinstance(outputs, tuple):
      return deviation(self._cut(*outputs), (o, gradients))
    return deviation(self._cut(outputs, {}), (o, {}))

  @functools.cached_property
  def truth(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output and the inputs' gradients in float64, from inputs as they were rounded."""
    cotangent, inputs = self._cut(self._arguments[1], self._arguments[0])
    with jax.enable_x64(True), _cpu():
      exact = jax.tree.map(lambda x: jnp.asarray(x.astype(np.float64)), (inputs, cotangent))
      function = make_pass(lambda **inputs: self._case.oracle(**inputs)[0], "forward_backward")
      return jax.tree.map(np.asarray, jax.jit(function)(*exact))

  def _cut(self, o, inputs):
    """What the window shows of the output, or what is shaped as it, and of the inputs."""
    axes = self._case.axes
    by_name = {name: np.asarray(_cut(x, axes[name], self._window)) for name, x in inputs.items()}
    return np.asarray(_cut(o, axes[self._case.written], self._window)), by_name


def _length(part: slice) -> int:
  return part.stop - (part.start or 0)


def _cut(x, axes, window):
  return x[tuple(window.get(letter, slice(None)) for letter in axes)]


def _only(x, axes, window):
  """`x`, zero outside of the window."""
  place = tuple(window.get(letter, slice(None)) for letter in axes)
  return jnp.zeros_like(x).at[place].set(x[place])


def deviation(outputs: Any, wanted: Any) -> float:
  """The largest difference in any array, in root mean squares of the array."""

  def one(x, y):
    scale = np.sqrt(np.mean(y * y)) or 1.0
    return np.max(np.abs(np.asarray(x, np.float64) - y)) / scale

  return float(max(map(one, jax.tree.leaves(outputs), jax.tree.leaves(wanted))))


def _cpu():
  """The default device for the oracle: not every accelerator has float64."""
  try:
    return jax.default_device(jax.devices("cpu")[0])
  except RuntimeError:  # jax was told to have no CPU
    return contextlib.nullcontext()
