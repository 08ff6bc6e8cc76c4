"""DeltaNet: linear attention that writes by the delta rule. Yang et al., "Parallelizing Linear
Transformers with the Delta Rule over Sequence Length", 2024; Schlag et al., "Linear Transformers
Are Secretly Fast Weight Programmers", 2021.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
    q, k = q / |q|, k / |k|
    beta = sigmoid(W_beta x), or twice that       one number for each head
    S_t = S_{t-1} + k_t (beta_t (v_t - k_t^T S_{t-1}))^T,   o_t = K^-1/2 q_t^T S_t
    y = W_o norm(o)                               a root mean square norm over each head

With beta up to 2 the transition I - beta k k^T has eigenvalues down to -1: what tracking parity
takes (Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024).
The paper's hybrids are patterns: ("deltanet", "sliding_attention"), ("deltanet", "attention").

Weights start from N(0, 0.02^2), as in the authors' published training code. Departures: none in the
mathematics. The state of a convolution holds W - 1 inputs rather than W; the MLP's output, which
belongs to the block, starts smaller by sqrt(2 L) as in every model here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "elu": lambda x: jax.nn.elu(x) + 1,
  "identity": lambda x: x,
}


def _sum_normalize(x):
  y = recurrent_layers.wide(x)
  return (y / jnp.sum(y, axis=-1, keepdims=True)).astype(x.dtype)


NORMS = {"l2": ops.l2_normalize, "sum": _sum_normalize}


@dataclasses.dataclass(frozen=True)
class Config:
  """One DeltaNet block, followed by a gated MLP."""

  D: int = 768  # model width
  L: int = 12  # blocks in the whole model
  H: int = 6  # heads
  expand_k: float = 1.0  # width of all keys together, in multiples of D
  expand_v: float = 1.0  # width of all values together, in multiples of D
  allow_neg_eigval: bool = False  # beta lies in (0, 2) rather than (0, 1)
  qk_activation: str = "silu"  # of q and k: silu, relu, elu (elu + 1) or identity
  qk_norm: str = "l2"  # of q and k: l2, or sum (divides by the sum, for elu only)
  use_gate: bool = False  # multiplies the normed output by silu of a projection
  W: int = 4  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  norm_epsilon: float = 1e-6  # of the norm of the output
  mlp_width: int | None = None  # width of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "chunk_size")
    layers.check_at_least(self, 0, "W", "mlp_width")
    recurrent_layers.check_implementation(self)
    recurrent_layers.check_choice(self, "qk_activation", ACTIVATIONS)
    recurrent_layers.check_choice(self, "qk_norm", NORMS)
    if self.qk_norm == "sum" and self.qk_activation != "elu":
      raise ValueError(f"qk_norm is 'sum', must be 'l2' with qk_activation {self.qk_activation!r}")
    for field in ("expand_k", "expand_v"):
      recurrent_layers.head_width(self, field)

  @property
  def sizes(self) -> dict[str, tuple[int, int]]:
    """Heads and widths of q, k and v."""
    K, V = (recurrent_layers.head_width(self, field) for field in ("expand_k", "expand_v"))
    return {"query": (self.H, K), "key": (self.H, K), "value": (self.H, V)}


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolutions' last inputs and each head's matrix, zeros."""
  (H, K), _, (_, V) = config.sizes.values()
  channels = {name: heads * width for name, (heads, width) in config.sizes.items()}
  return {
    **recurrent_layers.conv_state(config, batch, channels),
    "memory": jnp.zeros((batch, H, K, V), jnp.float32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, whatever the length T."""
  (H, K), _, (_, V) = config.sizes.values()
  channels = H * (2 * K + V)
  matrices = config.D * (channels + H + (1 + config.use_gate) * H * V)
  recurrence = recurrent_layers.recurrence_flops(K, V, decay=False, delta=True)
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
    (q, k, v), conv_state = recurrent_layers.convolved_heads(c, c.sizes, x, state, segment_ids)
    q, k = (NORMS[c.qk_norm](ACTIVATIONS[c.qk_activation](y)) for y in (q, k))
    beta = recurrent_layers.wide(recurrent_layers.project(c, "beta_proj", c.H, x))
    beta = jax.nn.sigmoid(beta) * (1 + c.allow_neg_eigval)
    o, memory = ops.delta_rule(
      q, k, jax.nn.silu(v), beta, initial_state=state.get("memory"), segment_ids=segment_ids,
      implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip

    gate = None
    if c.use_gate:
      gate = recurrent_layers.project(c, "gate_proj", c.sizes["value"], x)
      gate = jax.nn.silu(recurrent_layers.wide(gate))
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")(o, gate)
    y = recurrent_layers.project(c, "out_proj", c.D, y.reshape(*y.shape[:2], -1))
    return y, {**conv_state, "memory": memory}
