"""What several architectures share: projections, norms, the gated MLP, rotary positions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.rotary import rotary as rotary

# Torch's default for linear layers and convolutions, U(-fan_in^-1/2, fan_in^-1/2): the published
# Mamba models start from it.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def check_at_least(config: Any, least: int, *fields: str) -> None:
  """Raises ValueError where one of these fields of a Config is given and below `least`."""
  for field in fields:
    value = getattr(config, field)
    if value is not None and value < least:
      raise ValueError(f"{field} is {value}, must be at least {least}")


def constrain(x: Array, *axes: str | Sequence[str] | None) -> Array:
  """Places `x` over the axes of the mesh in force; the identity where no mesh is set.

  Args:
    x: any array.
    *axes: for each dimension of `x` the mesh axis or axes it is split over, or None. Axes that the
      mesh does not have are left out, so that one model serves every mesh; and a dimension that the
      devices do not divide is left whole, as one row to sample from, or one token.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x

  def present(size, axis):
    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
    names = tuple(name for name in names if name in mesh.axis_names)
    return None if size % math.prod(mesh.shape[name] for name in names) else names or None

  return jax.lax.with_sharding_constraint(x, jax.P(*map(present, x.shape, axes)))


def product(
  x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int = 1, dtype=None
) -> Float[Array, "..."]:
  """Contracts the last `inputs` axes of `x` with the first ones of `kernel`.

  Args:
    x: activations, [B T ...].
    kernel: weights, the contracted axes first.
    inputs: how many axes are contracted.
    dtype: of the result and of the sums; None is that of `x`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  leading, features = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
  # XLA transposes the operands of a weight's gradient that sums over two axes, which costs a CPU
  # three times the product: as plain matrices nothing is moved. Axes that are split over devices
  # stay as they are, for a merged axis could not be split.
  if mesh.empty or all(mesh.shape.get(axis, 1) == 1 for axis in ("tensor", "seq")):
    summed = math.prod(kernel.shape[:inputs])
    y = jnp.matmul(x.reshape(-1, summed), kernel.reshape(summed, -1), preferred_element_type=dtype)
    return y.reshape(*leading, *features)
  contracted = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
  return jax.lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=dtype)


def parts_of(n: int, axes: str | Sequence[str]) -> int:
  """Over how many devices of the mesh in force these of its axes spread n rows or tokens."""
  mesh = jax.sharding.get_abstract_mesh()
  names = (axes,) if isinstance(axes, str) else axes
  devices = 1 if mesh.empty else math.prod(mesh.shape.get(name, 1) for name in names)
  return devices if n % devices == 0 else 1


def running_count(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """How many tokens of a row up to each one have True, int32.

  Where devices share time each counts its own and adds what those before it have: only these sums
  are sent.
  """
  B, T = mask.shape
  parts = parts_of(T, "seq")
  counts = constrain(mask.reshape(B, parts, T // parts), ("data", "fsdp"), "seq", None)
  counts = jnp.cumsum(counts, axis=2, dtype=jnp.int32)
  totals = counts[:, :, -1]
  before = jnp.cumsum(totals, axis=1) - totals
  return (counts + before[:, :, None]).reshape(B, T)


def look_up(embedding: Float[Array, "vocab D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """The rows of an embedding that tokens name, where activations lie.

  A table that is split both ways is brought, before anything is looked up, to a form from which
  XLA can partition the look-up; from there it would find no other way than to copy all activations
  to every device. Its width is gathered, as that of any weight that `fsdp` splits. Its rows stay
  split over `tensor`, where each device looks up what it has and the results are summed, unless
  that moves more than the whole table does: with n tokens to a device, 2 n vectors of D numbers
  against 3 vocab, the table itself and, twice, the sum of its gradient.
  """
  mesh = jax.sharding.get_abstract_mesh()
  spread = 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in ("data", "fsdp", "seq"))
  vectors = 2 * tokens.size / spread
  rows = "tensor" if vectors < 3 * embedding.shape[0] else None
  return constrain_activations(jnp.take(constrain(embedding, rows, None), tokens, axis=0))


def constrain_activations(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """Splits the batch over `data` and `fsdp` and time over `seq`: how activations lie between
  blocks."""
  return constrain(x, ("data", "fsdp"), "seq", None)


def largest_sown(collections: Mapping[str, Any]) -> dict[str, Array]:
  """The largest value of each metric that layers have sown, by its name, whichever layer it is of.

  Args:
    collections: what `apply(..., mutable=["metrics"])` returns second.
  """
  largest: dict[str, Array] = {}
  for path, value in jax.tree_util.tree_leaves_with_path(collections.get("metrics", {})):
    name = path[-1].key
    largest[name] = jnp.maximum(largest.get(name, -jnp.inf), jnp.max(value))
  return largest


class RMSNorm(nn.Module):
  """y = x / rms(x) * scale over the last axis, computed in float32. Zhang and Sennrich, 2019.

  The scale is shared by all but the last `scale_axes` axes. A gate, where given, multiplies the
  result before it is rounded to `dtype`.
  """

  epsilon: float = 1e-5
  dtype: str = "float32"
  scale_axes: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, "*axes D"], gate: Float[Array, "*axes D"] | None = None
  ) -> Float[Array, "*axes D"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[x.ndim - self.scale_axes :])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * scale
    return (y if gate is None else y * gate).astype(self.dtype)


class Projection(nn.Module):
  """y = x W (+ b) over the last `inputs` axes of x, with several output axes where that helps.

  Keeping, say, the two halves of a gated projection on an axis of their own lets the width be split
  over devices without moving the halves.
  """

  features: int | tuple[int, ...]
  inputs: int = 1
  bias: bool = False
  dtype: str = "float32"
  kernel_init: Callable = uniform_fan_in
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
    contracted = x.shape[x.ndim - self.inputs :]
    matrix = (math.prod(contracted), math.prod(features))

    def kernel_init(key, shape):
      return self.kernel_init(key, matrix).reshape(shape)

    kernel = self.param("kernel", kernel_init, (*contracted, *features))
    y = product(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
    if self.bias:
      y = y + self.param("bias", self.bias_init, features).astype(self.dtype)
    return y


def gated_mlp_width(D: int, ratio: float = 4.0, multiple: int = 256) -> int:
  """The usual width of a gated MLP: 2/3 of `ratio` D, rounded up to a `multiple`."""
  return multiple * -(-int(D * ratio * 2 / 3) // multiple)


class GatedMLP(nn.Module):
  """y = W_out (silu(W_gate x) * W_up x). Shazeer, "GLU Variants Improve Transformer", 2020."""

  width: int
  dtype: str = "float32"
  kernel_init: Callable = uniform_fan_in
  out_init: Callable = uniform_fan_in

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    both = Projection(
      (2, self.width), dtype=self.dtype, kernel_init=self.kernel_init, name="in_proj"
    )
    gate, up = jnp.moveaxis(both(x), -2, 0)
    out = Projection(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="out_proj")
    return out(jax.nn.silu(gate) * up)
