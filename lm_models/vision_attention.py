"""Softmax attention of every token of a grid to every other. Dosovitskiy et al., "An Image is Worth
16x16 Words", 2021. The baseline of vision models; it knows of positions only what tokens tell it.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,      y = W_o o + b_o
"""

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from lm_models import layers
from lm_models.grid_layers import fan_in_init, out_init


@dataclasses.dataclass(frozen=True)
class Config:
  """One attention mixer on a grid of tokens."""

  D: int = 192  # model width
  L: int = 12  # blocks in the whole model; the output projection starts smaller by sqrt(2 L)
  H: int = 3  # heads of width D / H
  init_variance: float = 0.4  # of the initial weights, in multiples of 1 / inputs
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H")
    if self.D % self.H:
      raise ValueError(f"H is {self.H}, must divide D = {self.D}")


def flops(config: Config, Y: int, X: int) -> float:
  """Floating-point operations of the mixer, forward, for a grid of Y rows and X columns."""
  return Y * X * (8.0 * config.D**2 + 4.0 * Y * X * config.D)


class Mixer(nn.Module):
  """The block's mixer: `y = Mixer(config).apply(params, x)` on a grid of tokens of any size."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    c = self.config
    tokens = x.reshape(x.shape[0], -1, c.D)
    options = {"bias": True, "dtype": c.dtype, "kernel_init": fan_in_init(c.init_variance)}
    q, k, v = (
      layers.Projection((c.H, c.D // c.H), name=f"{name}_proj", **options)(tokens)
      for name in ("query", "key", "value")
    )
    o = jax.nn.dot_product_attention(q, k, v)
    options["kernel_init"] = out_init(c.L, c.init_variance)
    return layers.Projection(c.D, 2, name="out_proj", **options)(o).reshape(x.shape)
