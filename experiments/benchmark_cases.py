"""The ops as the benchmark knows them: shapes, inputs, oracles; and which of them a model calls."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments.errors import UserError
from ops import dispatch, reference

DRAWN = 2**22  # random numbers in an array; a longer one repeats them, for drawing takes seconds


@dataclasses.dataclass(frozen=True)
class Case:
  """An op."""

  op: Callable
  oracle: Callable  # of the same arguments, in float64
  shape: dict[str, int]  # the default
  inputs: Callable[..., dict[str, np.ndarray]]  # float32 arrays by name, from sizes by letter
  axes: dict[str, str]  # letters of each input's axes
  written: str  # the input without which the state stays zero; the output has its axes
  gates: tuple[str, ...] = ()  # inputs in the dtype of the gates; the others are in the op's


@dataclasses.dataclass(frozen=True)
class Workload:
  """An op at a shape and a dtype."""

  op: str
  shape: tuple[tuple[str, int], ...]  # sizes by letter
  dtype: str = "float32"
  gate_dtype: str = "float32"

  @property
  def sizes(self) -> dict[str, int]:
    """Sizes by letter."""
    return dict(self.shape)

  def inputs(self) -> dict[str, jax.Array]:
    """The op's arguments by name, on the device."""
    case = CASES[self.op]
    arrays = case.inputs(**self.sizes)
    dtypes = {name: self.gate_dtype if name in case.gates else self.dtype for name in arrays}
    return {name: jnp.asarray(x, dtypes[name]) for name, x in arrays.items()}


def _normal(seed: int, *shape: int) -> np.ndarray:
  drawn = min(math.prod(shape), DRAWN)
  return np.resize(np.random.default_rng(seed).standard_normal(drawn, np.float32), shape)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _oracle(q, k, v, g=None, beta=None):
  return reference.linear_attention(q, k, v, log_decay=g, beta=beta)


def _simple_gla(q, k, v, g, **options):
  """One decay per head: what `ops.ssd` runs, without its products of time steps."""
  return ops.linear_attention(q, k, v, log_decay=g, **options)


def _retention_oracle(q, k, v):
  decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(v.shape[2]))))
  return _oracle(q, k, v, jnp.broadcast_to(decay, v.shape[:3]))


MATRIX = {"B": 2, "T": 2048, "H": 4, "G": 4, "K": 64, "V": 64}


def _matrix_case(op: Callable, oracle: Callable = _oracle, g: str = "", beta: bool = False) -> Case:
  """Of q, k, v; decays per head ("scalar") or per channel ("vector"); steps of the delta rule."""
  axes = {"q": "BTGK", "k": "BTGK", "v": "BTHV"}
  if g:
    axes["g"] = "BTH" if g == "scalar" else "BTHK"
  if beta:
    axes["beta"] = "BTH"

  def inputs(B, T, H, G, K, V):
    arrays = {"q": _normal(0, B, T, G, K), "k": _normal(1, B, T, G, K), "v": _normal(2, B, T, H, V)}
    if beta:
      # The rule expands where beta |k|^2 > 2.
      arrays = {**arrays, "q": _unit(arrays["q"]), "k": _unit(arrays["k"])}
      arrays["beta"] = _sigmoid(_normal(3, B, T, H))
    if g:
      shape = (B, T, H) if g == "scalar" else (B, T, H, K)
      arrays["g"] = np.log(_sigmoid(_normal(4, *shape))) / 16
    return arrays

  return Case(op, oracle, MATRIX, inputs, axes, "v", tuple(axes)[3:])


CASES = {
  "linear_scan": Case(
    ops.linear_scan,
    reference.linear_scan,
    {"B": 4, "T": 2048, "D": 512},
    lambda B, T, D: {"a": _sigmoid(2 + _normal(0, B, T, D)), "b": _normal(1, B, T, D)},
    {"a": "BTD", "b": "BTD"},
    "b",
  ),
  "selective_scan": Case(
    ops.selective_scan,
    reference.selective_scan,
    {"B": 4, "T": 2048, "D": 512, "N": 16},
    lambda B, T, D, N: {
      "x": _normal(0, B, T, D),
      "dt": np.exp(-4 + _normal(1, B, T, D)),
      "A": -np.tile(np.arange(1.0, N + 1), (D, 1)),
      "B": _normal(2, B, T, N),
      "C": _normal(3, B, T, N),
      "D": np.ones(D),
    },
    {"x": "BTD", "dt": "BTD", "A": "DN", "B": "BTN", "C": "BTN", "D": "D"},
    "x",
    ("dt", "A", "D"),
  ),
  "causal_conv": Case(
    ops.causal_conv,
    reference.causal_conv,
    {"B": 4, "T": 2048, "D": 512, "W": 4},
    lambda B, T, D, W: {"x": _normal(0, B, T, D), "weight": _normal(1, W, D)},
    {"x": "BTD", "weight": "WD"},
    "x",
  ),
  "linear_attention": _matrix_case(ops.linear_attention),
  "simple_gla": _matrix_case(_simple_gla, g="scalar"),
  "ssd": Case(
    ops.ssd,
    reference.ssd,
    MATRIX,
    lambda B, T, H, G, K, V: {
      "x": _normal(2, B, T, H, V),
      "dt": np.exp(-4 + _normal(3, B, T, H)),
      "A": -np.linspace(1, 16, H),
      "B": _normal(1, B, T, G, K),
      "C": _normal(0, B, T, G, K),
    },
    {"x": "BTHV", "dt": "BTH", "A": "H", "B": "BTGK", "C": "BTGK"},
    "x",
    ("dt", "A"),
  ),
  "gla": _matrix_case(ops.gla, g="vector"),
  "delta_rule": _matrix_case(ops.delta_rule, beta=True),
  "gated_delta_rule": _matrix_case(ops.gated_delta_rule, g="scalar", beta=True),
  "kda": _matrix_case(ops.kda, g="vector", beta=True),
  "retention": _matrix_case(ops.retention, _retention_oracle),
}

KNOWN = ("linear_attention", *CASES)  # what a traced call may name

_BF16 = "bfloat16"
_LONG = {"B": 2, "T": 16384, "H": 16, "G": 16, "K": 128, "V": 128}
_SHORT = {"B": 4, "T": 2048, "H": 16, "G": 16, "K": 128, "V": 128}
_CPU = {"B": 2, "T": 4096, "H": 4, "G": 4, "K": 64, "V": 64}
_MATRIX_OPS = ("simple_gla", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda")


def _workload(op: str, sizes: dict[str, int], *dtypes: str) -> Workload:
  return Workload(op, tuple(sizes.items()), *dtypes)


PRESETS = {
  "hopper": [
    *(_workload(op, sizes, _BF16) for sizes in (_LONG, _SHORT) for op in _MATRIX_OPS),
    _workload("linear_scan", {"B": 4, "T": 2048, "D": 2048}, _BF16, _BF16),
    _workload("selective_scan", {"B": 8, "T": 2048, "D": 2048, "N": 16}, _BF16, _BF16),
  ],
  "cpu": [_workload(op, _CPU) for op in _MATRIX_OPS],
}


def preset_implementations(preset: str, op: str) -> tuple[str, ...]:
  """Those that a preset times unless others are asked for."""
  if preset != "hopper":
    return dispatch.IMPLEMENTATIONS
  # On a GPU T steps are T launches; and the scores of all pairs do not fit.
  return ("parallel", "chunked", "pallas") if op == "linear_scan" else ("chunked", "pallas")


def make_workload(op: str, text: str, dtype: str, gate_dtype: str = "float32") -> Workload:
  """Reads a shape such as B4,T2048,D512; letters left out keep the op's default, G follows H.

  Raises:
    UserError: a letter that the op does not have, a size below 1, heads that do not divide.
  """
  shape = dict(CASES[op].shape)
  for part in filter(None, text.split(",")):
    match = re.fullmatch(r"([A-Z])(\d+)", part.strip())
    if not match or match[1] not in shape or int(match[2]) < 1:
      allowed = ",".join(f"{letter}{size}" for letter, size in CASES[op].shape.items())
      raise UserError(f"--shape has {part!r}, must be letters with sizes such as {allowed}")
    shape[match[1]] = int(match[2])
    if match[1] == "H" and "G" not in text:
      shape["G"] = shape["H"]
  if "G" in shape and shape["H"] % shape["G"]:
    raise UserError(f"--shape has H{shape['H']}, must be a multiple of G{shape['G']}")
  return _workload(op, shape, dtype, gate_dtype if CASES[op].gates else dtype)


def refusal(calls: Iterable[dispatch.Call], implementation: str) -> str | None:
  """Why `implementation` cannot run the ops in `calls`; None if it can."""
  reasons = (dispatch.refusal(getattr(ops, c.op), implementation, **c.arguments) for c in calls)
  return next(filter(None, reasons), None)


def abstract(tree):
  """The arrays' shapes and dtypes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def calls_of(function: Callable, *args, **kwargs) -> list[dispatch.Call]:
  """The calls of ops in `function`, traced and not run."""
  with dispatch.recorded() as calls:
    jax.eval_shape(function, *args, **kwargs)
  return calls


def workloads_of(calls: Iterable[dispatch.Call]) -> dict[Workload, str]:
  """The distinct workloads in calls that have a case here, with the implementation chosen.

  Calls of `linear_attention` go by the front that computes the same.
  """
  found = {}
  for call in calls:
    if call.op in KNOWN:
      found[_workload_of(call)] = call.chosen
  return found


# The front that computes what linear_attention does with these axes of the decay, and with a beta.
FRONTS = {
  (0, False): "linear_attention",
  (3, False): "ssd",
  (4, False): "gla",
  (0, True): "delta_rule",
  (3, True): "gated_delta_rule",
  (4, True): "kda",
}


def _workload_of(call: dispatch.Call) -> Workload:
  given = call.arguments
  if call.op == "linear_attention":
    v, decay, beta = given["v"], given["log_decay"], given["beta"]
    (B, T, G, K), (H, V) = given["k"].shape, v.shape[2:]
    op = FRONTS[0 if decay is None else decay.ndim, beta is not None]
    gate = next((gate for gate in (decay, beta) if gate is not None), v)
    sizes = {"B": B, "T": T, "H": H, "G": G, "K": K, "V": V}
    return _workload(op, sizes, v.dtype.name, gate.dtype.name)
  x = given["b"] if call.op == "linear_scan" else given["x"]
  sizes, gate = dict(zip("BTD", x.shape)), x
  if call.op == "selective_scan":
    sizes["N"], gate = given["A"].shape[1], given["dt"]
  if call.op == "causal_conv":
    sizes["W"] = given["weight"].shape[0]
  return _workload(call.op, sizes, x.dtype.name, gate.dtype.name)
