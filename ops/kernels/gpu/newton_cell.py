"""A user's cell as a function of one channel's numbers, for kernels whose threads own channels.

The cell is traced once with as many channels as no other axis has. Where nothing that it does
touches the axis of channels, each operation is one on every channel's own number, and each array
[... D] is an array [...] of them. In a kernel such a number is a vector, one per thread; functions
of it, and their gradients, are made of operations on vectors of one shape.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ELEMENTWISE = {
  "abs", "add", "add_any", "and", "convert_element_type", "copy", "cos", "div", "eq", "exp", "exp2",
  "ge", "gt", "integer_pow", "le", "log", "log2", "logistic", "lt", "max", "min", "mul", "ne",
  "neg", "not", "one_minus_square", "or", "rsqrt", "select_n", "sign", "sin", "sqrt", "square",
  "sub", "tanh",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call"}


class Refusal(ValueError):
  """Why a cell is no function of one channel's numbers."""


class ChannelCell(NamedTuple):
  """new = step(params, h, x), each a flat list of numbers of one channel."""

  jaxpr: Any
  channels: int  # of the axis that stands for channels in it
  shapes: tuple[tuple[int, ...], ...]  # of the inputs, without the channels
  counts: tuple[int, int, int]  # numbers per channel of params, h and all of x

  def step(self, params: Sequence, h: Sequence, x: Sequence, exact: bool = False) -> list:
    """Of float32 numbers, or arrays of one shape; `exact` takes jax's functions, not these."""
    given, inputs = [*params, *h, *x], []
    for shape in self.shapes:
      size = math.prod(shape)
      inputs.append(_boxed(given[:size], shape))
      given = given[size:]
    (new,) = _evaluate(self.jaxpr, inputs, self.channels, exact)
    return list(new.reshape(-1))

  def push(self, params: Sequence, h: Sequence, x: Sequence) -> tuple[list, list[list]]:
    """step(params, h, x), and how each of its numbers moves with each of h: [new][old]."""

    def push(params, h, x):
      def column(m):
        # The others are constants: nothing is multiplied by a derivative of zero.
        moved = lambda number: self.step(params, [*h[:m], number, *h[m + 1 :]], x, exact=True)
        return jax.jvp(moved, (h[m],), (jnp.ones_like(h[m]),))

      columns = list(map(column, range(len(h))))
      return columns[0][0], [list(row) for row in zip(*(moved for _, moved in columns))]

    return _approximated(push, params, h, x)

  def pull_back(self, params: Sequence, h: Sequence, x: Sequence, l: Sequence) -> tuple:
    """What l, one number for each of h, sends back to params, h and x."""

    def pull(params, h, x, l):
      step = lambda *inputs: self.step(*inputs, exact=True)
      return jax.vjp(step, params, h, x)[1](l)

    return _approximated(pull, params, h, x, l)


def _approximated(function, *numbers: Sequence):
  """`function` of lists of vectors, of what `ChannelCell.step` has, without `exact`."""
  numbers = list(map(list, numbers))
  shape = next(number.shape for number in numbers[1])
  vector = jax.ShapeDtypeStruct(shape, jnp.float32)
  traced, out = jax.make_jaxpr(function, return_shape=True)(
    *jax.tree.map(lambda _: vector, numbers)
  )
  boxes = [_boxed([jnp.broadcast_to(x, shape)], ()) for x in jax.tree.leaves(numbers)]
  flat = [box[()] for box in _evaluate(traced, boxes, *shape, exact=False)]
  flat = [number if jnp.shape(number) else jnp.full(shape, number) for number in flat]
  return jax.tree.unflatten(jax.tree.structure(out), flat)


def trace(step, params: Any, state: Any, x: Any) -> ChannelCell:
  """The cell `step` for arrays (or their shapes) like these, of one token: h [... D], x [... D].

  Raises:
    Refusal: channels are not alone in it, or it does what kernels have no word for.
  """
  D = state.shape[-1]
  leaves = jax.tree.leaves((params, state, x))
  taken = {n for leaf in leaves for n in leaf.shape}
  channels = next(n for n in range(104729, 204729) if n not in taken)

  def widen(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise Refusal(f"the cell takes {leaf.dtype}, the kernel has floats only")
    alone = leaf.shape[-1:] == (D,)
    return jax.ShapeDtypeStruct((*leaf.shape[:-1], channels) if alone else leaf.shape, jnp.float32)

  arguments = jax.tree.map(widen, (params, state, x))
  for leaf in jax.tree.leaves(arguments[2]):
    if leaf.shape[-1:] != (channels,):
      raise Refusal("x has an array without a last axis of channels")
  try:
    jaxpr = jax.make_jaxpr(step)(*arguments)
  except (TypeError, ValueError, IndexError) as error:
    raise Refusal("the cell treats its parameters' last axis as other than channels") from error
  outer = lambda leaf: _outer(leaf, channels)
  shapes = [[outer(leaf) for leaf in jax.tree.leaves(part)] for part in arguments]
  counts = tuple(sum(map(math.prod, part)) for part in shapes)
  cell = ChannelCell(jaxpr, channels, tuple(itertools.chain(*shapes)), counts)
  one = lambda n: [jax.ShapeDtypeStruct((8,), jnp.float32)] * n
  jax.eval_shape(cell.step, *map(one, counts))  # what cannot be is refused here
  return cell


def _outer(aval, channels):
  return aval.shape[:-1] if aval.shape[-1:] == (channels,) else aval.shape


def _evaluate(closed, inputs, channels, exact):
  """The outputs of a jaxpr, each value an array of objects without the axis of channels."""
  jaxpr, values = closed.jaxpr, {}

  def box(x):
    x = np.asarray(x)
    if x.shape[-1:] == (channels,) or x.size > 64:
      raise Refusal("the cell closes over an array")
    return _boxed(x.reshape(-1), x.shape)

  read = lambda atom: box(atom.val) if hasattr(atom, "val") else values[atom]
  values.update(zip(jaxpr.constvars, map(box, closed.consts)))
  values.update(zip(jaxpr.invars, inputs))
  for eqn in jaxpr.eqns:
    operands = list(map(read, eqn.invars))
    if eqn.primitive.name in CALLS:
      results = _evaluate(eqn.params["jaxpr"], operands, channels, exact)
    elif eqn.primitive.name in ELEMENTWISE:
      results = [_elementwise(eqn, operands, channels, exact)]
    else:
      results = [_rearranged(eqn, operands, channels)]
    values.update(zip(eqn.outvars, results))
  return list(map(read, jaxpr.outvars))


def _boxed(numbers, shape):
  """An array of objects, which numpy does not look into."""
  boxed = np.empty(math.prod(shape), object)
  for i, number in enumerate(numbers):
    boxed[i] = number
  return boxed.reshape(shape)


def _elementwise(eqn, operands, channels, exact):
  function = (EXACT if exact else EXACT | APPROXIMATE).get(eqn.primitive.name)
  result = np.empty(_outer(eqn.outvars[0].aval, channels), object)
  operands = [np.broadcast_to(operand, result.shape) for operand in operands]
  for at in np.ndindex(result.shape):
    numbers = [operand[at] for operand in operands]
    if eqn.primitive.name == "select_n":
      shape = jnp.broadcast_shapes(*map(jnp.shape, numbers))
      numbers = [jnp.broadcast_to(number, shape) for number in numbers]
    result[at] = function(*numbers) if function else eqn.primitive.bind(*numbers, **eqn.params)
  return result


def _rearranged(eqn, operands, channels):
  """Slices, reshapes and the like, as long as they leave the axis of channels alone."""
  name, params = eqn.primitive.name, eqn.params
  before, after = eqn.invars[0].aval, eqn.outvars[0].aval
  apart = before.shape[-1:] == (channels,)
  target, x = _outer(after, channels), operands[0]
  if apart and after.shape[-1:] != (channels,):
    raise Refusal(f"the cell's {name} takes channels together")
  kept = len(before.shape) - apart
  if name in ("reshape", "squeeze", "expand_dims"):
    return x.reshape(target)
  if name == "broadcast_in_dim":
    axes = [axis for axis in params["broadcast_dimensions"] if axis < len(target)]
    spread = [x.shape[axes.index(n)] if n in axes else 1 for n in range(len(target))]
    return np.broadcast_to(x.reshape(spread), target)
  if name == "slice":
    steps = params["strides"] or (1,) * len(before.shape)
    bounds = zip(params["start_indices"], params["limit_indices"], steps)
    return x[tuple(slice(*bound) for bound in list(bounds)[:kept])]
  if name == "transpose" and params["permutation"][kept:] == tuple(range(kept, before.ndim)):
    return x.transpose(params["permutation"][:kept])
  if name == "concatenate" and params["dimension"] < kept:
    return np.concatenate(operands, params["dimension"])
  if name == "stack" and params["axis"] < len(target):
    return np.stack(operands, params["axis"])
  raise Refusal(f"the cell has {name}, the kernel has no word for it")


def _sigmoid(x, scale=1.0):
  """1 / (1 + exp(-scale x)) to 4e-7: without a division, the square of a reciprocal root."""
  root = lax.rsqrt(1 + lax.exp2(x * (-scale / math.log(2))))
  return root * root


EXACT = {"add_any": operator.add, "copy": lambda x: x}
APPROXIMATE = {"logistic": _sigmoid, "tanh": lambda x: 2 * _sigmoid(x, 2.0) - 1}
