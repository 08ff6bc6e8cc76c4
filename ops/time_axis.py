"""Where time is split: an op called under a mesh whose axis `seq` has several devices runs its
sequence-parallel form.

    with jax.set_mesh(mesh):                       # axes data, fsdp, tensor, seq, of Auto type
      y, state = jax.jit(ops.ssd)(...)             # the same call; T is split over seq

The form is traced inside `jax.shard_map` over every axis of the mesh: rows over data and fsdp,
time over seq, heads or channels over tensor, each where the devices divide it. There the axes are
Manual, and the very same op, called on a shard, runs as on one device. `ops.sharded` holds the
forms. They are for use under `jax.jit`: called by itself an op is traced anew each time. They have
no forward-mode derivatives.
"""

import contextlib
import contextvars
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ops import dispatch

TIME = "seq"
# The mesh axes that a letter of a shape is split over.
AXES = {"B": ("data", "fsdp"), "T": (TIME,), "H": ("tensor",), "Hq": ("tensor",), "D": ("tensor",)}
METHODS = ("all_gather", "all_scan", "doubling")

_exchange: contextvars.ContextVar[tuple[str, int | None]] = contextvars.ContextVar(
  "exchange", default=("auto", None)
)


@contextlib.contextmanager
def exchange(method: str, blocks: int | None = None):
  """Within it, states move between devices by `method`: in what is traced within it, for a jitted
  function that has been traced before is not traced again.

  Args:
    method: "all_gather", "all_scan", "doubling", or "auto": the first for up to 8 devices along
      time, the last for more.
    blocks: that "all_scan" sends a state in; None chooses by its size. Taken down to what divides
      the state's last axis.

  Raises:
    ValueError: there is no such method, or no such number of blocks.
  """
  if method not in (*METHODS, "auto"):
    raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)} or auto")
  if blocks is not None and blocks < 1:
    raise ValueError(f"blocks is {blocks}, expected at least 1 or None")
  token = _exchange.set((method, blocks))
  try:
    yield
  finally:
    _exchange.reset(token)


class Split(NamedTuple):
  """How an op's time is split; made outside of `shard_map`, used inside."""

  P: int  # devices along time
  method: str  # of METHODS
  reverse: bool  # time runs from the last device to the first
  blocks: int | None = None  # of a state, for "all_scan"
  axis: str = TIME

  def order(self) -> jax.Array:
    """This device's place in time, from 0."""
    index = jax.lax.axis_index(self.axis)
    return self.P - 1 - index if self.reverse else index

  def send(self, x: Any, hops: int = 1, places: range | None = None) -> Any:
    """What the device `hops` places earlier in time holds; zeros where there is none.

    Args:
      x: a pytree of arrays.
      hops: how far.
      places: of the senders, where not all send.
    """
    index = lambda place: self.P - 1 - place if self.reverse else place
    senders = [place for place in places or range(self.P) if place + hops < self.P]
    links = [(index(place), index(place + hops)) for place in senders]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, links), x)

  def from_last(self, x: Any) -> Any:
    """What the last device in time holds, on all."""
    last = self.order() == self.P - 1
    only = lambda leaf: jax.lax.select(
      jax.lax.broadcast(last, leaf.shape), leaf, jax.lax.full_like(leaf, 0)
    )
    return jax.tree.map(lambda leaf: jax.lax.psum(only(leaf), self.axis), x)


# A form takes a Split and the op's arguments by name, arrays being shards, and returns what the op
# does, arrays being shards, the final state being that of all time on every device.
Form = Callable[[Split, Mapping[str, Any]], Any]


class Declared(NamedTuple):
  form: Form
  letters: Mapping[str, str]  # of the arguments that are arrays, or pytrees of arrays
  returns: tuple[str, ...]  # of the results
  unsplit: Callable[..., bool]  # whether these arguments make the op run as if time were not split


_declared: dict[str, Declared] = {}


def declare(
  op: str,
  form: Form,
  letters: Mapping[str, str],
  returns: tuple[str, ...],
  unsplit: Callable[..., bool] = lambda **arguments: False,
):
  """Registers the sequence-parallel form of `op`.

  Args:
    op: its name.
    form: see `Form`.
    letters: for each argument that may be split, the letters of its shape, as in "B T D"; fewer
      letters than axes stand for the first ones. An argument may be a pytree of such arrays.
    returns: likewise, of each result; "" is one that is the same on every device.
    unsplit: a function of the arguments by name; True runs the op itself.
  """
  _declared[op] = Declared(form, letters, returns, unsplit)


def devices_along_time() -> int:
  """Devices over which the mesh in force splits time; 1 where there is no such mesh, or inside of
  `shard_map`, where a shard is all there is."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or TIME not in mesh.axis_names:
    return 1
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  return mesh.shape[TIME] if kinds[TIME] == jax.sharding.AxisType.Auto else 1


def splits_time(op: Callable) -> Callable:
  """Decorates an op that has a declared form, which runs where time is split.

  Where the devices do not divide T the op itself runs, and XLA places its arrays.
  """
  signature = inspect.signature(op)

  @functools.wraps(op)
  def call(*args, **kwargs):
    if devices_along_time() == 1:
      return op(*args, **kwargs)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return _split(op, bound)

  return call


def _split(op, bound):
  arguments, declared = bound.arguments, _declared[op.__name__]
  given = {name: value for name, value in arguments.items() if name in declared.letters}
  given = jax.tree.map(jax.numpy.asarray, given)  # parameters may be numbers
  # Mistakes are told in the shapes that the caller knows, not in those of shards.
  with dispatch.recorded():  # what is chosen here does not run
    expected = jax.eval_shape(lambda arrays: _call(op, bound, arrays), given)
  sizes = _sizes(given, declared.letters)
  mesh, P = jax.sharding.get_abstract_mesh(), devices_along_time()
  if sizes["T"] % P or declared.unsplit(**arguments):
    return op(*bound.args, **bound.kwargs)
  spec = lambda letters: jax.P(*(_axes(mesh, letter, sizes) for letter in letters.split()))
  place = lambda letters, tree: jax.tree.map(lambda _: spec(letters), tree)
  method, blocks = _exchange.get()
  if method == "auto":
    method = "all_gather" if P <= 8 else "doubling"
  split = Split(P, method, bool(arguments.get("reverse")), blocks)
  others = {name: value for name, value in arguments.items() if name not in given}
  body = lambda arrays: declared.form(split, {**others, **arrays})
  in_specs = {name: place(declared.letters[name], value) for name, value in given.items()}
  out_specs = tuple(place(letters, tree) for letters, tree in zip(declared.returns, expected))
  return jax.shard_map(body, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)(given)


def _call(op, bound, arrays):
  changed = inspect.BoundArguments(bound.signature, {**bound.arguments, **arrays})
  return op(*changed.args, **changed.kwargs)


def _sizes(given, letters) -> dict[str, int]:
  sizes = {}
  for name, tree in given.items():
    for leaf in jax.tree.leaves(tree):
      sizes |= dict(zip(letters[name].split(), leaf.shape))
  return sizes


def _axes(mesh, letter: str, sizes) -> tuple[str, ...] | None:
  """The mesh axes that a letter is split over, if their devices divide it."""
  axes = tuple(axis for axis in AXES.get(letter, ()) if mesh.shape.get(axis, 1) > 1)
  count = math.prod(mesh.shape[axis] for axis in axes)
  # Groups of heads stay together: H is a multiple of Hq, or all heads share the one of q.
  others = [sizes["Hq"]] if letter == "H" and sizes.get("Hq", 1) > 1 else []
  fits = all(size % count == 0 for size in (sizes.get(letter, 0), *others))
  return axes if axes and fits else None
