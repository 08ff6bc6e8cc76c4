"""What several recurrent architectures share: heads behind short convolutions, initial values."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers

IMPLEMENTATIONS = (None, *ops.dispatch.IMPLEMENTATIONS)


def check_implementation(config: Any) -> None:
  """Raises ValueError where a Config's `implementation` is none that an op may have."""
  if config.implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation is {config.implementation!r}, must be one of {IMPLEMENTATIONS}"
    )


def check_choice(config: Any, field: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
  """Raises ValueError where a field of a Config is none of the words `allowed`."""
  if getattr(config, field) not in allowed:
    raise ValueError(f"{field} is {getattr(config, field)!r}, must be one of {tuple(allowed)}")


def head_width(config: Any, field: str) -> int:
  """Width of each of the H heads that share D times the factor in `field`.

  Raises:
    ValueError: the heads cannot share that width evenly, or it is nothing.
  """
  factor = getattr(config, field)
  width = round(factor * config.D)
  if width < 1 or width % config.H or abs(width - factor * config.D) > 1e-6:
    raise ValueError(
      f"{field} is {factor}, must make H = {config.H} heads of whole channels of D = {config.D}"
    )
  return width // config.H


class ShortConv(nn.Module):
  """A causal depthwise convolution over the last axes of x, all of them channels of their own."""

  W: int
  dtype: str = "float32"
  init: Callable = nn.initializers.normal(0.02)
  bias: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T ..."],
    state: Float[Array, "B _ _"] | None,
    segment_ids: Int[Array, "B T"] | None,
  ) -> tuple[Float[Array, "B T ..."], Float[Array, "B _ _"]]:
    flat = x.reshape(*x.shape[:2], -1)
    weight = self.param("conv_weight", self.init, (self.W, flat.shape[-1]))
    bias = None
    if self.bias:
      bias = self.param("conv_bias", self.init, (flat.shape[-1],)).astype(self.dtype)
    y, state = ops.causal_conv(
      flat, weight.astype(self.dtype), bias, initial_state=state, segment_ids=segment_ids
    )
    return y.reshape(x.shape), state.astype(self.dtype)


def convolved_heads(
  config: Any,
  sizes: Mapping[str, tuple[int, int]],
  x: Float[Array, "B T D"],
  state: Mapping[str, Array],
  segment_ids: Int[Array, "B T"] | None,
) -> tuple[list[Float[Array, "B T _ _"]], dict[str, Array]]:
  """Heads [B T H K] of x for each name, through a convolution of width `config.W` unless that is 0.

  Called within a module, whose children `<name>_proj` and `<name>_conv` it makes.

  Args:
    config: of the mixer: `W` and `dtype`.
    sizes: for each name how many heads of which width.
    x: what is projected.
    state: the mixer's, with the convolutions' last inputs under `<name>_conv`; empty at the start.
    segment_ids: documents and padding.

  Returns:
    The heads in the order of `sizes`, and the convolutions' part of the new state.
  """
  heads, new_state = [], {}
  for name, size in sizes.items():
    y = project(config, f"{name}_proj", size, x)
    if config.W:
      key = f"{name}_conv"
      y, new_state[key] = ShortConv(config.W, config.dtype, name=key)(
        y, state.get(key), segment_ids
      )
    heads.append(y)
  return heads, new_state


def project(config: Any, name: str, features: int | tuple[int, ...], x: Array, **options) -> Array:
  """A projection of x, a child of the module within which this is called; weights N(0, 0.02^2)."""
  init = nn.initializers.normal(0.02)
  return layers.Projection(features, dtype=config.dtype, kernel_init=init, name=name, **options)(x)


def conv_state(config: Any, batch: int, channels: Mapping[str, int]) -> dict[str, Array]:
  """The convolutions' part of the state before any token, zeros; empty where W is 0."""
  if not config.W:
    return {}
  return {
    f"{name}_conv": jnp.zeros((batch, config.W - 1, width), config.dtype)
    for name, width in channels.items()
  }


def recurrence_flops(K: int, V: int, *, decay: bool = True, delta: bool = False) -> float:
  """Operations of one head for one token: decay, the delta rule's residual, write and read."""
  return float(K * V * (4 + decay + 2 * delta) + 2 * V * delta)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """At least float32: where gates are computed."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dt_bias_init(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Callable:
  """softplus(bias) is log-uniform in [low, high], and at least `floor`."""

  def init(key, shape):
    dt = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init


def A_log_init(low: float, high: float, floor: float = 1e-4) -> Callable:
  """The logarithm of A, uniform in [low, high]; A is at least `floor`, for log 0 is no number."""

  def init(key, shape):
    A = jax.random.uniform(key, shape, minval=low, maxval=high)
    return jnp.log(jnp.maximum(A, floor))

  return init
