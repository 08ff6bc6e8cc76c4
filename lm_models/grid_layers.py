"""What models of grids of tokens share: initial values, the MLP, a convolution, drop-path."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm_models import layers


def fan_in_init(variance: float) -> Callable:
  """N(0, variance / fan_in), the first axis being summed over; 1 keeps variances between layers."""
  return lambda key, shape: (variance / shape[0]) ** 0.5 * jax.random.normal(key, shape)


# Nguyen and Salazar, "Transformers without Tears", 2019.
SMALL = 0.4
small_init = fan_in_init(SMALL)


def out_init(L: int, variance: float = SMALL) -> Callable:
  """`fan_in_init`, smaller by sqrt(2 L): of what is added to the residual stream 2 L times."""
  return fan_in_init(variance / (2 * L))


class MLP(nn.Module):
  """y = W_down gelu(W_up x + b_up) + b_down."""

  width: int
  L: int
  init_variance: float = SMALL
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    options = {"bias": True, "dtype": self.dtype}
    up_init, down_init = fan_in_init(self.init_variance), out_init(self.L, self.init_variance)
    y = layers.Projection(self.width, kernel_init=up_init, name="up_proj", **options)(x)
    down = layers.Projection(x.shape[-1], kernel_init=down_init, name="down_proj", **options)
    return down(jax.nn.gelu(y))


class HeadProjection(nn.Module):
  """Each head's part of the channels times the head's own matrix, plus a bias."""

  H: int
  init_variance: float = SMALL
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X H K"]:
    K = x.shape[-1] // self.H
    init = nn.initializers.normal((self.init_variance / K) ** 0.5)
    kernel = self.param("kernel", init, (self.H, K, K)).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.H, K)).astype(self.dtype)
    x = x.astype(self.dtype).reshape(*x.shape[:3], self.H, K)
    return jnp.einsum("byxhi,hij->byxhj", x, kernel) + bias


class GridConv(nn.Module):
  """A depthwise convolution with an odd side W, zeros around the grid."""

  W: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    (Y, X, D), W = x.shape[1:], self.W
    weight = self.param("conv_weight", layers.uniform_fan_in, (W * W, D)).astype(self.dtype)
    around = [(0, 0), (W // 2, W // 2), (W // 2, W // 2), (0, 0)]
    x = jnp.pad(x.astype(self.dtype), around)
    shifted = (x[:, i : i + Y, j : j + X] for i in range(W) for j in range(W))
    return sum(w * part for w, part in zip(weight, shifted))


class DropPath(nn.Module):
  """Leaves out a branch of whole images with probability `rate`, and scales those that stay.

  Only where a key is given for "drop_path". Huang et al., "Deep Networks with Stochastic Depth",
  2016.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    if not self.rate or not self.has_rng("drop_path"):
      return x
    shape = (x.shape[0], 1, 1, 1)
    stays = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.rate, shape)
    return jnp.where(stays, x / (1 - self.rate), 0).astype(x.dtype)
