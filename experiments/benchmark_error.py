"""How far an implementation is from the float64 oracle, at a shape that the oracle can bear."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark_cases import CASES, Workload

TOKENS = 1024  # more would take the oracle, a loop over tokens, too long
STATE_BYTES = 2**29  # of all the states that its gradient keeps


def checked_sizes(sizes: dict[str, int]) -> dict[str, int]:
  """B and T, as large as they may be for the oracle."""
  state = math.prod(sizes.get(letter, 1) for letter in "HKVDNW")
  T = min(sizes["T"], TOKENS, max(64, STATE_BYTES // (8 * state)))
  return {"B": min(sizes["B"], max(1, STATE_BYTES // (8 * state * T))), "T": T}


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
  """The truth about one pass of a workload; `shape` says at which rows and tokens."""

  def __init__(
    self, workload: Workload, pass_: str, arguments: tuple[dict[str, jax.Array], jax.Array]
  ):
    sizes = workload.sizes
    small = checked_sizes(sizes)
    self.shape = f"B{small['B']} T{small['T']}"
    self._whole = all(sizes[letter] == size for letter, size in small.items())
    self._arguments = arguments
    if not self._whole:
      cotangent = jnp.zeros((small["B"], small["T"], *arguments[1].shape[2:]), arguments[1].dtype)
      self._arguments = workload.inputs(**small), make_cotangent(cotangent)
    self._truth = _truth(workload, pass_, self._arguments)

  def error(self, function: Callable, outputs: Any) -> float:
    """The largest deviation of `outputs`, which `function` gave at the whole shape.

    At a smaller shape `function` runs again.
    """
    if not self._whole:
      outputs = jax.jit(function)(*self._arguments)
    return deviation(outputs, self._truth)


def _truth(workload, pass_, arguments):
  """What the pass gives in float64, from inputs as they were rounded."""
  oracle = CASES[workload.op].oracle
  with jax.enable_x64(True), _cpu():
    exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arguments)
    function = make_pass(lambda **inputs: oracle(**inputs)[0], pass_)
    return jax.tree.map(np.asarray, jax.jit(function)(*exact))


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
