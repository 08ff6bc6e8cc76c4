"""Which implementation of an op runs, and why; and the one place where arguments are checked.

Every op declares its implementations once, best first. A user's string is an order: what cannot
run raises a ValueError with the reason, and nothing is tried and caught.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Reason = str | None
IMPLEMENTATIONS = ("recurrent", "parallel", "chunked", "pallas")  # the names there are


class Implementation(NamedTuple):
  """One way to compute an op."""

  run: Callable | None  # None: it does not exist, and `supports` says so
  supports: Callable[..., Reason]  # of the op's arguments by name; None if it can run, else why not
  character: str  # what it is good and bad at, in a few words


def anything(**arguments) -> Reason:
  """The `supports` of an implementation without limits."""
  return None


def no_kernel(**arguments) -> Reason:
  """The `supports` of a kernel that nobody has written."""
  return "there is no kernel for this op yet"


NO_KERNEL = Implementation(None, no_kernel, "one kernel for the device at hand")

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """The device family that ops are traced for: "cpu", "gpu" or "tpu"."""
  return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def for_platform(name: str):
  """Within it, implementations are chosen for `name`: to compile on a CPU what a TPU will run."""
  token = _platform.set(name)
  try:
    yield
  finally:
    _platform.reset(token)


Preference = Callable[..., list[str]]
_declared: dict[str, tuple[Mapping[str, Implementation], Preference]] = {}


def declare(
  op: str, implementations: Mapping[str, Implementation], preference: Preference | None = None
):
  """Registers the implementations of `op`, best first unless `preference` lists them."""
  _declared[op] = (implementations, preference or (lambda **arguments: list(implementations)))


class Call(NamedTuple):
  """What `choose` decided, once."""

  op: str
  ordered: str | None  # the implementation that was asked for, if any
  chosen: str
  arguments: dict[str, Any]


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def recorded():
  """Within it, every call of an op that is traced is appended to the list it yields."""
  calls: list[Call] = []
  token = _calls.set(calls)
  try:
    yield calls
  finally:
    _calls.reset(token)


def choose(op: str, implementation: str | None, **arguments) -> tuple[str, Callable]:
  """The name and the function of the implementation that runs `op` on `arguments`.

  Raises:
    ValueError: `implementation` is not one of the op's, or cannot run on these arguments.
  """
  implementations, preference = _declared[op]
  if implementation is None:
    names = preference(**arguments)
    chosen = next(name for name in names if implementations[name].supports(**arguments) is None)
  elif implementation not in implementations:
    raise ValueError(
      f"{op}: implementation {implementation!r} is not one of {', '.join(implementations)}"
    )
  else:
    chosen, reason = implementation, implementations[implementation].supports(**arguments)
    if reason is not None:
      raise ValueError(f"{op}: implementation {implementation!r} cannot run: {reason}")
  calls = _calls.get()
  if calls is not None:
    calls.append(Call(op, implementation, chosen, arguments))
  return chosen, implementations[chosen].run


def refusal(op: Callable, implementation: str, **arguments) -> Reason:
  """Why `implementation` cannot run `op` on these arguments, given by name; None if it can."""
  implementations, _ = _declared[op.__name__]
  if implementation not in implementations:
    return f"{op.__name__} has no implementation {implementation!r}"
  optional = inspect.signature(op).parameters
  defaults = {name: p.default for name, p in optional.items() if p.default is not p.empty}
  return implementations[implementation].supports(**{**defaults, **arguments})


def explain(function: Callable, *args, **kwargs) -> str:
  """Prints and returns which implementation each op in `function(*args, **kwargs)` would run, and
  why each other would not.

  Args:
    function: an op, or anything that calls ops, such as a model's apply.
    *args, **kwargs: of `function`; arrays may be `jax.ShapeDtypeStruct`: nothing is computed.

  Raises:
    ValueError: what `function` raises on these arguments.
  """
  leaves, treedef = jax.tree.flatten((args, kwargs))
  is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
  arrays = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf, yes in zip(leaves, is_array) if yes
  ]

  def traced(arrays):
    given = iter(arrays)
    merged = [next(given) if yes else leaf for leaf, yes in zip(leaves, is_array)]
    args, kwargs = jax.tree.unflatten(treedef, merged)
    return jax.tree.leaves(function(*args, **kwargs))

  with recorded() as calls:
    jax.eval_shape(traced, arrays)
  text = "\n".join(dict.fromkeys(map(_explanation, calls))) or "no op is called"
  print(text)
  return text


def _explanation(call: Call) -> str:
  implementations, _ = _declared[call.op]
  shapes = ", ".join(
    f"{key} {_shape(value)}" for key, value in call.arguments.items() if hasattr(value, "shape")
  )
  lines = [f"{call.op} on {platform()}: {shapes}"]
  for key, candidate in implementations.items():
    reason = candidate.supports(**call.arguments)
    if key == call.chosen:
      verdict = "runs, as ordered" if call.ordered else "runs"
    elif reason is not None:
      verdict = f"cannot run: {reason}"
    else:
      verdict = f"can run, but {call.chosen} "
      verdict += "was ordered" if call.ordered else "is preferred here"
    lines.append(f"  {key:<10} {verdict} ({candidate.character})")
  return "\n".join(lines)


def _shape(array: Any) -> str:
  return f"{jax.numpy.dtype(array.dtype).name}[{' '.join(map(str, array.shape))}]"


def check_shapes(**expected: tuple[Any, str]):
  """Checks arrays, each given as `name=(array or None, "letters")`; a letter means one size
  throughout.

  A letter may be followed by a difference, as in "B W-1 D".

  Raises:
    ValueError: naming the argument, the shape it has and the shape expected.
  """
  sizes: dict[str, int] = {}
  for name, (array, letters) in expected.items():
    if array is None:
      continue
    axes = letters.split()
    known = [_size(axis, sizes) for axis in axes]
    shape = tuple(array.shape)
    if len(shape) != len(axes) or any(k is not None and k != n for k, n in zip(known, shape)):
      where = ", ".join(f"{axis}={k}" for axis, k in zip(axes, known) if k is not None)
      raise ValueError(
        f"{name} has shape {shape}, expected [{letters}]{' with ' if where else ''}{where}"
      )
    sizes.update({axis: n for axis, n in zip(axes, shape) if axis.isalpha()})
    if 0 in shape and "-" not in letters:
      raise ValueError(f"{name} has shape {shape}, expected [{letters}] with every size at least 1")


def _size(axis: str, sizes: Mapping[str, int]) -> int | None:
  letter, _, less = axis.partition("-")
  return sizes[letter] - int(less or 0) if letter in sizes else None


def check_dtypes(*, complex_allowed: bool = False, **arrays: Any):
  """Raises ValueError unless each array given, None aside, is floating, or complex if allowed."""
  allowed = jax.numpy.inexact if complex_allowed else jax.numpy.floating
  for name, array in arrays.items():
    if array is not None and not jax.numpy.issubdtype(array.dtype, allowed):
      expected = "a floating or complex dtype" if complex_allowed else "a floating dtype"
      raise ValueError(f"{name} has dtype {array.dtype}, expected {expected}")


def check_segment_ids(segment_ids: Any):
  """Raises ValueError unless `segment_ids` is None or has an integer dtype."""
  if segment_ids is not None and not jax.numpy.issubdtype(segment_ids.dtype, jax.numpy.integer):
    raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected int32")


def check_chunk_size(chunk_size: int | None):
  """Raises ValueError unless `chunk_size` is None or a positive int."""
  if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
    raise ValueError(f"chunk_size is {chunk_size!r}, expected an int of at least 1")
