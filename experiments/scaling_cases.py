"""The ops whose scaling is measured: inputs, and the ways in which states reach other devices."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments.benchmark_cases import CASES, Workload
from experiments.errors import UserError
from experiments.newton_convergence import gru
from ops import sharded
from ops.softmax_attention import softmax_attention
from ops.time_axis import METHODS

UNSPLIT = "unsplit"  # the method of one device
ATTENTION = "softmax_attention"  # for comparison: what it sends grows with time
RECURRENCES = ("ssd", "gla", "gated_delta_rule", "selective_scan", "newton_scan")
OPS = (*RECURRENCES, *(name for name in CASES if name not in RECURRENCES), ATTENTION)
EXCHANGES = (*METHODS, "auto")
# By letter; each op takes those that it has, G is H and T the tokens.
SMALL = {"B": 1, "H": 4, "K": 64, "V": 64, "D": 256, "N": 16, "W": 4}
LARGE = {"B": 1, "H": 16, "K": 128, "V": 128, "D": 2048, "N": 16, "W": 4}
PARAMETERS = ("A", "D", "weight")  # inputs without a time axis
CELL = ops.Cell(gru, "diagonal")


@dataclasses.dataclass(frozen=True)
class Problem:
  """An op, and the sizes of its inputs, all but their time."""

  op: str  # of OPS
  sizes: Mapping[str, int]  # by letter, also such as the op does not have
  dtype: str  # of inputs but gates and steps, which are float32

  @property
  def own_sizes(self) -> dict[str, int]:
    """By letter, those that the op has."""
    own = {"newton_scan": "BD", ATTENTION: "BHKV"}
    letters = own.get(self.op) or CASES[self.op].shape
    return {letter: self.sizes[letter] for letter in letters if letter in self.sizes}

  @property
  def methods(self) -> tuple[str, ...]:
    """How what the op needs of earlier devices can reach a device."""
    return ("all_gather", "ring") if self.op == ATTENTION else EXCHANGES

  def inputs(self, T: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The arrays along T tokens of time, and the parameters, by name."""
    sizes = {**self.own_sizes, "T": T}
    if self.op == "newton_scan":
      generator = np.random.default_rng(0)
      x = generator.standard_normal((sizes["B"], T, 3, sizes["D"]), np.float32)
      params = generator.uniform(-0.5, 0.5, (3, sizes["D"]))
      return {"x": jnp.asarray(x, self.dtype)}, {"params": jnp.asarray(params, jnp.float32)}
    if "H" in sizes:
      sizes["G"] = sizes["H"]
    like = "linear_attention" if self.op == ATTENTION else self.op
    arrays = Workload(like, tuple(sizes.items()), self.dtype).inputs()
    parameters = {name: arrays.pop(name) for name in PARAMETERS if name in arrays}
    return arrays, parameters

  def shapes(self, T: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the `inputs`."""
    arrays, parameters = jax.eval_shape(lambda: self.inputs(1))
    longer = lambda x: jax.ShapeDtypeStruct((x.shape[0], T, *x.shape[2:]), x.dtype)
    return {name: longer(x) for name, x in arrays.items()}, parameters

  def call(self, method: str, arrays: Mapping[str, Any], parameters: Mapping[str, Any]):
    """The op's output, and its state after the last token."""
    if self.op == ATTENTION:
      sequence = "all_gather" if method == UNSPLIT else method
      return softmax_attention(**arrays, sequence=sequence)
    with sharded.exchange("auto" if method == UNSPLIT else method):
      if self.op == "newton_scan":
        return ops.newton_scan(CELL, **parameters, **arrays, implementation="parallel")
      return CASES[self.op].op(**arrays, **parameters)

  def state_bytes(self) -> int:
    """Of what one message of a state holds, all rows and heads; 0 for attention, which has none."""
    if self.op == ATTENTION:
      return 0
    state = jax.eval_shape(lambda *inputs: self.call(UNSPLIT, *inputs)[1], *self.shapes(1))
    return state.size * state.dtype.itemsize


def read_sizes(text: str, defaults: Mapping[str, int]) -> dict[str, int]:
  """Reads sizes such as H16,K128; letters left out keep their defaults.

  Raises:
    UserError: a letter that there is not, or a size below 1.
  """
  sizes = dict(defaults)
  for part in filter(None, text.split(",")):
    match = re.fullmatch(r"([A-Z])(\d+)", part.strip())
    if not match or match[1] not in sizes or int(match[2]) < 1:
      allowed = ",".join(f"{letter}{size}" for letter, size in sizes.items())
      raise UserError(
        f"--shape has {part!r}, must be letters with sizes such as {allowed} (T is --tokens)"
      )
    sizes[match[1]] = int(match[2])
  return sizes
