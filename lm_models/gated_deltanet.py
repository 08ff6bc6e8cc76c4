"""Gated DeltaNet, and Kimi Delta Attention as its form with a decay for each channel.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x));   q, k = q / |q|, k / |k|
    beta = sigmoid(W_beta x), or twice that       one number for each value head
    g = -exp(A_log) softplus(W_decay x + dt_bias)
    S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - k_t^T S))^T;   o_t = K^-1/2 q_t^T S
    y = W_o (norm(o) * gate(W_gate x))            a root mean square norm over each head

decay="scalar": Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024. One
decay for each head, A from U(0, 16), and a silu gate.
decay="vector": Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025 (the
name "kda" in a pattern). One decay for each key channel through a matrix of low rank, A from U(1,
16), one for each head, and a sigmoid gate of low rank with a bias.

Weights start from N(0, 0.02^2), biases from zero, softplus(dt_bias) log-uniform, as in the authors'
published training code. Departures: none in the mathematics. A starts at no less than 1e-4, for the
published distribution may draw 0, whose logarithm is infinite; the state of a convolution holds
W - 1 inputs rather than W; the MLP's output, which belongs to the block, starts smaller by
sqrt(2 L) as in every model here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers

DECAYS = ("scalar", "vector")


@dataclasses.dataclass(frozen=True)
class Config:
  """One Gated DeltaNet or KDA block, followed by a gated MLP."""

  D: int = 2048  # model width
  L: int = 21  # blocks in the whole model
  H: int = 6  # heads of q and k
  value_heads: int | None = None  # heads of v, decay and beta, a multiple of H; None is H
  K: int = 256  # width of a head of q and k
  expand_v: float = 2.0  # width of a head of v, in multiples of K
  decay: str = "scalar"  # scalar: one for each head; vector: one for each key channel
  rank: int | None = None  # of the vector form's decay and gate; None is the width of a head of v
  allow_neg_eigval: bool = False  # beta lies in (0, 2) rather than (0, 1)
  dt_min: float = 1e-3  # smallest initial softplus(dt_bias)
  dt_max: float = 0.1  # largest initial softplus(dt_bias)
  dt_floor: float = 1e-4  # it is not smaller than this
  W: int = 4  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  norm_epsilon: float = 1e-6  # of the norm of the output
  mlp_width: int | None = None  # width of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "value_heads", "K", "rank", "chunk_size")
    layers.check_at_least(self, 0, "W", "mlp_width")
    recurrent_layers.check_implementation(self)
    recurrent_layers.check_choice(self, "decay", DECAYS)
    if (self.value_heads or self.H) % self.H:
      raise ValueError(f"value_heads is {self.value_heads}, must be a multiple of H = {self.H}")
    if self.V < 1 or abs(self.V - self.expand_v * self.K) > 1e-6:
      raise ValueError(f"expand_v is {self.expand_v}, must make whole channels of K = {self.K}")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(f"dt_min is {self.dt_min}, must be above 0 and at most dt_max")

  @property
  def V(self) -> int:
    """Width of a head of v."""
    return round(self.expand_v * self.K)

  @property
  def sizes(self) -> dict[str, tuple[int, int]]:
    """Heads and widths of q, k and v."""
    heads = self.value_heads or self.H
    return {"query": (self.H, self.K), "key": (self.H, self.K), "value": (heads, self.V)}


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolutions' last inputs and each head's matrix, zeros."""
  channels = {name: heads * width for name, (heads, width) in config.sizes.items()}
  H, V = config.sizes["value"]
  return {
    **recurrent_layers.conv_state(config, batch, channels),
    "memory": jnp.zeros((batch, H, config.K, V), jnp.float32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, whatever the length T."""
  D, K, (H, V) = config.D, config.K, config.sizes["value"]
  rank = config.rank or V
  channels = 2 * config.H * K + H * V
  gates = D * H + D * H * V
  if config.decay == "vector":
    gates = 2 * D * rank + rank * H * (K + V)
  matrices = D * (channels + H + H * V) + gates
  recurrence = recurrent_layers.recurrence_flops(K, V, delta=True)
  return 2 * (matrices + config.W * channels) + H * recurrence


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
    heads, conv_state = recurrent_layers.convolved_heads(c, c.sizes, x, state, segment_ids)
    q, k, v = map(jax.nn.silu, heads)
    q, k = ops.l2_normalize(q), ops.l2_normalize(k)
    H = v.shape[2]
    beta = recurrent_layers.wide(recurrent_layers.project(c, "beta_proj", H, x))
    beta = jax.nn.sigmoid(beta) * (1 + c.allow_neg_eigval)
    op = ops.gated_delta_rule if c.decay == "scalar" else ops.kda
    o, memory = op(
      q, k, v, self._decay(x, H), beta, initial_state=state.get("memory"),
      segment_ids=segment_ids, implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")(o, self._gate(x, H))
    y = recurrent_layers.project(c, "out_proj", c.D, y.reshape(*y.shape[:2], -1))
    return y, {**conv_state, "memory": memory}

  def _decay(self, x, H):
    """Logarithms of the decay, [B T H] or [B T H K]."""
    c, scalar = self.config, self.config.decay == "scalar"
    if scalar:
      step = recurrent_layers.project(c, "decay_proj", H, x)
    else:
      low_rank = recurrent_layers.project(c, "decay_down_proj", c.rank or c.V, x)
      step = recurrent_layers.project(c, "decay_up_proj", (H, c.K), low_rank)
    A_log = self.param("A_log", recurrent_layers.A_log_init(0.0 if scalar else 1.0, 16.0), (H,))
    dt_init = recurrent_layers.dt_bias_init(c.dt_min, c.dt_max, c.dt_floor)
    dt_bias = self.param("dt_bias", dt_init, (H,) if scalar else (H, c.K))
    A = jnp.exp(A_log) if scalar else jnp.exp(A_log)[:, None]
    return -A * jax.nn.softplus(recurrent_layers.wide(step) + dt_bias)

  def _gate(self, x, H):
    c = self.config
    if c.decay == "scalar":
      return jax.nn.silu(
        recurrent_layers.wide(recurrent_layers.project(c, "gate_proj", (H, c.V), x))
      )
    low_rank = recurrent_layers.project(c, "gate_down_proj", c.rank or c.V, x)
    gate = recurrent_layers.project(c, "gate_up_proj", (H, c.V), low_rank, bias=True)
    return jax.nn.sigmoid(recurrent_layers.wide(gate))
