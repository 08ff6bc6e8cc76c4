"""Mamba-2: state-space duality. Dao and Gu, "Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality", 2024.

    z, x, B, C, dt = W u                           [B T d_inner] twice, [B T G N] twice, [B T H]
    x, B, C = silu(conv(x, B, C))                  depthwise, causal, width W, with a bias
    dt = softplus(dt + dt_bias), kept within dt_limit
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,  A = -exp(A_log), one number for each head
    y_t = C_t^T S_t + D x_t
    out = W_out norm(y * silu(z))                  a root mean square norm over each of G groups

Departures from the published code: none in the mathematics. There one matrix makes z, x, B, C and
dt, and one convolution covers x, B and C; here z and x, B and C, and dt have matrices of their own,
and x a convolution apart from B's and C's, so that heads can be split over devices while every
device holds B and C. The state of a convolution holds W - 1 inputs rather than W.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers


@dataclasses.dataclass(frozen=True)
class Config:
  """One Mamba-2 block."""

  D: int = 768  # model width
  L: int = 24  # blocks in the whole model; the output projections start smaller by sqrt(L)
  expand: int = 2  # inner width, in multiples of D
  P: int = 64  # width of a head, channels
  N: int = 128  # state size of each channel
  n_groups: int = 1  # groups of heads that share B and C
  W: int = 4  # width of the convolutions, tokens
  A_min: float = 1.0  # smallest initial -A
  A_max: float = 16.0  # largest initial -A
  dt_min: float = 1e-3  # smallest initial time step
  dt_max: float = 0.1  # largest initial time step
  dt_floor: float = 1e-4  # initial time steps are not smaller than this
  dt_limit_min: float = 0.0  # time steps are never smaller than this
  dt_limit_max: float | None = None  # nor larger than this; None is no limit
  norm_epsilon: float = 1e-5  # of the norm of the output
  mlp_width: int | None = 0  # width of a gated MLP after the mixer; 0 leaves it out
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "expand", "P", "N", "n_groups", "W", "chunk_size")
    layers.check_at_least(self, 0, "mlp_width", "dt_limit_min")
    recurrent_layers.check_implementation(self)
    if self.inner % self.P:
      raise ValueError(f"P is {self.P}, must divide expand D = {self.inner}")
    if self.H % self.n_groups:
      raise ValueError(f"n_groups is {self.n_groups}, must divide the {self.H} heads")
    for low, high in (("A_min", "A_max"), ("dt_min", "dt_max")):
      if not 0 < getattr(self, low) <= getattr(self, high):
        raise ValueError(f"{low} is {getattr(self, low)}, must be above 0 and at most {high}")

  @property
  def inner(self) -> int:
    """Width of the inner channels."""
    return self.expand * self.D

  @property
  def H(self) -> int:
    """Heads."""
    return self.inner // self.P


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolutions' last inputs and each head's matrix, zeros."""
  channels = {"x": config.inner, "bc": 2 * config.n_groups * config.N}
  return {
    **recurrent_layers.conv_state(config, batch, channels),
    "memory": jnp.zeros((batch, config.H, config.N, config.P), jnp.float32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, whatever the length T."""
  shared = 2 * config.n_groups * config.N
  matrices = config.D * (3 * config.inner + shared + config.H)
  recurrence = config.H * recurrent_layers.recurrence_flops(config.N, config.P)
  return 2 * (matrices + config.W * (config.inner + shared)) + recurrence


class Mixer(nn.Module):
  """The block's mixer: `y, state = Mixer(config).apply(params, x, state, segment_ids)`."""

  config: Config

  @nn.compact
  def __call__(
    self,
    u: Float[Array, "B T D"],
    state: dict[str, Array] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    c, state = self.config, state or {}
    project = lambda name, features: layers.Projection(features, dtype=c.dtype, name=name)(u)
    xz = project("in_proj", (2, c.inner))
    x, z = xz[..., 0, :], xz[..., 1, :]
    x, x_conv = self._convolve("x_conv", x, state, segment_ids)
    BC = project("bc_proj", (2, c.n_groups, c.N))
    BC, bc_conv = self._convolve("bc_conv", BC, state, segment_ids)
    x = x.reshape(*x.shape[:2], c.H, c.P)

    dt_bias = self.param(
      "dt_bias", recurrent_layers.dt_bias_init(c.dt_min, c.dt_max, c.dt_floor), (c.H,)
    )
    dt = jax.nn.softplus(recurrent_layers.wide(project("dt_proj", c.H)) + dt_bias)
    dt = jnp.clip(dt, c.dt_limit_min, c.dt_limit_max)
    A_log = self.param("A_log", recurrent_layers.A_log_init(c.A_min, c.A_max), (c.H,))
    skip = self.param("skip", nn.initializers.ones, (c.H,))
    y, memory = ops.ssd(
      x, dt, -jnp.exp(A_log), BC[:, :, 0], BC[:, :, 1], skip, initial_state=state.get("memory"),
      segment_ids=segment_ids, implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip

    y = recurrent_layers.wide(y.reshape(z.shape)) * jax.nn.silu(recurrent_layers.wide(z))
    y = y.reshape(*z.shape[:2], c.n_groups, -1)
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, scale_axes=2, name="norm")(y).reshape(z.shape)
    out_init = lambda key, shape: layers.uniform_fan_in(key, shape) * c.L**-0.5
    out = layers.Projection(c.D, dtype=c.dtype, kernel_init=out_init, name="out_proj")(y)
    return out, {"x_conv": x_conv, "bc_conv": bc_conv, "memory": memory}

  def _convolve(self, name, x, state, segment_ids):
    init = lambda key, shape: (
      jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * self.config.W**-0.5
    )
    conv = recurrent_layers.ShortConv(self.config.W, self.config.dtype, init, bias=True, name=name)
    y, new_state = conv(x, state.get(name), segment_ids)
    return jax.nn.silu(y), new_state
