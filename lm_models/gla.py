"""Gated linear attention. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
Training", 2023.

    q, k, v = W_q x, W_k x, W_v x                 heads of widths expand_k D / H and expand_v D / H
    g = logsigmoid(W_up W_down x + b) / normaliser            [B T H K], through rank 16
    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = K^-1/2 q_t^T S_t
    y = W_o (norm(o) * silu(W_g x))               a root mean square norm over each head

Weights start from N(0, 0.02^2), biases from zero, as in the authors' published training code.
Departures: none in the mathematics. The MLP's output, which belongs to the block, starts smaller by
sqrt(2 L) as in every model here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers

FEATURE_MAPS = {"identity": lambda x: x, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Config:
  """One GLA block, followed by a gated MLP."""

  D: int = 768  # model width
  L: int = 12  # blocks in the whole model
  H: int = 4  # heads
  kv_heads: int | None = None  # heads of k, v and decay, each serving H / kv_heads of q; None is H
  expand_k: float = 0.5  # width of all keys together, in multiples of D
  expand_v: float = 1.0  # width of all values together, in multiples of D
  feature_map: str = "identity"  # of q and k: identity or relu
  gate_rank: int = 16  # rank of the projection to the decay
  gate_normaliser: float = 16.0  # divides the logarithm of the decay
  gate_min: float | None = None  # the logarithm of the decay is not below this; None is no limit
  output_gate: bool = True  # multiplies the normed output by silu of a projection
  W: int = 0  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  norm_epsilon: float = 1e-6  # of the norm of the output
  mlp_width: int | None = None  # width of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "kv_heads", "gate_rank", "chunk_size")
    layers.check_at_least(self, 0, "W", "mlp_width")
    recurrent_layers.check_implementation(self)
    recurrent_layers.check_choice(self, "feature_map", FEATURE_MAPS)
    if self.H % (self.kv_heads or self.H):
      raise ValueError(f"kv_heads is {self.kv_heads}, must divide H = {self.H}")
    if not self.gate_normaliser > 0:
      raise ValueError(f"gate_normaliser is {self.gate_normaliser}, must be above 0")
    for field in ("expand_k", "expand_v"):
      recurrent_layers.head_width(self, field)

  @property
  def sizes(self) -> dict[str, tuple[int, int]]:
    """Heads and widths of q, k and v."""
    K, V = (recurrent_layers.head_width(self, field) for field in ("expand_k", "expand_v"))
    kv_heads = self.kv_heads or self.H
    return {"query": (self.H, K), "key": (kv_heads, K), "value": (kv_heads, V)}


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
  (H, K), (kv_heads, _), (_, V) = config.sizes.values()
  channels = H * K + kv_heads * (K + V)
  low_rank = config.gate_rank * (config.D + kv_heads * K)
  matrices = config.D * (channels + (1 + config.output_gate) * H * V) + low_rank
  return 2 * (matrices + config.W * channels) + H * recurrent_layers.recurrence_flops(K, V)


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
    (H, K), (kv_heads, _), (_, V) = c.sizes.values()
    project = lambda name, features, x, **options: recurrent_layers.project(
      c, name, features, x, **options
    )
    heads, conv_state = recurrent_layers.convolved_heads(c, c.sizes, x, state, segment_ids)
    q, k, v = map(jax.nn.silu, heads) if c.W else heads
    q, k = map(FEATURE_MAPS[c.feature_map], (q, k))

    low_rank = project("decay_down_proj", c.gate_rank, x)
    g = project("decay_up_proj", (kv_heads, K), low_rank, bias=True)
    g = jax.nn.log_sigmoid(recurrent_layers.wide(g)) / c.gate_normaliser
    if c.gate_min is not None:
      g = jnp.maximum(g, c.gate_min)
    k, v, g = (jnp.repeat(y, H // kv_heads, axis=2) for y in (k, v, g))
    o, memory = ops.gla(
      q, k, v, g, initial_state=state.get("memory"), segment_ids=segment_ids,
      implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip

    gate = None
    if c.output_gate:
      gate = jax.nn.silu(recurrent_layers.wide(project("gate_proj", (H, V), x)))
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")(o, gate)
    y = project("out_proj", c.D, y.reshape(*y.shape[:2], -1))
    return y, {**conv_state, "memory": memory}
