"""pLSTM on grids: source, transition and mark gates carry states over the edges between tokens.
Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks", 2025.

    C_right = T_rl C_left + T_ru C_up + S_r k v^T        the states that leave a token; its in-edges
    C_down  = T_dl C_left + T_du C_up + S_d k v^T        come from the left and from above
    o = K^-1/2 q^T (M_l C_left + M_u C_up + D k v^T),    summed over four orientations of the grid
    y = W_o norm(o)                                      a root mean square norm over each head

With m, s, g and a = sigmoid(.) gates of the token, for each head and orientation:

    mode "P", propagation:   T = g [[a, a], [1-a, 1-a]],  S = s (a, 1-a),  M = (m, m)
    mode "D", distribution:  T = [[g_r, g_turn], [0, g_d]],  S = (s_r, s_d),  M = (m_l, m_u)

P sends everything in a direction of its own, dx / dy = a / (1-a): with |g| <= 1 no column of T sums
to more than 1, so that nothing grows on a grid of any size. D allows one turn only, so that one
path leads from any token to another and |g| <= 1 is enough. Each layer sows the quantity by which
its mode is bounded as a metric: `largest_column_sum` of |T| (P), `largest_transition` (D).

Departures from the published code: `pmode="paper"`, the default, is the paper's equation above;
the code computes S = (a s, 1 - a s) and T = [[a g, a g], [1 - a g, 1 - a g]], whose columns sum to
as much as 3 where g < 0. That is `pmode="published"`, with g clamped to [0, 1] unless `unsafe`. Its
initial gates are source_bias = mark_bias = -4, direct_bias = -6, transition_scale = 5,
angle_spread = 2 and gate_scale = 0, from which learning starts late; the defaults here are not
saturated, and not constant. The weights in a are not divided by 2 D.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import ops
from lm_models import grid_layers, layers, recurrent_layers
from lm_models.grid_layers import fan_in_init, out_init

ORIENTATIONS = 4
MODES = {"P": "merged", "D": "separable"}  # and what the op is promised about transitions
GATE_ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "identity": lambda x: x}
TRANSITION_ACTIVATIONS = {
  "tanh": jnp.tanh,
  "squared_tanh": lambda x: jnp.tanh(x) ** 2,
  "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """One pLSTM mixer on a grid of tokens."""

  D: int = 192  # model width
  L: int = 12  # blocks in the whole model; the output projection starts smaller by sqrt(2 L)
  H: int = 3  # heads of width D / H
  mode: str = "P"  # P (propagation) or D (distribution)
  pmode: str = "paper"  # of mode P: paper (bounded), or published (as the authors' code)
  unsafe: bool = (
    False  # leaves the published form's transitions below 0 as they are: it may explode
  )
  block_diagonal: bool = False  # q, k and v of a head see only the D / H channels of that head
  gate_inputs: str = "slice"  # what S, T, M and a see: slice (D / 4H channels each), all or none
  direct_inputs: str = "none"  # what D sees: slice (D / H channels), all or none
  gate_activation: str = "sigmoid"  # of S, M and D: sigmoid, tanh or identity
  transition_activation: str = "tanh"  # of g: tanh, squared_tanh or sigmoid
  source_bias: float = -1.0  # initial bias of S
  mark_bias: float = -1.0  # initial bias of M
  direct_bias: float = -1.0  # initial bias of D
  transition_bias: float = 1.0  # initial bias of g, mean over heads
  transition_spread: float = 0.0  # g's biases of heads lie this far about their mean
  transition_scale: float = 2.0  # multiplies g before its activation
  angle_spread: float = 1.5  # a's biases of heads lie this far about 0
  init_variance: float = 0.4  # of the initial weights, in multiples of 1 / inputs
  gate_scale: float = 0.1  # initial weights of gates, in multiples of the others
  W: int = 0  # side of a depthwise convolution before q, k and gates, tokens, odd; 0 leaves it out
  passthrough: bool = False  # adds what q, k and gates see to the normed output, by learnt scales
  norm_epsilon: float = 1e-5  # of the norm of the output
  implementation: str | None = None  # of the op; None chooses
  chunk_size: int | None = None  # side of a block of the op, tokens; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "chunk_size")
    layers.check_at_least(self, 0, "W")
    check = recurrent_layers.check_choice
    check(self, "mode", MODES)
    if self.implementation is not None:
      check(
        self, "implementation", ("recurrent", "wavefront", "chunked", "parallel", MODES[self.mode])
      )
    check(self, "pmode", ("paper", "published"))
    check(self, "gate_activation", GATE_ACTIVATIONS)
    check(self, "transition_activation", TRANSITION_ACTIVATIONS)
    check(self, "gate_inputs", ("slice", "all", "none"))
    check(self, "direct_inputs", ("slice", "all", "none"))
    if self.D % self.H:
      raise ValueError(f"H is {self.H}, must divide D = {self.D}")
    if self.gate_inputs == "slice" and self.D % (ORIENTATIONS * self.H):
      raise ValueError(
        f"gate_inputs is 'slice', for which 4 H = {ORIENTATIONS * self.H} must divide D = {self.D}"
      )
    if self.W and self.W % 2 == 0:
      raise ValueError(f"W is {self.W}, must be odd, or 0 for no convolution")

  @property
  def gates(self) -> dict[str, int]:
    """How many numbers each gate with an orientation has."""
    if self.mode == "P":
      return {"source": 1, "transition": 1, "mark": 1, "angle": 1}
    return {"source": 2, "transition": 3, "mark": 2}


def flops(config: Config, Y: int, X: int) -> float:
  """Floating-point operations of the mixer, forward, for a grid of Y rows and X columns.

  The gates' products and the recurrence are counted as the mathematics needs them: a gate reads its
  own channels, and a head's states are carried from token to token.
  """
  c = config
  K = c.D // c.H
  channels = {"slice": K / ORIENTATIONS, "all": c.D, "none": 0}
  gates = ORIENTATIONS * c.H * channels[c.gate_inputs] * sum(c.gates.values())
  gates += {**channels, "slice": K}[c.direct_inputs] * c.H
  matrices = c.D * (3 * (K if c.block_diagonal else c.D) + c.D) + c.W**2 * c.D + gates
  # States of K by K: P adds two, passes the sum on twice, writes twice and reads once; D passes
  # three on, adds two of them, writes twice and reads both.
  state = {"P": 1 + 2 + 4 + 3, "D": 3 + 1 + 4 + 5}[c.mode]
  return Y * X * (2.0 * matrices + ORIENTATIONS * c.H * K**2 * state)


class Gate(nn.Module):
  """b + W x for each orientation and head, float32: a gate before its activation.

  `inputs` is "slice" (each orientation and head sees its own part of the channels), "all" or "none"
  (a constant).
  """

  bias: tuple[float, ...]  # initial, for each head
  outputs: int
  inputs: str
  deviation: float  # of the initial weights, times the root of how many inputs there are
  orientations: int = ORIENTATIONS
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X O H outputs"]:
    O, H, D = self.orientations, len(self.bias), x.shape[-1]
    start = lambda key, shape: jnp.broadcast_to(jnp.asarray(self.bias)[:, None], shape)
    y = self.param("bias", start, (O, H, self.outputs))
    if self.inputs != "none":
      y = y + self._weigh(x, O, H, D)
    return jnp.broadcast_to(y, (*x.shape[:3], O, H, self.outputs))

  def _weigh(self, x, O, H, D):
    wide = jnp.promote_types(self.dtype, jnp.float32)
    if self.inputs == "all":
      init = nn.initializers.normal(self.deviation * D**-0.5)
      kernel = self.param("kernel", init, (D, O, H, self.outputs)).astype(self.dtype)
    else:
      parts = O * H
      init = nn.initializers.normal(self.deviation * (parts / D) ** 0.5)
      kernel = self.param("kernel", init, (O, H, D // parts, self.outputs)).astype(self.dtype)
      # One product with a matrix of blocks is faster than many products with few channels each.
      kernel = kernel.reshape(parts, -1, 1, self.outputs) * jnp.eye(parts)[:, None, :, None]
      kernel = kernel.reshape(D, O, H, self.outputs).astype(self.dtype)
    return layers.product(x.astype(self.dtype), kernel, dtype=wide)


def transitions_p(
  pmode: str, unsafe: bool, s: Array, g: Array, a: Array
) -> tuple[Float[Array, "B Y X O H 2"], Float[Array, "B Y X O H 2 2"]]:
  """Sources and transitions of mode P from s, g and a, [B Y X O H 1] each."""
  if pmode == "published":
    g = g if unsafe else jnp.clip(g, 0.0, 1.0)
    source = jnp.concatenate([a * s, 1 - a * s], axis=-1)
    passed = jnp.concatenate([a * g, 1 - a * g], axis=-1)
  else:
    share = jnp.concatenate([a, 1 - a], axis=-1)
    source, passed = share * s, share * g
  return source, jnp.broadcast_to(passed[..., None], (*passed.shape, 2))


def transitions_d(g: Float[Array, "B Y X O H 3"]) -> Float[Array, "B Y X O H 2 2"]:
  """Transitions of mode D: g from left to right, from up to down, and the turn, up to right."""
  right, down, turn = jnp.moveaxis(g, -1, 0)
  rows = [jnp.stack([right, turn], axis=-1), jnp.stack([jnp.zeros_like(down), down], axis=-1)]
  return jnp.stack(rows, axis=-2)


class Mixer(nn.Module):
  """The block's mixer: `y = Mixer(config).apply(params, x)` on a grid of tokens of any size."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    c = self.config
    seen = grid_layers.GridConv(c.W, c.dtype, name="conv")(x) if c.W else x
    q, k, v = (
      self._project(name, y) for name, y in zip(("query", "key", "value"), (seen, seen, x))
    )
    gates = self._gates(seen)
    o, _ = ops.plstm_2d(
      q, k, v, *gates, structure=MODES[c.mode], implementation=c.implementation,
      chunk_size=c.chunk_size,
    )  # fmt: skip
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, scale_axes=2, name="norm")(o)
    y = y.reshape(x.shape)
    if c.passthrough:
      y = y + self.param("skip", nn.initializers.ones, (c.D,)).astype(c.dtype) * seen
    return layers.Projection(
      c.D, dtype=c.dtype, kernel_init=out_init(c.L, c.init_variance), name="out_proj"
    )(y)

  def _project(self, name, x):
    c = self.config
    if c.block_diagonal:
      return grid_layers.HeadProjection(c.H, c.init_variance, c.dtype, name=f"{name}_heads")(x)
    size = (c.H, c.D // c.H)
    options = {"bias": True, "dtype": c.dtype, "kernel_init": fan_in_init(c.init_variance)}
    return layers.Projection(size, name=f"{name}_proj", **options)(x)

  def _gates(self, x):
    """Source, transition, mark and direct gates as the op takes them."""
    c = self.config
    spread = lambda mean, width: tuple(
      map(float, mean + (np.linspace(-width, width, c.H) if c.H > 1 else np.zeros(1)))
    )
    bias = {
      "source": spread(c.source_bias, 0),
      "transition": spread(c.transition_bias, c.transition_spread),
      "mark": spread(c.mark_bias, 0),
      "angle": spread(0, c.angle_spread),
    }
    deviation = c.gate_scale * c.init_variance**0.5
    make = functools.partial(Gate, deviation=deviation, dtype=c.dtype)
    gate = {
      name: make(bias[name], outputs, c.gate_inputs, name=f"{name}_gate")(x)
      for name, outputs in c.gates.items()
    }
    bias, inputs = spread(c.direct_bias, 0), c.direct_inputs
    direct = make(bias, 1, inputs, orientations=1, name="direct_gate")(x)[..., 0, :, 0]
    act: Callable = GATE_ACTIVATIONS[c.gate_activation]
    s, m, direct = act(gate["source"]), act(gate["mark"]), act(direct)
    g = TRANSITION_ACTIVATIONS[c.transition_activation](c.transition_scale * gate["transition"])
    if c.mode == "P":
      s, transition = transitions_p(c.pmode, c.unsafe, s, g, jax.nn.sigmoid(gate["angle"]))
      self._watch("largest_column_sum", ops.largest_column_sum(transition))
    else:
      transition = transitions_d(g)
      self._watch("largest_transition", jnp.max(jnp.abs(transition)))
    return s, transition, jnp.broadcast_to(m, s.shape), direct

  def _watch(self, name, x):
    self.sow("metrics", name, x, reduce_fn=jnp.maximum, init_fn=lambda: jnp.zeros(()))
