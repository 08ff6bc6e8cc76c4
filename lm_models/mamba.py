"""Mamba: a selective state-space block. Gu and Dao, "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces", 2023.

    x, z = W_in u                                  [B T d_inner] each, d_inner = expand D
    x = silu(conv(x))                              depthwise, causal, width W
    dt, B, C = W_x x                               ranks dt_rank, N, N
    dt = softplus(W_dt dt + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t       A = -exp(A_log), h [d_inner N]
    y_t = h_t C_t + D x_t
    out = W_out (y * silu(z))

Departures from the published code: none in the mathematics; the two halves of W_in lie on an axis
of their own, and the state of the convolution holds W - 1 inputs rather than W.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers


@dataclasses.dataclass(frozen=True)
class Config:
  """One Mamba block."""

  D: int = 768  # model width
  L: int = 24  # blocks in the whole model; the output projections start smaller by sqrt(L)
  expand: int = 2  # inner width, in multiples of D
  N: int = 16  # state size of each inner channel
  W: int = 4  # width of the convolution, tokens
  dt_rank: int | None = None  # rank of the projection to dt; None is ceil(D / 16)
  dt_min: float = 1e-3  # smallest initial time step
  dt_max: float = 0.1  # largest initial time step
  dt_floor: float = 1e-4  # initial time steps are not smaller than this
  mlp_width: int | None = 0  # width of a gated MLP after the mixer; 0 leaves it out
  implementation: str | None = None  # of the scan: recurrent, parallel, chunked; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "expand", "N", "W", "dt_rank")
    layers.check_at_least(self, 0, "mlp_width")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(f"dt_min is {self.dt_min}, must be above 0 and at most dt_max")
    recurrent_layers.check_implementation(self)

  @property
  def inner(self) -> int:
    """Width of the inner channels."""
    return self.expand * self.D

  @property
  def rank(self) -> int:
    """Rank of the projection to dt."""
    return -(-self.D // 16) if self.dt_rank is None else self.dt_rank


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolution's last inputs and the scan's state, zeros."""
  return {
    "conv": jnp.zeros((batch, config.W - 1, config.inner), config.dtype),
    "scan": jnp.zeros((batch, config.inner, config.N), jnp.float32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token of a sequence of any length
  T."""
  inner, rank, N = config.inner, config.rank, config.N
  matrices = config.D * 2 * inner + inner * (rank + 2 * N) + rank * inner + inner * config.D
  scan = inner * (7 * N + 3)  # exp, three products and an add for h; a product and an add for y
  return 2.0 * matrices + 2 * config.W * inner + scan


class Mixer(nn.Module):
  """The block's mixer: `y, state = Mixer(config).apply(params, x, state, segment_ids)`."""

  config: Config

  @nn.compact
  def __call__(
    self,
    u: Float[Array, "B T D"],
    state: dict[str, Any] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    c = self.config
    state = state or {"conv": None, "scan": None}
    project = lambda name, features, **kw: layers.Projection(
      features, dtype=c.dtype, name=name, **kw
    )

    xz = project("in_proj", (2, c.inner))(u)
    x, z = xz[..., 0, :], xz[..., 1, :]
    weight = self.param("conv_weight", _conv_init(c), (c.W, c.inner))
    bias = self.param("conv_bias", _conv_init(c), (c.inner,))
    x, conv_state = ops.causal_conv(
      x,
      weight.astype(c.dtype),
      bias.astype(c.dtype),
      initial_state=state["conv"],
      segment_ids=segment_ids,
    )
    x = jax.nn.silu(x)

    low_rank = project("x_proj", c.rank + 2 * c.N)(x)
    dt, B, C = jnp.split(low_rank, [c.rank, c.rank + c.N], axis=-1)
    dt = project("dt_proj", c.inner, kernel_init=_dt_kernel_init(c))(dt)
    dt_init = recurrent_layers.dt_bias_init(c.dt_min, c.dt_max, c.dt_floor)
    dt_bias = self.param("dt_bias", dt_init, (c.inner,))
    dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias)

    A_log = self.param("A_log", _A_log_init, (c.inner, c.N))
    skip = self.param("skip", nn.initializers.ones, (c.inner,))
    y, scan_state = ops.selective_scan(
      x,
      dt,
      -jnp.exp(A_log),
      B,
      C,
      skip,
      initial_state=state["scan"],
      segment_ids=segment_ids,
      implementation=c.implementation,
    )
    y = y.astype(c.dtype) * jax.nn.silu(z)
    out = project("out_proj", c.D, kernel_init=_out_init(c))(y)
    return out, {"conv": conv_state.astype(c.dtype), "scan": scan_state}


def _conv_init(config):
  return lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * config.W**-0.5


def _dt_kernel_init(config):
  bound = config.rank**-0.5
  return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _A_log_init(key, shape):
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape)


def _out_init(config):
  return lambda key, shape: layers.uniform_fan_in(key, shape) * config.L**-0.5
