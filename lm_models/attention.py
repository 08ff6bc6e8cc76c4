"""Causal softmax attention with rotary positions, over everything or over a sliding window: the
baseline, and a layer of hybrids.

    q, k, v = W_q x, W_k x, W_v x;      y = W_o softmax_attention(q, k, v)

Vaswani et al., "Attention Is All You Need", 2017; grouped key and value heads as Ainslie et al.,
"GQA", 2023; sliding window as Beltagy et al., "Longformer", 2020. `ops.softmax_attention` says what
the state holds.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm_models import layers
from ops.softmax_attention import SEQUENCES, softmax_attention


@dataclasses.dataclass(frozen=True)
class Config:
  """One attention block, followed by a gated MLP."""

  D: int = 768  # model width
  L: int = 12  # blocks in the whole model; the output projections start smaller by sqrt(2 L)
  H: int = 4  # query heads
  kv_heads: int | None = None  # key and value heads, each serving H / kv_heads queries; None is H
  K: int | None = None  # width of a head, even; None is D / H
  window: int | None = None  # tokens a token sees, itself included; None is all
  context: int = 2048  # keys and values kept in the state where window is None, tokens
  rotary_base: float = 10000.0  # longest wavelength of the rotary positions / 2 pi, tokens
  # How keys and values reach the queries where devices share time: all_gather (all at once, from
  # all) or ring (one device's at a time); a short window needs the last of one neighbour only.
  sequence: str = "all_gather"
  mlp_width: int | None = (
    None  # width of the gated MLP; None is 8 D / 3 rounded up to 256; 0 leaves it out
  )
  dtype: str = "float32"  # of matrix products and activations

  @property
  def head_width(self) -> int:
    """Width of a head."""
    return self.D // self.H if self.K is None else self.K

  @property
  def kept(self) -> int:
    """Keys and values in the state, tokens."""
    return self.context if self.window is None else self.window - 1

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "kv_heads", "K")
    layers.check_at_least(self, 0, "context", "mlp_width")
    if self.K is None and self.D % self.H:
      raise ValueError(f"H is {self.H}, must divide D = {self.D} where K is not given")
    if self.head_width % 2:
      raise ValueError(f"K is {self.head_width}, must be even for rotary positions")
    if self.H % (self.kv_heads or self.H):
      raise ValueError(f"kv_heads is {self.kv_heads}, must divide H = {self.H}")
    if self.window is not None and self.window < 1:
      raise ValueError(f"window is {self.window}, must be at least 1 or None")
    if self.sequence not in SEQUENCES:
      raise ValueError(f"sequence is {self.sequence!r}, must be one of {', '.join(SEQUENCES)}")


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: room for the last keys and values, none of it valid yet."""
  shape = (batch, config.kept, config.kv_heads or config.H, config.head_width)
  return {
    "k": jnp.zeros(shape, config.dtype),
    "v": jnp.zeros(shape, config.dtype),
    "valid": jnp.zeros(shape[:2], bool),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, averaged over T tokens."""
  heads, kv_heads = config.H, config.kv_heads or config.H
  matrices = config.D * config.head_width * (2 * heads + 2 * kv_heads)
  window = min(T, config.window or T)
  seen = window - window * (window - 1) / (2 * T)  # tokens that a token sees, on average
  return 2 * matrices + 4 * seen * heads * config.head_width


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
    c = self.config
    init = nn.initializers.normal(0.02)
    project = lambda name, heads: layers.Projection(
      (heads, c.head_width), dtype=c.dtype, kernel_init=init, name=name
    )(x)
    q = project("query_proj", c.H)
    k = project("key_proj", c.kv_heads or c.H)
    v = project("value_proj", c.kv_heads or c.H)

    o, state = softmax_attention(
      q, k, v, window=c.window, context=c.context, rotary_base=c.rotary_base,
      initial_state=state, segment_ids=segment_ids, sequence=c.sequence,
    )  # fmt: skip
    out_init = nn.initializers.normal(0.02 * (2 * c.L) ** -0.5)
    y = layers.Projection(c.D, 2, dtype=c.dtype, kernel_init=out_init, name="out_proj")(o)
    return y, state
