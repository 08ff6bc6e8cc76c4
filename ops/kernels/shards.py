"""Kernels under a mesh of several devices.

XLA cannot share out a kernel: it gathers every operand on every device, and all compute the same.
So a kernel is called inside of `jax.shard_map`, on rows shared over data and fsdp and heads or
channels over tensor, as `ops.time_axis` has them; there is nothing to send but the gradients of
what several devices read. Where a mesh splits time, `ops.time_axis` does all that around the op.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from ops.time_axis import AXES, devices_along_time


def axes(letter: str) -> tuple[str, ...]:
  """The axes of the mesh in force, of several devices each, that share a letter of a shape."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  manual = jax.sharding.AxisType.Manual
  names = AXES.get(letter, ())
  return tuple(x for x in names if mesh.shape.get(x, 1) > 1 and kinds[x] != manual)


def refusal(**sizes: int) -> str | None:
  """Why devices cannot share the letters of these sizes; None if they can."""
  if devices_along_time() > 1:
    return None
  for letter, size in sizes.items():
    devices = _devices(letter)
    if size % devices:
      return f"{letter} is {size}, and {devices} devices share it"
  return None


def part(letter: str, size: int) -> int:
  """Of a letter of this size, what one device holds where all share it."""
  devices = 1 if devices_along_time() > 1 else _devices(letter)
  return size if size % devices else size // devices


def on_shards(run: Callable, letters: Any, returned: Any, arguments: tuple, **sizes: int) -> Any:
  """`run(*arguments)`, where devices share arrays by what each holds of them.

  Args:
    run: a function of arrays that keeps what different devices hold apart.
    letters: for each argument its letters, as in "B T H"; fewer letters than axes stand for the
      first ones. An argument may be a pytree of arrays, its letters a prefix of that tree.
    returned: likewise, of the results.
    arguments: of `run`.
    sizes: of the letters that devices may share. A letter whose size they do not divide is whole
      on all of them.
  """
  if not any(map(axes, AXES)):
    return run(*arguments)
  shared = {x: axes(x) for x, size in sizes.items() if axes(x) and size % _devices(x) == 0}
  spec = lambda text: jax.P(*(shared.get(letter) for letter in text.split()))
  specs = lambda tree: jax.tree.map(spec, tree)
  # The loops of a kernel do not say what differs from device to device.
  shard_map = jax.shard_map(
    run, in_specs=specs(letters), out_specs=specs(returned), check_vma=False
  )
  return shard_map(*arguments)


def _devices(letter: str) -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[x] for x in axes(letter))
