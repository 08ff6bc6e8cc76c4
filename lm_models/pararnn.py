"""Nonlinear recurrent networks, trained in parallel over time or step by step. Danieli et al.,
"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models", 2025.

    x, z = W_in x                                  [B T D] each
    u = B conv(x) + b                              [B T G D]; conv: depthwise, causal, width W; B
                                                   block-diagonal over H heads
    h_t = f(h_{t-1}, u_t)                          the cell, see lm_models.rnn_cells
    y = W_out (norm(h) * silu(z))                  or norm(h * silu(z))

The block adds y to `scale * x`, with a learnt scale, and an MLP follows. The same parameters run
in two modes, which agree but for rounding where Newton's method has converged:

    parallel = Config(D=64, mode="newton")
    serial = dataclasses.replace(parallel, mode="sequential")

The cells with full matrices (elman, gru, lstm, slstm) run step by step; the first three are
solved in parallel where the model is narrow, for the work grows with D^3.

Not said in the paper, and chosen here: the order of norm and gate (a field), no activation behind
the convolution, and Mamba's initial values of W_in, W_out and the convolution. Departure: 4
iterations of Newton's method rather than 3, with the states kept in the cell's invariant box.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ops
from lm_models import layers, recurrent_layers, rnn_cells

# What `mode` orders of the op.
IMPLEMENTATIONS = {"newton": "parallel", "sequential": "recurrent"}
INPUT_INITS = {
  "kaiming": nn.initializers.variance_scaling(2.0, "fan_in", "uniform"),
  "xavier": nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
}
# Numbers of state up to which a full matrix is worth a solution in parallel.
DENSE_LIMIT = 64


@dataclasses.dataclass(frozen=True)
class Config:
  """One block of a nonlinear recurrent network, followed by a gated MLP."""

  D: int = 1024  # model width
  L: int = 24  # blocks in the whole model; the output projections start smaller by sqrt(L)
  cell: str = "paragru"  # paragru, paralstm, elman, gru, lstm or slstm
  H: int = 4  # heads: blocks of the cell's input projection, and of full recurrent matrices
  W: int = 4  # width of the convolution, tokens; 0 leaves it out
  mode: str | None = None  # newton, sequential (one token after the other); None chooses
  iterations: int = 4  # of Newton's method
  window: int | None = None  # tokens solved at a time, the windows in order; None is all
  policy: str = "ignore"  # of a solution that is none: ignore, warn, fallback (sequential) or nan
  recurrent_clip: float | None = 0.5  # largest magnitude of a and w; None is no limit
  recurrent_std: float | None = None  # of initial a and w, cut at 0.9; None is D^-1/2
  input_init: str = "kaiming"  # of B, uniform: kaiming, xavier
  memory_bias_min: float = 0.0  # initial bias of the gate that keeps the state, first channel;
  memory_bias_max: float = 0.0  # last channel, linear between; positive keeps longer in every cell
  norm_before_gate: bool = True  # norm(h) * silu(z) rather than norm(h * silu(z))
  norm_epsilon: float = 1e-5  # of the norm of the output
  bare: bool = False  # the cell alone: no W_in, convolution, gate, norm and W_out
  residual_scale: bool = True  # learnt scale of the block's input where the output is added to it
  mlp_width: int | None = None  # width of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  dtype: str = "float32"  # of matrix products and activations; the cell's are float32

  def __post_init__(self):
    layers.check_at_least(self, 1, "D", "L", "H", "iterations", "window")
    layers.check_at_least(self, 0, "W", "mlp_width")
    recurrent_layers.check_choice(self, "cell", rnn_cells.KINDS)
    if self.mode is not None:
      recurrent_layers.check_choice(self, "mode", IMPLEMENTATIONS)
    recurrent_layers.check_choice(self, "policy", ops.newton.POLICIES)
    recurrent_layers.check_choice(self, "input_init", INPUT_INITS)
    if self.D % self.H:
      raise ValueError(f"H is {self.H}, must divide D = {self.D}")
    for field in ("recurrent_clip", "recurrent_std"):
      value = getattr(self, field)
      if value is not None and not value > 0:
        raise ValueError(f"{field} is {value}, must be above 0")
    if self.mode == "newton" and self.kind.serial:
      self._check_dense_newton()

  def _check_dense_newton(self):
    numbers, reason = self.kind.numbers * self.D, None
    if self.cell == "slstm":
      reason = (
        "slstm is only run in order, for its state has no bounds and starts in a singular one"
      )
    elif numbers > DENSE_LIMIT:
      reason = (
        f"{self.cell} has a full Jacobian of {numbers} x {numbers} numbers, and"
        f" {DENSE_LIMIT} x {DENSE_LIMIT} are the limit"
      )
    if reason:
      raise ValueError(f"mode is 'newton', must be 'sequential' or None: {reason}")

  @property
  def kind(self) -> rnn_cells.Kind:
    """The cell, and what there is to know of it."""
    return rnn_cells.KINDS[self.cell]

  @property
  def state_shape(self) -> tuple[int, ...]:
    """Of the cell's state, without the batch."""
    numbers = self.kind.numbers
    block = self.kind.cell.structure == "block"
    return (numbers, self.D) if block else (numbers * self.D,)


def init_state(config: Config, batch: int) -> dict[str, Array]:
  """The state before any token: the convolution's last inputs and the cell's numbers, zeros."""
  conv = {} if config.bare else recurrent_layers.conv_state(config, batch, {"x": config.D})
  return {**conv, "memory": jnp.zeros((batch, *config.state_shape), jnp.float32)}


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of the mixer, forward and step by step, for one token, whatever the
  length T; Newton's method repeats those of the cell."""
  D, kind = config.D, config.kind
  heads = D * D // config.H
  matrices = kind.gates * heads * (1 + kind.serial)
  outside = 0.0
  if not config.bare:
    matrices += 3 * D * D
    outside = D * (2 * config.W + 6)  # the convolution; the norm and the gate
  return 2.0 * matrices + D * CELL_FLOPS[config.cell] + outside


# Operations of one channel of a cell, without its matrices and exponentials.
CELL_FLOPS = {"paragru": 20, "paralstm": 24, "elman": 2, "gru": 18, "lstm": 21, "slstm": 32}


class Mixer(nn.Module):
  """The block's mixer: `y, state = Mixer(config).apply(params, x, state, segment_ids)`.

  The collection "metrics" gets `newton_residual`, the largest |h_t - f(h_{t-1}, u_t)|.
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    state: dict[str, Array] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    c, state, new_state = self.config, state or {}, {}
    project = lambda features, name, **kw: layers.Projection(
      features, dtype=c.dtype, name=name, **kw
    )
    if c.bare:
      h, new_state["memory"] = self.recur(x, state.get("memory"), segment_ids)
      return h.astype(c.dtype), new_state
    both = project((2, c.D), "in_proj")(x)
    x, z = both[..., 0, :], both[..., 1, :]
    if c.W:
      conv = recurrent_layers.ShortConv(c.W, c.dtype, _conv_init(c), name="x_conv")
      x, new_state["x_conv"] = conv(x, state.get("x_conv"), segment_ids)
    h, new_state["memory"] = self.recur(x, state.get("memory"), segment_ids)
    norm = layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")
    gate = jax.nn.silu(recurrent_layers.wide(z))
    y = norm(h, gate) if c.norm_before_gate else norm(h * gate)
    return project(c.D, "out_proj", kernel_init=_out_init(c))(y), new_state

  def recur(self, x, memory, segment_ids):
    """What the cell gives for each token of x [B T D], and its state after the last."""
    c, kind = self.config, self.config.kind
    B, T, D = x.shape
    # Once for the whole sequence, whatever the number of iterations.
    u = HeadProjection(kind.gates, c.H, c.dtype, INPUT_INITS[c.input_init], name="input_proj")(x)
    bias = self.param("gate_bias", _gate_bias_init(c), (kind.gates, D))
    u = recurrent_layers.wide(u) + bias
    if memory is None:
      memory = jnp.zeros((B, *c.state_shape), u.dtype)
    implementation = IMPLEMENTATIONS.get(c.mode)
    if T == 1 or (kind.serial and c.mode is None):
      implementation = "recurrent"
    measured = implementation != "recurrent" and self.is_mutable_collection("metrics")
    h, memory, *report = ops.newton_scan(
      kind.cell, self.cell_params(), u, initial_state=memory, segment_ids=segment_ids,
      implementation=implementation, iterations=c.iterations, window=c.window, policy=c.policy,
      report=measured,
    )  # fmt: skip
    if measured:
      largest = jnp.max(jax.lax.stop_gradient(report[0].residual))
      zero = lambda: jnp.zeros((), largest.dtype)
      self.sow("metrics", "newton_residual", largest, reduce_fn=jnp.maximum, init_fn=zero)
    return h.reshape(B, T, kind.numbers, D)[:, :, kind.output], memory

  def cell_params(self) -> dict[str, Array]:
    """The cell's own parameters, as it takes them."""
    c, kind = self.config, self.config.kind
    std = c.D**-0.5 if c.recurrent_std is None else c.recurrent_std
    if kind.serial:
      shape = (kind.gates, c.H, c.D // c.H, c.D // c.H)
      matrix = self.param("recurrent_matrix", _orthogonal_blocks, shape)
      # Where it is split over devices, gathered once rather than at every token.
      params = {"R": layers.constrain(matrix, None, "tensor", None, None)}
      if c.cell == "gru":
        params["b_n"] = self.param("recurrent_bias", nn.initializers.zeros, (c.D,))
      return params
    init = nn.initializers.truncated_normal(std, lower=-0.9 / std, upper=0.9 / std)
    params = {"a": self.param("recurrent_weight", init, (3, c.D))}
    if c.cell == "paralstm":
      params["w"] = self.param("peephole_weight", init, (2, c.D))
    if c.recurrent_clip is None:
      return params
    return jax.tree.map(lambda p: jnp.clip(p, -c.recurrent_clip, c.recurrent_clip), params)


class HeadProjection(nn.Module):
  """u = B x for several gates, B block-diagonal: a head's outputs are of that head's inputs."""

  gates: int
  H: int
  dtype: str
  kernel_init: Callable

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T G D"]:
    B, T, D = x.shape
    width = D // self.H

    def init(key, shape):
      # The same as of one matrix for each head and gate.
      keys = jax.random.split(key, self.gates * self.H)
      blocks = jax.vmap(lambda key: self.kernel_init(key, (width, width)))(keys)
      return jnp.swapaxes(blocks.reshape(self.H, self.gates, width, width), 1, 2)

    kernel = self.param("kernel", init, (self.H, width, self.gates, width)).astype(self.dtype)
    heads = x.astype(self.dtype).reshape(B, T, self.H, width)
    return jnp.einsum("bthd,hdge->btghe", heads, kernel).reshape(B, T, self.gates, D)


def _conv_init(config):
  return lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * config.W**-0.5


def _out_init(config):
  return lambda key, shape: layers.uniform_fan_in(key, shape) * config.L**-0.5


def _gate_bias_init(config):
  """Zeros, and the bias of the gate that keeps the state from channel to channel as configured."""
  gate, sign = config.kind.keeps

  def init(key, shape):
    spread = jnp.linspace(config.memory_bias_min, config.memory_bias_max, shape[1])
    return jnp.zeros(shape).at[gate].set(sign * spread)

  return init


def _orthogonal_blocks(key, shape):
  """An orthogonal matrix for each head and gate, [G H D/H D/H]."""
  keys = jax.random.split(key, shape[0] * shape[1])
  orthogonal = nn.initializers.orthogonal()
  return jax.vmap(lambda key: orthogonal(key, shape[2:]))(keys).reshape(shape)
