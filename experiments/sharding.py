"""Meshes, and where parameters, optimizer state, batches and carried states lie on them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments.errors import UserError
from experiments.rules import first_match, path_name

AXES = ("data", "fsdp", "tensor", "seq")
BATCH = ("data", "fsdp")
P = jax.P

# Where each parameter lies; a block's parameters have the repeats of the pattern on their first
# axis.
# The optimizer's moments and the averaged weights end in the same paths and follow the same rules.
PARAMETER_RULES = (
  (r"position_embedding$", P(None, None, "fsdp")),
  (r"\bpatch_proj/kernel$", P(None, "fsdp")),
  (r"\bhead_proj/kernel$", P("fsdp", None)),
  (r"\b(patch|head)_proj/bias$", P()),
  (r"embedding$", P("tensor", "fsdp")),
  (r"\bhead$", P("fsdp", "tensor")),
  (r"/in_proj/kernel$", P(None, "fsdp", None, "tensor")),
  (r"/(query|key|value|gate)_proj/kernel$", P(None, "fsdp", "tensor", None)),
  (r"/(query|key|value)_proj/bias$", P(None, "tensor", None)),
  (r"/(query|key|value)_heads/kernel$", P(None, "tensor", None, None)),
  (r"/(query|key|value)_heads/bias$", P(None, "tensor", None)),
  (r"_plstm/mixer/[a-z]+_gate/kernel$", P(None, "fsdp", "tensor", None)),
  (r"_plstm/mixer/[a-z]+_gate/bias$", P(None, "tensor", None)),
  (r"/(source|transition|mark|angle|direct)_gate/(kernel|bias)$", P()),
  (r"/up_proj/kernel$", P(None, "fsdp", "tensor")),
  (r"/up_proj/bias$", P(None, "tensor")),
  (r"/down_proj/kernel$", P(None, "tensor", "fsdp")),
  (r"/(down|out)_proj/bias$", P()),
  (r"/(beta|decay)_proj/kernel$", P(None, "fsdp", "tensor")),
  (r"/(gate|decay)_down_proj/kernel$", P(None, "fsdp", None)),
  (r"/(gate|decay)_up_proj/kernel$", P(None, None, "tensor", None)),
  (r"/(gate|decay)_up_proj/bias$", P(None, "tensor", None)),
  (r"/bc_proj/kernel$", P(None, "fsdp")),
  (r"/bc_conv/conv_(weight|bias)$", P()),
  (r"attention/mixer/out_proj/kernel$", P(None, "tensor", None, "fsdp")),
  (r"/out_proj/kernel$", P(None, "tensor", "fsdp")),
  (r"/x_proj/kernel$", P(None, "tensor", None)),
  (r"/dt_proj/kernel$", P(None, None, "tensor")),
  (r"/conv_weight$", P(None, None, "tensor")),
  (r"/(conv_bias|dt_bias|skip|A_log)$", P(None, "tensor")),
  (r"/input_proj/kernel$", P(None, "tensor", "fsdp")),
  (r"/(gate_bias|recurrent_weight|peephole_weight)$", P(None, None, "tensor")),
  (r"/recurrent_matrix$", P(None, None, "tensor", "fsdp")),
  (r"/recurrent_bias$", P(None, "tensor")),
  (r"/residual_scale$", P()),
  (r"norm/scale$", P()),
  (r"ns_coeffs$", P()),  # constants that optax keeps in Muon's state
)


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
  """The mesh with axes data, fsdp, tensor, seq of these sizes, one of which may be -1, the rest.

  Raises:
    UserError: a size that is neither positive nor -1, more than one -1, sizes that the devices do
    not
      fill.
  """
  devices = jax.devices() if devices is None else devices
  shape = [sizes[axis] for axis in AXES]
  for axis, size in zip(AXES, shape):
    if size < 1 and size != -1:
      raise UserError(f"mesh.{axis} is {size}, must be at least 1, or -1 for the rest")
  if shape.count(-1) > 1:
    raise UserError(f"mesh is {dict(zip(AXES, shape))}: only one axis may be -1")
  known = math.prod(size for size in shape if size != -1)
  if len(devices) % known or (-1 not in shape and known > len(devices)):
    raise UserError(f"mesh is {dict(zip(AXES, shape))}, which {len(devices)} devices cannot fill")
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if shape[AXES.index("seq")] > 1:
    raise UserError(f"mesh.seq is {shape[AXES.index('seq')]}: training does not split time, use 1")
  used = devices[: math.prod(shape)]
  grid = mesh_utils.create_device_mesh(shape, devices=used, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
  """Over how many devices the rows of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
  """Where each leaf of parameters, or of an optimizer state made of them, lies.

  Args:
    mesh: from `make_mesh`.
    tree: of arrays or shapes whose paths end in parameter paths; scalars are copied everywhere.

  Raises:
    UserError: a path that no rule covers, or a dimension that its axis does not divide.
  """

  def place(path, leaf):
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    name = path_name(path)
    spec = first_match(PARAMETER_RULES, name, "sharding.PARAMETER_RULES")
    for size, axis in zip(leaf.shape, spec):
      if axis and size % mesh.shape[axis]:
        raise UserError(
          f"mesh.{axis} is {mesh.shape[axis]}, which does not divide the {size} of {name}"
          f" {leaf.shape}"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Where a model's carried state [repeats B ...] lies: its rows beside the rows of the batch."""
  return jax.tree.map(lambda _: NamedSharding(mesh, P(None, BATCH)), state)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Where an array of a batch lies: [B] or [B T]."""
  return NamedSharding(mesh, P(BATCH) if ndim == 1 else P(BATCH, "seq"))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Makes global arrays of the rows that this process read."""
  return {
    name: jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)
    for name, rows in batch.items()
  }
