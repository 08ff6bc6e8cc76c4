"""pLSTM on a sequence: a matrix state whose transitions may turn its sign, and track states.
Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks", 2025.

    u = conv(x),   q, k = W u + b,   v = W x + b                     heads of width P = D / H
    S, M, D = act(b + W u),   T = tanh(5 (b + W u))                  one number for each head
    o_t = K^-1/2 (M_t C_t^T q_t + D_t (q_t . k_t) v_t),   C_{t+1} = T_t C_t + S_t k_t v_t^T
    y = W_o (norm(o) + skip u)                     a root mean square norm, a scale for each head

A state passes from token to token; a token reads it before it writes. With J > 1 there is state
tracking: C has J copies, v and o are J vectors of width P / J, S and M are matrices [J J] between
them and the copies, D between v and o, and

    T = U diag(tanh(5 (b + W u))) U',    U, U' orthogonal [J J], of a token each

by Cayley's map (1 - A)^-1 (1 + A) of A = X - X^T, X = b + W u: no norm exceeds 1.

Weights of q, k, v and y start from N(0, 2 / (5 fan_in)), those of y smaller by sqrt(2 L).

Departures from the published code: J is 1, not 4, unless configured; gates see all channels; they
start neither saturated nor constant (the published start, from which learning begins late, is
source_bias = mark_bias = direct_bias = -5, transition_bias = 1, gate_std = 0); U and U' are
orthogonal to the last digit, where a truncated series of the exponential is not; T's alternatives,
powers of a sigmoid, are left out.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers
from lm_models.grid_layers import out_init, small_init
from ops.segments import where_mask

GATE_ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "identity": lambda x: x}
TRANSITION_ACTIVATIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class Config:
  """One pLSTM block, followed by a gated MLP."""

  D: int = 768  # model width
  L: int = 12  # blocks in the whole model
  H: int = 4  # heads
  K: int | None = None  # width of a head of q and k; None is D / H
  J: int = 1  # copies of the state that transitions mix; 1 is a number for each head
  W: int = 4  # width of the convolution before gates, q and k, tokens; 0 leaves it out
  gate_activation: str = "sigmoid"  # of S, M and D: sigmoid, tanh or identity
  transition_activation: str = "tanh"  # of T: tanh (of any sign) or sigmoid (decays only)
  transition_scale: float = 5.0  # multiplies T before its activation
  source_bias: float = -1.0  # initial bias of S
  mark_bias: float = -1.0  # initial bias of M
  direct_bias: float = -1.0  # initial bias of D
  transition_bias: float = 0.4  # initial bias of T, mean over heads
  transition_spread: float = 0.0  # T's biases of heads lie this far about their mean
  gate_std: float = 0.02  # of the initial weights of gates
  passthrough: bool = True  # adds what gates see to the normed output, by a learnt scale
  norm_epsilon: float = 1e-5  # of the norm of the output
  mlp_width: int | None = None  # width of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "K", "J", "chunk_size")
    layers.check_at_least(self, 0, "W", "gate_std", "mlp_width")
    recurrent_layers.check_implementation(self)
    recurrent_layers.check_choice(self, "gate_activation", GATE_ACTIVATIONS)
    recurrent_layers.check_choice(self, "transition_activation", TRANSITION_ACTIVATIONS)
    if self.D % (self.H * self.J):
      raise ValueError(f"H is {self.H}, H J = {self.H * self.J} must divide D = {self.D}")

  @property
  def state_shape(self) -> tuple[int, ...]:
    """Of one row's memory: [H K V], or [H K V J] with state tracking."""
    V = self.D // self.H // self.J
    return (self.H, self.K or self.D // self.H, V, *self.copies)

  @property
  def copies(self) -> tuple[int, ...]:
    """The axis of copies, where there is one."""
    return (self.J,) if self.J > 1 else ()

  @property
  def gates(self) -> dict[str, int]:
    """How many numbers each gate of a head is made of."""
    J = self.J
    gates = {"source": J * J, "transition": J, "mark": J * J, "direct": J * J}
    return {**gates, "rotation": 2 * J * J} if J > 1 else gates


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolution's last inputs and each head's memory, zeros."""
  return {
    **recurrent_layers.conv_state(config, batch, {"input": config.D}),
    "memory": jnp.zeros((batch, *config.state_shape), jnp.float32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, whatever the length T."""
  (H, K, V), J = config.state_shape[:3], config.J
  matrices = config.D * (2 * H * K + 2 * config.D + H * sum(config.gates.values()))
  # Of each copy of a state: mixed with the others, written and read.
  mixing = 2 * J if J > 1 else 1
  return 2 * (matrices + config.W * config.D) + H * K * V * J * (mixing + 4.0)


def orthogonal(x: Float[Array, "*n J J"]) -> Float[Array, "*n J J"]:
  """Cayley's map (1 - A)^-1 (1 + A) of A = x - x^T.

  Elimination needs no pivots: the symmetric part of 1 - A is the identity.
  """
  J = x.shape[-1]
  A = x - jnp.swapaxes(x, -1, -2)
  eye = jnp.eye(J, dtype=x.dtype)
  rows = jnp.concatenate([eye - A, eye + A], axis=-1)  # reduced to [1, (1 - A)^-1 (1 + A)]
  for i in range(J):
    pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
    others = rows[..., i : i + 1] * (jnp.arange(J) != i)[:, None]
    rows = jnp.where((jnp.arange(J) == i)[:, None], pivot, rows - others * pivot)
  return rows[..., J:]


class Gate(nn.Module):
  """b + W x for each head, float32: a gate before its activation. Its n numbers are alike at first
  but for the weights, unless `bias_std` is above zero."""

  n: int
  bias: tuple[float, ...]  # initial, for each head
  std: float  # of the initial weights
  bias_std: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H n"]:
    size = (len(self.bias), self.n)

    def start(key, shape):
      noise = self.bias_std * jax.random.normal(key, shape)
      return jnp.asarray(self.bias)[:, None] + noise

    kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], *size))
    bias = self.param("bias", start, size)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return layers.product(x.astype(self.dtype), kernel.astype(self.dtype), dtype=wide) + bias


class Mixer(nn.Module):
  """The block's mixer: `y, state = Mixer(config).apply(params, x, state, segment_ids)`."""

  config: Config

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    state: dict[str, Array] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    c, state = self.config, state or {}
    H, K, V = c.state_shape[:3]
    conv_state = {}
    seen = x if segment_ids is None else where_mask(segment_ids >= 0, x)
    if c.W:
      uniform = lambda key, shape: c.W**-0.5 * jax.random.uniform(key, shape, minval=-1)
      conv = recurrent_layers.ShortConv(c.W, c.dtype, uniform, name="input_conv")
      seen, conv_state["input_conv"] = conv(x.astype(c.dtype), state.get("input_conv"), segment_ids)
    project = lambda name, size: layers.Projection(
      size, bias=True, dtype=c.dtype, kernel_init=small_init, name=name
    )
    q, k = (project(name, (H, K))(seen) for name in ("query_proj", "key_proj"))
    v = project("value_proj", (H, c.D // H))(x)
    tracking = c.J > 1
    if tracking:
      q, k, v = q[..., None], k[..., None], v.reshape(*v.shape[:3], V, c.J)
    o, memory = ops.plstm_1d(
      q, k, v, *self._gates(seen), initial_state=state.get("memory"), segment_ids=segment_ids,
      implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip
    y = o.reshape(*o.shape[:3], -1)
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, scale_axes=2, name="norm")(y).reshape(x.shape)
    if c.passthrough:
      y = y + self.param("skip", nn.initializers.ones, (c.D,)).astype(c.dtype) * seen
    out = layers.Projection(c.D, dtype=c.dtype, kernel_init=out_init(c.L), name="out_proj")
    return out(y), {**conv_state, "memory": memory}

  def _gates(self, x):
    """Source, transition, mark and direct gates as the op takes them."""
    c = self.config
    spread = np.linspace(-1, 1, c.H) * c.transition_spread if c.H > 1 else np.zeros(1)
    means = {"transition": c.transition_bias + spread}
    means |= {name: np.full(c.H, getattr(c, f"{name}_bias")) for name in ("source", "mark")}
    means |= {"direct": np.full(c.H, c.direct_bias), "rotation": np.zeros(c.H)}
    gates = {
      name: Gate(
        n, tuple(map(float, means[name])), c.gate_std, float(name == "rotation"), c.dtype,
        name=f"{name}_gate",
      )(x)
      for name, n in c.gates.items()
    }  # fmt: skip
    act = GATE_ACTIVATIONS[c.gate_activation]
    lead, J = (*x.shape[:2], c.H), c.J
    sizes = {"source": (J, 1, J), "mark": (J, 1, J), "direct": (J, 1, 1, J)} if J > 1 else {}
    source, mark, direct = (
      act(gates[name]).reshape(*lead, *sizes.get(name, ())) for name in ("source", "mark", "direct")
    )
    transition = TRANSITION_ACTIVATIONS[c.transition_activation](
      c.transition_scale * gates["transition"]
    )
    if J > 1:
      # Few axes: on CPUs jaxlib 0.10.2 may crash in sums of seven, as gradients under vmap are.
      turns = orthogonal(gates["rotation"].reshape(*x.shape[:2], 2 * c.H, J, J))
      left, right = turns[:, :, ::2], turns[:, :, 1::2]
      return source, (left * transition[..., None, :]) @ right, mark, direct
    return source, transition[..., 0], mark, direct
