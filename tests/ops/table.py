"""The table of ops. A new op gets every law of `test_laws.py` by adding a row here."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import ops
from ops import reference

# Decay rates per token (nats), one per channel: from no decay at all to all gone in one token.
RATES = np.array([0.0, 1e-3, 0.05, 1.0, 20.0, 50.0])

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 257, 1000)  # tokens
FEW_LENGTHS = (1, 17, 1000)  # for a loop over tokens, and for what shares its code with another row
SHORT_LENGTHS = (1, 17, 127)  # for scores of all pairs


@dataclass(frozen=True, eq=False)
class Row:
  name: str
  op: Callable
  step: Callable  # step(state, one token's inputs, the other inputs) -> o, state
  oracle: Callable
  implementations: tuple[str, ...]
  shapes: dict[str, str]  # argument -> letters; a letter T marks what has a time axis
  sizes: dict[str, int]
  draw: dict[str, Callable] = field(default_factory=dict)  # argument -> draw(rng, shape)
  carries: str = "x"  # the argument that an output can take the place of
  lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by implementation
  chunked: bool = True  # takes chunk_size
  is_complex: bool = False

  def inputs(self, B: int, T: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Every array argument in float64 or complex128, `initial_state` included."""
    rng = np.random.default_rng(seed)
    normal = lambda rng, shape: rng.normal(size=shape)
    sizes = {**self.sizes, "B": B, "T": T}
    return {
      name: self.draw.get(name, normal)(rng, tuple(sizes[letter] for letter in letters.split()))
      for name, letters in self.shapes.items()
    }

  def short_chunks(self, implementation: str) -> dict:
    """Options for laws in which several chunks matter, not their size: short ones compile fast."""
    chunked = self.chunked and implementation == "chunked"
    return {"implementation": implementation, **({"chunk_size": 4} if chunked else {})}

  def lengths_of(self, implementation: str) -> tuple[int, ...]:
    return self.lengths.get(implementation, LENGTHS)

  def tokens(self) -> list[str]:
    return [name for name, letters in self.shapes.items() if "T" in letters.split()]


def _decays(rng, shape):
  return np.exp(-RATES * rng.uniform(0.5, 1.5, size=shape))


def _rotations(rng, shape):
  return _decays(rng, shape) * np.exp(1j * rng.uniform(-3.0, 3.0, size=shape))


def _complex_normal(rng, shape):
  return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def _unit(rng, shape):
  x = rng.normal(size=shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _log_decays(rng, shape):
  return -rng.permuted(np.resize(RATES, shape), axis=1) * rng.uniform(0.5, 1.5, size=shape)


def _transitions(rng, shape):
  """Of any sign, and zero: matrices of a norm near 1 where there are two axes of copies."""
  if len(shape) == 3:
    return rng.choice([-1.0, -0.5, 0.0, 0.3, 1.0], size=shape)
  none = rng.choice([0.0, 1.0], p=[0.2, 0.8], size=(*shape[:3], 1, 1))
  return none * rng.normal(size=shape) / (2 * shape[-1] ** 0.5)


def _selective_step(state, token, others):
  skip = {name: others[name] for name in ("A", "D")}
  return ops.selective_scan_step(state, **token, **skip)


_scan = dict(
  op=ops.linear_scan,
  step=lambda state, token, others: ops.linear_scan_step(state, **token),
  oracle=reference.linear_scan,
  implementations=("recurrent", "parallel", "chunked"),
  shapes={"a": "B T D", "b": "B T D", "initial_state": "B D"},
  sizes={"D": 6},
  carries="b",
)

_plstm = dict(
  op=ops.plstm_1d,
  step=lambda state, token, others: ops.plstm_1d_step(state, **token),
  oracle=reference.plstm_1d,
  carries="v",
  draw={"transition": _transitions},
)

ROWS = [
  Row("linear_scan", draw={"a": _decays}, lengths={"recurrent": FEW_LENGTHS}, **_scan),
  Row(
    "linear_scan_complex",
    draw={"a": _rotations, "b": _complex_normal, "initial_state": _complex_normal},
    lengths=dict.fromkeys(_scan["implementations"], FEW_LENGTHS),
    is_complex=True,
    **_scan,
  ),
  Row(
    "selective_scan",
    op=ops.selective_scan,
    step=_selective_step,
    oracle=reference.selective_scan,
    implementations=("recurrent", "parallel", "chunked"),
    shapes={
      "x": "B T D",
      "dt": "B T D",
      "A": "D N",
      "B": "B T N",
      "C": "B T N",
      "D": "D",
      "initial_state": "B D N",
    },
    sizes={"D": 4, "N": 6},
    lengths={"recurrent": FEW_LENGTHS},
    draw={
      "dt": lambda rng, shape: rng.uniform(0.5, 1.5, size=shape),
      "A": lambda rng, shape: -RATES * rng.uniform(0.9, 1.1, size=shape),
    },
  ),
  Row(
    "causal_conv",
    op=ops.causal_conv,
    step=lambda state, token, others: ops.causal_conv_step(
      state, token["x"], others["weight"], others["bias"]
    ),
    oracle=reference.causal_conv,
    implementations=("recurrent", "parallel"),
    shapes={"x": "B T D", "weight": "W D", "bias": "D", "initial_state": "B S D"},
    sizes={"D": 6, "W": 4, "S": 3},
    lengths={"recurrent": FEW_LENGTHS},
    chunked=False,
  ),
  # The fronts of `linear_attention` share their code: among these rows are a decay of either kind,
  # the delta rule, heads that share a key, and every implementation, once.
  Row(
    "ssd",
    op=ops.ssd,
    step=lambda state, token, others: ops.ssd_step(state, **token, A=others["A"], D=others["D"]),
    oracle=reference.ssd,
    implementations=("chunked",),
    shapes={
      "x": "B T H V",
      "dt": "B T H",
      "A": "H",
      "B": "B T G N",
      "C": "B T G N",
      "D": "H",
      "initial_state": "B H N V",
    },
    sizes={"H": 4, "G": 2, "N": 3, "V": 5},
    lengths={"chunked": FEW_LENGTHS},
    draw={
      "dt": lambda rng, shape: rng.uniform(0.0, 2.0, size=shape),
      "A": lambda rng, shape: -np.array([1e-3, 0.05, 1.0, 20.0]),
    },
  ),
  Row(
    "gla",
    op=ops.gla,
    step=lambda state, token, others: ops.gla_step(state, **token),
    oracle=lambda q, k, v, g, **options: reference.linear_attention(
      q, k, v, log_decay=g, **options
    ),
    implementations=("chunked",),
    shapes={
      "q": "B T Hq K",
      "k": "B T Hq K",
      "v": "B T H V",
      "g": "B T H K",
      "initial_state": "B H K V",
    },
    sizes={"H": 4, "Hq": 2, "K": 5, "V": 3},
    carries="v",
    draw={"g": _log_decays},
  ),
  Row(
    "gated_delta_rule",
    op=ops.gated_delta_rule,
    step=lambda state, token, others: ops.gated_delta_rule_step(state, **token),
    oracle=lambda q, k, v, g, beta, **options: reference.linear_attention(
      q, k, v, log_decay=g, beta=beta, **options
    ),
    implementations=("recurrent", "parallel", "chunked"),
    shapes={
      "q": "B T Hq K",
      "k": "B T Hq K",
      "v": "B T H V",
      "g": "B T H",
      "beta": "B T H",
      "initial_state": "B H K V",
    },
    sizes={"H": 4, "Hq": 2, "K": 4, "V": 6},
    carries="v",
    lengths={"recurrent": FEW_LENGTHS, "parallel": SHORT_LENGTHS},
    draw={
      "q": _unit,
      "k": _unit,
      "g": _log_decays,
      "beta": lambda rng, shape: rng.uniform(0.0, 2.0, size=shape),
    },
  ),
  Row(
    "plstm_1d",
    implementations=("chunked",),
    shapes={
      "q": "B T H K",
      "k": "B T H K",
      "v": "B T H V",
      "source": "B T H",
      "transition": "B T H",
      "mark": "B T H",
      "direct": "B T H",
      "initial_state": "B H K V",
    },
    sizes={"H": 2, "K": 3, "V": 4},
    lengths={"chunked": FEW_LENGTHS},
    **_plstm,
  ),
  Row(
    "plstm_1d_tracking",
    implementations=("chunked",),
    shapes={
      "q": "B T H K Jq",
      "k": "B T H K Jk",
      "v": "B T H V Jv",
      "source": "B T H J Jk Jv",
      "transition": "B T H J J",
      "mark": "B T H Jv Jq J",  # as many outputs as values, to take their place
      "direct": "B T H Jv Jq Jk Jv",
      "initial_state": "B H K V J",
    },
    sizes={"H": 2, "K": 3, "V": 4, "J": 3, "Jq": 2, "Jk": 1, "Jv": 2},
    lengths={"chunked": (257,)},
    **_plstm,
  ),
]


def cases(*, chunked_only: bool = False) -> list[tuple[Row, str]]:
  """Every row with each of its implementations."""
  return [
    (row, implementation)
    for row in ROWS
    for implementation in row.implementations
    if not chunked_only or (row.chunked and implementation == "chunked")
  ]


def case_name(value) -> str | None:
  return value.name if isinstance(value, Row) else None
