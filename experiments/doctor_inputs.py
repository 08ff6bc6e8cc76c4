"""What the doctor feeds to every op: one table of input families, one of ops, one of lengths.

A family is a kind of input that has broken somebody's kernel: gates that forget all at once, keys
that repeat, a value out of all proportion. Every op runs every family that concerns it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import ops
from ops import reference

B, HQ, H, K, V = 2, 1, 2, 8, 5  # fewer query heads than heads, K != V
D, N, W = 6, 4, 4  # channels, state size and width of the diagonal ops and the convolution
LONGEST_PARALLEL = 127  # tokens; time and memory of "parallel" grow faster than the length


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of input: the defaults, with one thing made difficult.

  Attributes:
    name: in the doctor's table.
    concerns: the trait that an op must have for the family to mean anything to it.
    gate, key, beta, value, query: how each is drawn, see `gates`, `keys`, `betas` and `values`.
    state: the size of the initial state.
  """

  name: str
  concerns: str
  gate: str = "soft"
  key: str = "random"
  beta: str = "uniform"
  value: str = "random"
  query: str = "random"
  state: float = 1.0


FAMILIES = (
  Family("plain", "value"),
  Family("an outlier of 1e3", "value", value="outlier"),
  Family("zero inputs", "value", value="zero"),
  Family("large state", "value", state=100.0),
  Family("zero queries", "key", query="zero"),
  Family("gates 0", "gate", gate="zero"),
  Family("gates -0.05", "gate", gate="mild"),
  Family("gates -20", "gate", gate="strong"),
  Family("gates 0 and -0.0", "gate over time", gate="signed zeros"),
  Family("bursts of -20", "gate over time", gate="bursts"),
  Family("resets of -1e4", "gate over time", gate="resets"),
  Family("resets, unit silu keys", "key and gate", gate="resets", key="silu"),
  Family("channels at 0 and -20", "gate over channels", gate="one lost"),
  Family("unit silu keys", "key", key="silu"),
  Family("identical keys", "key", key="identical"),
  Family("alternating keys", "key", key="alternating"),
  Family("keys correlated 0.99", "key", key="correlated"),
  Family("zero keys", "key", key="zeros"),
  Family("beta 0", "beta", beta="zero"),
  Family("beta 1", "beta", beta="one"),
  Family("beta in [0, 2]", "beta", beta="double"),
  Family("beta 2", "beta", beta="two"),
  Family("beta 1, identical keys", "beta", beta="one", key="identical"),
  Family("beta 2, alternating keys", "beta", beta="two", key="alternating"),
  Family("beta in [0, 2], correlated", "beta", beta="double", key="correlated"),
)


def gates(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Logarithms of decays [B T ...], <= 0."""
  by_token = (*shape[:2], *(1,) * (len(shape) - 2))
  match kind:
    case "soft":
      return -np.logaddexp(0.0, -rng.normal(size=shape)) / 16
    case "zero":
      return np.zeros(shape)
    case "mild":
      return np.full(shape, -0.05)
    case "strong":
      return np.full(shape, -20.0)
    case "signed zeros":
      return np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    case "bursts":
      return np.where(rng.random(shape) < 0.2, -20.0, -1e-3)
    case "resets":
      return np.where(rng.random(by_token) < 0.05, -1e4, gates("soft", rng, shape))
    case "one lost":
      g = gates("soft", rng, shape)
      g[..., 0], g[..., -1] = 0.0, -20.0
      return g
  raise ValueError(f"gate is {kind!r}, expected one that a family names")


def keys(kind: str, rng: np.random.Generator, shape: tuple[int, ...], *, unit: bool) -> np.ndarray:
  """Keys [B T Hq K]; of norm 1 where the kind or `unit` says so."""
  k, one = rng.normal(size=shape), rng.normal(size=(shape[0], 1, *shape[2:]))
  if kind == "random":
    return _unit(k) if unit else k
  signs = np.where(np.arange(shape[1]) % 2, -1.0, 1.0)[:, None, None]
  match kind:
    case "silu":
      return _unit(k / (1 + np.exp(-k)))
    case "identical":
      return np.broadcast_to(_unit(one), shape)
    case "alternating":
      return signs * _unit(one)
    case "correlated":
      return _unit(0.99 * _unit(one) + np.sqrt(1 - 0.99**2) * _unit(k))
    case "zeros":
      return np.where(rng.random((*shape[:3], 1)) < 0.2, 0.0, _unit(k))
  raise ValueError(f"key is {kind!r}, expected one that a family names")


def betas(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Steps of the delta rule [B T H]."""
  constant = {"zero": 0.0, "one": 1.0, "two": 2.0}
  if kind in constant:
    return np.full(shape, constant[kind])
  return rng.uniform(0.0, {"uniform": 1.0, "double": 2.0}[kind], size=shape)


def values(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Values, inputs or queries [B T ...]."""
  x = rng.normal(size=shape)
  if kind == "zero":
    return np.zeros(shape)
  if kind == "outlier":
    x[:, shape[1] // 2, ..., 0] = 1e3
  return x


def _unit(x):
  return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is compiled for: sizes, with or without packed documents.

  Attributes:
    T: tokens.
    K, V: widths of keys and values.
    D, N: channels and state size of the diagonal ops.
    packed: whether rows hold several documents and padding.
  """

  T: int
  K: int = K
  V: int = V
  D: int = D
  N: int = N
  packed: bool = False

  @property
  def name(self) -> str:
    sizes = {letter: getattr(self, letter) for letter in "KVDN"}
    usual = {"K": K, "V": V, "D": D, "N": N}
    unusual = [f"{letter}{size}" for letter, size in sizes.items() if size != usual[letter]]
    return " ".join([f"T{self.T}", *unusual, *["packed"] * self.packed])


def documents(T: int) -> np.ndarray:
  """int32 [B T] segment ids: padding on the left, inside and between, and on the right."""
  rng = np.random.default_rng(T)
  lengths = rng.integers(1, max(2, T // 3) + 1, size=(B, T))
  ids = np.stack([np.repeat(rng.integers(0, 3, T), row)[:T] for row in lengths])
  ids[0, : T // 8] = -1
  ids[0, rng.random(T) < 0.1] = -2
  ids[1, T - T // 6 :] = -1
  return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """An op as the doctor knows it.

  Attributes:
    name: what --op calls it.
    op, oracle: the same arguments, by name.
    draw: (family, rng, shape) -> float64 or complex128 arrays by argument, without the state.
    state: () -> the shape of the initial state for a `Shape`.
    traits: which families concern it.
    lengths: what it is compiled for.
    wide: likewise, for kernels, whose tiles ask for whole widths.
    query: the argument that samples the size of the terms of gradients, see `doctor_limits.py`.
    factors: for gates: argument -> how much larger the terms of its gradient are, of the arrays.
  """

  name: str
  op: Callable
  oracle: Callable
  draw: Callable[[Family, np.random.Generator, Shape], dict[str, np.ndarray]]
  state: Callable[[Shape], tuple[int, ...]]
  traits: frozenset[str]
  lengths: tuple[Shape, ...]
  query: str | None = None
  factors: dict[str, Callable[[dict], float]] = dataclasses.field(default_factory=dict)
  is_complex: bool = False
  wide: tuple[Shape, ...] = ()

  def families(self) -> list[Family]:
    return [family for family in FAMILIES if family.concerns in self.traits]

  def shapes(self, dtype: str, implementation: str) -> tuple[Shape, ...]:
    """Every length in float32; in bfloat16 the longest, in float64 packed documents; the wide ones
    for kernels."""
    possible = [
      shape for shape in self.lengths if implementation != "parallel" or shape.T <= LONGEST_PARALLEL
    ]
    if dtype == "float64":
      return tuple(shape for shape in possible if shape.packed)
    wide = self.wide if implementation == "pallas" else ()
    return (*(possible if dtype == "float32" else possible[-1:]), *wide)

  def inputs(self, family: Family, shape: Shape) -> dict[str, np.ndarray]:
    """Every array argument of one family, in float64 or complex128."""
    rng = np.random.default_rng([shape.T, shape.K, *family.name.encode()])
    arrays = self.draw(family, rng, shape)
    state = family.state * rng.normal(size=self.state(shape))
    if self.is_complex:
      state = state * np.exp(1j * rng.uniform(-3.0, 3.0, size=state.shape))
    return {**arrays, "initial_state": state}


def _scan(family, rng, shape):
  size = (B, shape.T, shape.D)
  return {
    "a": np.exp(gates(family.gate, rng, size)),
    "b": values(family.value, rng, size),
  }


def _complex_scan(family, rng, shape):
  arrays = _scan(family, rng, shape)
  turn = lambda: np.exp(1j * rng.uniform(-3.0, 3.0, size=(B, shape.T, shape.D)))
  return {name: x * turn() for name, x in arrays.items()}


def _steps(family, rng, size):
  """Step sizes dt [B T D or H] and inputs that they do not make large: dt x is of the size of 1."""
  dt = -gates(family.gate, rng, size)
  return dt, values(family.value, rng, size) / np.maximum(dt, 1.0)


def _selective(family, rng, shape):
  dt, x = _steps(family, rng, (B, shape.T, shape.D))
  return {
    "x": x,
    "dt": dt,
    "A": -np.exp(rng.uniform(-2.0, 1.0, size=(shape.D, shape.N))),
    "B": values("random", rng, (B, shape.T, shape.N)),
    "C": values("random", rng, (B, shape.T, shape.N)),
    "D": rng.normal(size=shape.D),
  }


def _conv(family, rng, shape):
  x = values(family.value, rng, (B, shape.T, shape.D))
  return {"x": x, "weight": rng.normal(size=(W, shape.D)), "bias": rng.normal(size=shape.D)}


def _attention(family, rng, shape, *, gate: str | None = None, delta: bool = False):
  """Arguments of `linear_attention`'s fronts; `gate` is "head", "channel" or "constant"."""
  heads = (B, shape.T, HQ, shape.K)
  arrays = {
    "q": values(family.query, rng, heads),
    "k": keys(family.key, rng, heads, unit=delta),
    "v": values(family.value, rng, (B, shape.T, H, shape.V)),
  }
  if gate == "constant":
    arrays["g"] = gates(family.gate, rng, (1, 1, H))[0, 0]
  elif gate is not None:
    size = (B, shape.T, H, shape.K) if gate == "channel" else (B, shape.T, H)
    arrays["g"] = gates(family.gate, rng, size)
  if delta:
    arrays["beta"] = betas(family.beta, rng, (B, shape.T, H))
  return arrays


def _ssd(family, rng, shape):
  groups = (B, shape.T, HQ, shape.K)
  A = -np.exp(rng.uniform(-1.0, 1.0, size=H))
  dt = gates(family.gate, rng, (B, shape.T, H)) / A
  x = values(family.value, rng, (B, shape.T, H, shape.V)) / np.maximum(dt, 1.0)[..., None]
  return {
    "x": x,
    "dt": dt,
    "A": A,
    "B": keys(family.key, rng, groups, unit=False),
    "C": values(family.query, rng, groups),
    "D": rng.normal(size=H),
  }


def _plstm(family, rng, shape):
  """Transitions of either sign, as far from 1 as the family's decays."""
  heads, size = (B, shape.T, H, shape.K), (B, shape.T, H)
  return {
    "q": values(family.query, rng, heads),
    "k": keys(family.key, rng, heads, unit=False),
    "v": values(family.value, rng, (B, shape.T, H, shape.V)),
    "source": rng.uniform(0.0, 1.0, size=size),
    "transition": np.exp(gates(family.gate, rng, size)) * np.where(rng.random(size) < 0.3, -1, 1),
    "mark": rng.uniform(0.0, 1.0, size=size),
    "direct": rng.uniform(0.0, 1.0, size=size),
  }


def _attention_oracle(q, k, v, g=None, beta=None, **options):
  if g is not None and g.ndim == 1:
    g = jnp.broadcast_to(g, v.shape[:3])
  return reference.linear_attention(q, k, v, log_decay=g, beta=beta, **options)


_matrix_state = lambda shape: (B, H, shape.K, shape.V)
_channels = lambda shape: (B, shape.D)
_PACKED = Shape(17, packed=True)
# Every pair of widths that there are kernels for, at lengths that end within a chunk.
_WIDE = (
  Shape(257, K=128, V=128),
  Shape(65, K=64, V=128, packed=True),
  Shape(191, K=128, V=64),
  Shape(1, K=64, V=64),
)


def _front(name, traits, lengths, *, gate=None, delta=False, **others) -> Subject:
  short, packed, long = lengths
  details = {
    "op": getattr(ops, name),
    "oracle": _attention_oracle,
    "draw": functools.partial(_attention, gate=gate, delta=delta),
    "query": "q",
    "factors": {"g": _per_head if gate == "head" else lambda arrays: 1.0} if gate else {},
    **others,
  }
  return Subject(
    name=name,
    state=_matrix_state,
    traits=frozenset({"value", "key", *traits}),
    lengths=(Shape(1), Shape(short, K=1), Shape(packed, packed=True), Shape(long)),
    **{"wide": _WIDE, **details},
  )


def _per_head(arrays):
  """A gate of a whole head sums terms of K channels."""
  return np.sqrt(arrays["initial_state"].shape[2])


def _of_all_tokens(arrays):
  """A number for all tokens sums terms of each."""
  return np.sqrt(B * arrays["dt" if "dt" in arrays else "v"].shape[1])


_DECAY = ("gate", "gate over time", "key and gate")
SUBJECTS = (
  Subject(
    "linear_scan", ops.linear_scan, reference.linear_scan, _scan, _channels,
    frozenset({"value", "gate", "gate over time"}),
    (Shape(1), Shape(16), Shape(63), Shape(127), _PACKED, Shape(1000)),
    wide=(Shape(1000, D=136), Shape(65, D=64, packed=True), Shape(1, D=8)),
  ),
  Subject(
    "linear_scan_complex", ops.linear_scan, reference.linear_scan, _complex_scan,
    _channels, frozenset({"value", "gate", "gate over time"}),
    (Shape(15), Shape(64), _PACKED, Shape(257)), is_complex=True,
  ),
  Subject(
    "selective_scan", ops.selective_scan, reference.selective_scan, _selective,
    lambda shape: (B, shape.D, shape.N), frozenset({"value", "gate", "gate over time"}),
    (Shape(1), _PACKED, Shape(65), Shape(1000)),
    wide=(Shape(333, D=192, N=16), Shape(65, D=128, N=16, packed=True), Shape(1, D=128, N=16)),
  ),
  Subject(
    "causal_conv", ops.causal_conv, reference.causal_conv, _conv, lambda shape: (B, W - 1, shape.D),
    frozenset({"value"}),
    (*(Shape(T) for T in (1, 15, 16, 17, 63, 64, 65, 127, 257)), _PACKED, Shape(1000)),
  ),
  _front("linear_attention", (), (15, 63, 127)),
  _front("retention", ("gate",), (16, 64, 257), gate="constant",
         factors={"g": lambda x: _per_head(x) * _of_all_tokens(x)}),
  _front("ssd", _DECAY, (17, 65, 1000), draw=_ssd, oracle=reference.ssd, query="C",
         factors={"dt": lambda x: _per_head(x) * np.abs(x["A"]).max(),
                  "A": lambda x: _per_head(x) * x["dt"].max() * _of_all_tokens(x)}),
  _front("gla", (*_DECAY, "gate over channels"), (15, 65, 257), gate="channel"),
  _front("delta_rule", ("beta",), (16, 63, 257), delta=True),
  _front("gated_delta_rule", (*_DECAY, "beta"), (17, 65, 1000), gate="head", delta=True),
  _front("kda", (*_DECAY, "gate over channels", "beta"), (16, 64, 257), gate="channel", delta=True),
  _front("plstm_1d", _DECAY, (17, 65, 1000), draw=_plstm, oracle=reference.plstm_1d, wide=(),
         factors=dict.fromkeys(("source", "transition", "mark", "direct"), _per_head)),
)  # fmt: skip
