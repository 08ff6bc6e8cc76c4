"""RetNet: retention, linear attention with a constant decay. Sun et al., "Retentive Network: A
Successor to Transformer for Large Language Models", 2023.

    q, k, v = W_q x, W_k x, W_v x                 heads of widths D / H and expand_v D / H
    q, k = rotary(q), rotary(k)
    S_t = gamma S_{t-1} + k_t v_t^T,   o_t = K^-1/2 q_t^T S_t          gamma = 1 - 2^(-5-h), head h
    y = W_o (norm(o) * silu(W_g x))               a root mean square norm over each head

Only differences of positions matter, so the state carries one number that counts a row's tokens
and need not start again with a document: its matrices do. The angles are exact for any position
(`layers.rotary`); the counter wraps after 2^32 tokens, and differences stay right.

Weights start from N(0, 0.02^2), as the other models here. Departures: a root mean square norm with
learnt scales over each head where the paper has a group norm, and no normalisation of the retention
scores, which that norm undoes; both as in the usual published training code.
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
  """One RetNet block, followed by a gated MLP."""

  D: int = 2048  # model width
  L: int = 24  # blocks in the whole model
  H: int = 8  # heads
  expand_k: float = 1.0  # width of all keys together, in multiples of D
  expand_v: float = 2.0  # width of all values together, in multiples of D
  rotary_base: float = 10000.0  # longest wavelength of the rotary positions / 2 pi, tokens
  norm_epsilon: float = 1e-6  # of the norm of the output
  mlp_width: int | None = None  # width of the gated MLP; None is from mlp_ratio; 0 is none
  mlp_ratio: float = 2.0  # width of the MLP before its gate takes a third, in multiples of D
  implementation: str | None = None  # of the op: recurrent, parallel, chunked; None chooses
  chunk_size: int | None = None  # tokens per chunk of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "chunk_size")
    layers.check_at_least(self, 0, "mlp_width", "mlp_ratio")
    recurrent_layers.check_implementation(self)
    for field in ("expand_k", "expand_v"):
      recurrent_layers.head_width(self, field)
    if self.K % 2:
      raise ValueError(
        f"expand_k is {self.expand_k}, must make heads of even width, not {self.K}, for rotary"
        " positions"
      )

  @property
  def K(self) -> int:
    """Width of a head of q and k."""
    return recurrent_layers.head_width(self, "expand_k")

  @property
  def V(self) -> int:
    """Width of a head of v."""
    return recurrent_layers.head_width(self, "expand_v")


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: each head's matrix and the number of tokens so far, zeros."""
  return {
    "memory": jnp.zeros((batch, config.H, config.K, config.V), jnp.float32),
    "position": jnp.zeros((batch,), jnp.int32),
  }


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward, for one token, whatever the length T."""
  H, K, V = config.H, config.K, config.V
  rotation = 2 * H * K * 3
  return 2 * config.D * H * (2 * K + 3 * V) + rotation + H * recurrent_layers.recurrence_flops(K, V)


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
    c, state = self.config, state or init_state(self.config, x.shape[0])
    project = lambda name, features: recurrent_layers.project(c, name, features, x)
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids >= 0
    positions = state["position"][:, None] + layers.running_count(real)
    q, k = (
      layers.rotary(project(f"{name}_proj", (c.H, c.K)), positions, c.rotary_base)
      for name in ("query", "key")
    )
    o, memory = ops.retention(
      q, k, project("value_proj", (c.H, c.V)), initial_state=state["memory"],
      segment_ids=segment_ids, implementation=c.implementation, chunk_size=c.chunk_size,
    )  # fmt: skip
    gate = jax.nn.silu(recurrent_layers.wide(project("gate_proj", (c.H, c.V))))
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")(o, gate)
    y = recurrent_layers.project(c, "out_proj", c.D, y.reshape(*y.shape[:2], -1))
    return y, {"memory": memory, "position": positions[:, -1]}
