"""Causal softmax attention with rotary positions, over everything or over a sliding window.

    o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j         j <= t, t - j < window, same document

Vaswani et al., "Attention Is All You Need", 2017; grouped key and value heads as Ainslie et al.,
"GQA", 2023; sliding window as Beltagy et al., "Longformer", 2020. The baseline, and a
layer of hybrids.

The state holds the last keys and values of the present document, as they were before their
rotation: angles are taken afresh from positions inside the window at each call, so that they are
as exact after a million tokens as after ten, and the state's size never grows.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm_models import layers
from ops.segments import find_segments


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

    masks = None if segment_ids is None else find_segments(segment_ids)
    cache = _extend(state, k, v, masks)
    if state is None and masks is None:
      o = self._attend_whole(q, k, v)
    else:
      o = self._attend_cached(q, cache, masks)
    out_init = nn.initializers.normal(0.02 * (2 * c.L) ** -0.5)
    y = layers.Projection(c.D, 2, dtype=c.dtype, kernel_init=out_init, name="out_proj")(o)
    return y, _last(cache, c.kept)

  def _attend_whole(self, q, k, v):
    """One document a row and nothing before it: the form for which devices have fast kernels."""
    T, window = q.shape[1], self.config.window
    positions = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    q, k = (layers.rotary(x, positions, self.config.rotary_base) for x in (q, k))
    local = None if window is None or window >= T else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)

  def _attend_cached(self, q, cache, masks):
    """Keys from the state and from this call, told apart by document and by position."""
    c, T = self.config, q.shape[1]
    positions = jnp.maximum(jnp.cumsum(cache["valid"], axis=1) - 1, 0)
    k = layers.rotary(cache["k"], positions, c.rotary_base)
    positions_q, document_q = positions[:, -T:], cache["document"][:, -T:]
    q = layers.rotary(q, positions_q, c.rotary_base)
    distance = positions_q[:, :, None] - positions[:, None, :]
    seen = cache["valid"][:, None, :] & (distance >= 0)
    seen &= document_q[:, :, None] == cache["document"][:, None, :]
    if c.window is not None:
      seen &= distance < c.window
    # A padded query sees only itself: a row without any key would be 0 / 0.
    own = jnp.arange(cache["valid"].shape[1]) == jnp.arange(T)[:, None] + cache["k"].shape[1] - T
    real = jnp.ones(q.shape[:2], bool) if masks is None else masks.real
    seen = jnp.where(real[:, :, None], seen, own)
    # What is not seen may be anything, NaN included, and NaN * 0 is NaN: it is read as zero.
    k, v = (jnp.where(cache["valid"][..., None, None], x, 0) for x in (k, cache["v"]))
    o = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    return jnp.where(real[..., None, None], o, 0)


def _extend(state, k, v, masks):
  """The state's keys and values followed by those of this call, each with its document's number."""
  call = {
    "k": k,
    "v": v,
    "valid": jnp.ones(k.shape[:2], bool) if masks is None else masks.real,
    "document": jnp.zeros(k.shape[:2], jnp.int32) if masks is None else masks.document,
  }
  if state is None:
    return call
  # What the state holds belongs to the first document of this call.
  state = {**state, "document": jnp.zeros(state["valid"].shape, jnp.int32)}
  return {name: jnp.concatenate([state[name], call[name]], axis=1) for name in call}


def _last(cache, kept: int) -> dict[str, Array]:
  """The state after this call: the last `kept` real tokens of the last document."""
  missing = max(kept - cache["valid"].shape[1], 0)
  pad = lambda x: jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2))
  valid = pad(cache["valid"] & (cache["document"] == cache["document"][:, -1:]))
  # A stable sort moves padding and ended documents to the front and keeps the order of the rest.
  order = jnp.argsort(valid, axis=1, stable=True)[:, valid.shape[1] - kept :]
  take = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
  kept_valid = take(valid)
  clean = lambda x: jnp.where(kept_valid[..., None, None], take(pad(x)), 0)
  return {"k": clean(cache["k"]), "v": clean(cache["v"]), "valid": kept_valid}
