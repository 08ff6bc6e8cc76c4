"""Meshes, and where parameters, optimizer state, batches and carried states lie on them."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
# axis. Of several places the first counts whose axes divide the dimensions.
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
  # By heads, and each head's width over fsdp, or, where heads are too narrow for that, more heads.
  (r"/input_proj/kernel$", (P(None, "tensor", "fsdp"), P(None, ("tensor", "fsdp")))),
  (r"/(gate_bias|recurrent_weight|peephole_weight)$", P(None, None, "tensor")),
  (r"/recurrent_matrix$", (P(None, None, "tensor", "fsdp"), P(None, None, ("tensor", "fsdp")))),
  (r"/recurrent_bias$", P(None, "tensor")),
  (r"/residual_scale$", P()),
  (r"norm/scale$", P()),
  (r"ns_coeffs$", P()),  # constants that optax keeps in Muon's state
)


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
  """The mesh with axes data, fsdp, tensor, seq of these sizes, one of which may be -1, the rest.

  Devices that share a slice, or a host where there are no slices, talk fastest. So `data` crosses
  slices first, then what it leaves over `fsdp`, `seq` and `tensor`, in this order. Within a TPU
  slice the axes follow its torus. Every process finds the same mesh, and so does a compiler that
  knows the devices by their topology only.

  Args:
    sizes: of the four axes, devices.
    devices: to be laid out; all that there are by default.

  Raises:
    UserError: a size that is neither positive nor -1, more than one -1, sizes that the devices do
      not fill, or that leave a slice or a process with fewer devices than another.
  """
  devices = list(jax.devices() if devices is None else devices)
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
  used = devices[: math.prod(shape)]
  said = f"mesh is {dict(zip(AXES, shape))}, which takes {len(used)} of {len(devices)} devices"
  idle = {device.process_index for device in devices} - {device.process_index for device in used}
  if idle:
    raise UserError(f"{said} and none of process {min(idle)}: every process must hold some")
  groups: dict[int, list] = {}
  for device in used:
    groups.setdefault(_fast_group(device), []).append(device)
  if len({len(group) for group in groups.values()}) > 1:
    counts = ", ".join(str(len(group)) for group in groups.values())
    raise UserError(f"{said}, {counts} of each slice or host: it must take as many of each")
  # JAX raises any of these where a topology has no room for a shape of the mesh.
  try:
    grid = _lay_out(shape, [groups[key] for key in sorted(groups)])
  except (AssertionError, NotImplementedError, ValueError) as error:
    raise UserError(f"{said}: they cannot be laid out so: {' '.join(str(error).split())}") from None
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fast_group(device) -> int:
  """Number of the slice that a device is in, or of its host where a backend knows no slices."""
  number = getattr(device, "slice_index", None)
  if number is not None:
    return number
  return 0 if device.platform == "tpu" else device.process_index


def _lay_out(shape, groups) -> np.ndarray:
  """The devices of equal groups as an array of this shape, each axis first over groups, then
  within."""
  left, outer = len(groups), dict.fromkeys(AXES, 1)
  for axis in ("data", "fsdp", "seq", "tensor"):
    outer[axis] = math.gcd(shape[AXES.index(axis)], left)
    left //= outer[axis]
  across = [outer[axis] for axis in AXES]
  within = [size // over for size, over in zip(shape, across)]
  blocks = np.stack(
    [
      mesh_utils.create_device_mesh(within, devices=group, allow_split_physical_axes=True)
      for group in groups
    ]
  )
  n = len(AXES)
  order = [place for axis in range(n) for place in (axis, n + axis)]
  return blocks.reshape(*across, *within).transpose(order).reshape(shape)


def rows_over(arrays: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of the mesh that the rows of a batch are spread over.

  Args:
    arrays: number of axes of each array of a batch. Those with two have a time axis, which takes
      `seq`; where none has, as in batches of images, the rows take it.
  """
  return BATCH if 2 in arrays.values() else (*BATCH, "seq")


def check_rows(mesh: Mesh, arrays: Mapping[str, int], field: str, rows: int, parts: int = 1):
  """Raises UserError where the rows of a batch cannot be spread over the mesh evenly.

  Args:
    mesh: from `make_mesh`.
    arrays: number of axes of each array of a batch.
    field: that says how many rows there are.
    rows: how many.
    parts: into which `train.accumulate` cuts them, one computed after the other.
  """
  axes = rows_over(arrays)
  shards = math.prod(mesh.shape[axis] for axis in axes)
  if parts < 1 or rows < 1 or rows % (shards * parts):
    names, numbers = " * ".join(f"mesh.{axis}" for axis in axes), f"{shards}"
    if parts != 1:
      names, numbers = f"{names} * train.accumulate", f"{numbers} * {parts}"
    raise UserError(f"{field} is {rows}, must be a multiple of {names} = {numbers}")


def check_lengths(mesh: Mesh, arrays: Mapping[str, int], field: str, lengths: Iterable[int]):
  """Raises UserError where `seq` does not divide the tokens of a row.

  Args:
    mesh: from `make_mesh`.
    arrays: number of axes of each array of a batch.
    field: that says how many tokens there are.
    lengths: how many, one or several.
  """
  for length in lengths if 2 in arrays.values() else ():
    if length % mesh.shape["seq"]:
      raise UserError(f"{field} is {length}, must be a multiple of mesh.seq = {mesh.shape['seq']}")


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
    specs = first_match(PARAMETER_RULES, name, "sharding.PARAMETER_RULES")
    specs = (specs,) if isinstance(specs, P) else specs
    for spec in specs:
      if not any(_misfits(mesh, leaf.shape, spec)):
        return NamedSharding(mesh, spec)
    size, axis = next(_misfits(mesh, leaf.shape, specs[0]))
    raise UserError(
      f"mesh.{axis} is {mesh.shape[axis]}, which does not divide the {size} of {name} {leaf.shape}"
    )

  return jax.tree_util.tree_map_with_path(place, tree)


def _misfits(mesh: Mesh, shape: tuple[int, ...], spec: P) -> Iterator[tuple[int, str]]:
  """(size, axes) of each dimension that the axes it is to be split over do not divide."""
  for size, axes in zip(shape, spec):
    names = (axes,) if isinstance(axes, str) else axes or ()
    if size % math.prod(mesh.shape[name] for name in names):
      yield size, names[0]


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Where a model's carried state [repeats B ...] lies: its rows beside the rows of the batch."""
  return jax.tree.map(lambda _: NamedSharding(mesh, P(None, BATCH)), state)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Where an array of a batch lies: [B], [B T], or [B Y X ...], a grid without a time axis."""
  specs = {1: P(BATCH), 2: P(BATCH, "seq")}
  return NamedSharding(mesh, specs.get(ndim, P((*BATCH, "seq"))))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def rows_of_process(mesh: Mesh, rows: int) -> tuple[slice, ...]:
  """Which of the rows of a batch this process' devices hold, as few slices, in order.

  Where an axis other than data and fsdp crosses processes, several of them hold the same rows.
  """
  held = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((rows,)).values()
  joined: list[slice] = []
  for begin, end, _ in sorted({index.indices(rows) for (index,) in held}):
    if joined and joined[-1].stop == begin:
      begin = joined.pop().start
    joined.append(slice(begin, end))
  return tuple(joined)


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Makes global arrays of the rows that this process read, those of `rows_of_process`.

  Each device takes its part of these, of time too.
  """
  blocks = mesh.shape["data"] * mesh.shape["fsdp"]
  parts = rows_of_process(mesh, blocks)
  held = [block for part in parts for block in range(part.start, part.stop)]

  def place(read: np.ndarray) -> jax.Array:
    rows = len(read) // len(held)  # of a block

    def part_of(index: tuple[slice, ...]) -> np.ndarray:
      begin, end, _ = index[0].indices(rows * blocks)
      place = held.index(begin // rows) * rows + begin % rows
      return read[(slice(place, place + end - begin), *index[1:])]

    shape = (rows * blocks, *read.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh, read.ndim), part_of)

  return {name: place(read) for name, read in batch.items()}
