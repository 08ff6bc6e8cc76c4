"""What models of grids of tokens share: initial values, the MLP, a convolution, drop-path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm_models import layers


def small_init(key: Array, shape: tuple[int, ...]) -> Array:
  """N(0, 2 / (5 fan_in)), the first axis being summed over. Nguyen and Salazar, 2019."""
  return (0.4 / shape[0]) ** 0.5 * jax.random.normal(key, shape)


def out_init(L: int):
  """`small_init`, smaller by sqrt(2 L): of what is added to the residual stream 2 L times."""
  return lambda key, shape: (2 * L) ** -0.5 * small_init(key, shape)


class MLP(nn.Module):
  """y = W_down gelu(W_up x + b_up) + b_down."""

  width: int
  L: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
    options = {"bias": True, "dtype": self.dtype}
    y = layers.Projection(self.width, kernel_init=small_init, name="up_proj", **options)(x)
    down = layers.Projection(x.shape[-1], kernel_init=out_init(self.L), name="down_proj", **options)
    return down(jax.nn.gelu(y))


class HeadProjection(nn.Module):
  """Each head's part of the channels times the head's own matrix, plus a bias."""

  H: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X H K"]:
    K = x.shape[-1] // self.H
    init = lambda key, shape: (0.4 / K) ** 0.5 * jax.random.normal(key, shape)
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
