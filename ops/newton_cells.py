"""Cells of nonlinear recurrences: what a user hands in, its Jacobians, and what is false in it.

A cell is any function h_t = step(params, h_{t-1}, x_t), and a promise about its Jacobian:

  "diagonal"  h [... D]     channels never mix: J [... D]
  "block"     h [... M D]   M numbers per channel mix, channels never do: J [... M M D] (new, old)
  "dense"     h [... D]     anything: J [... D D] (new, old)

A false promise would give wrong states and wrong gradients without an error, so each promise is
tried, once per cell and shapes, on random numbers.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ops import affine

KINDS = {"diagonal": {}, "block": {"blocks": True}, "dense": {"dense": True}}


@dataclass(frozen=True)
class Cell:
  """A nonlinear recurrence h_t = step(params, h_{t-1}, x_t) for `ops.newton_scan`.

  Attributes:
    step: step(params, h, x) -> new h, on any leading axes of h and x alike. A function that is
      defined once (cells are compared, hashed, and compiled by it), and that takes from `params`
      whatever is to be trained.
    structure: "diagonal" (h [... D]), "block" (h [... M D]) or "dense" (h [... D]), see above.
    box: states stay within |h| <= box, or within max(box, |initial_state|) where that is larger;
      one number, or for "block" one for each of the M (`math.inf` where there is no bound); None
      is no bound. Newton's iterates are clipped to it, which is what makes them converge for
      cells that switch; with a box that is false they are wrong, as the residual and
      `ops.check_cell` tell.
    jacobian: jacobian(params, h, x) -> J in the layout above, if there is a faster way than by
      `jax.jvp`. The backward pass never uses it.
    state_shape: (D,) or (M, D), or a function of params that returns it: needed only where no
      initial state is given and the shape cannot be guessed.
  """

  step: Callable[[Any, Array, Any], Array]
  structure: str
  box: float | tuple[float, ...] | None = None
  jacobian: Callable[[Any, Array, Any], Array] | None = None
  state_shape: tuple[int, ...] | Callable[[Any], tuple[int, ...]] | None = None

  def __post_init__(self):
    if self.structure not in KINDS:
      raise ValueError(f"structure is {self.structure!r}, expected one of {', '.join(KINDS)}")
    limits = self.box if isinstance(self.box, tuple) else (self.box,)
    if isinstance(self.box, tuple) and self.structure != "block":
      raise ValueError(f"box is {self.box}, expected one number for structure {self.structure!r}")
    if any(limit is not None and not limit > 0 for limit in limits):
      raise ValueError(f"box is {self.box}, expected positive numbers")

  @property
  def axes(self) -> int:
    """How many axes a state has after the batch."""
    return 2 if self.structure == "block" else 1

  def limits(self, state: Array) -> Array | None:
    """The box [B ...] of states that begin at `state` [B ...]."""
    if self.box is None:
      return None
    box = jnp.asarray(self.box, state.dtype)
    # What is not a number widens no box: one row's documents would share it.
    size = jnp.where(jnp.isnan(state), 0, jnp.abs(state))
    return jnp.maximum(box[..., None] if isinstance(self.box, tuple) else box, size)


def value_and_jacobian(
  cell: Cell, params: Any, h: Array, x: Any, *, diagonal: bool = False, own: bool = False
) -> tuple[Array, Array]:
  """step(params, h, x), and its exact Jacobian in the layout of the cell's structure.

  Args:
    cell: of which it is.
    params, h, x: what `cell.step` takes.
    diagonal: return only the diagonal of the Jacobian, in the shape of h.
    own: take it from `cell.jacobian` where there is one.
  """
  step = lambda h: cell.step(params, h, x)
  if own and cell.jacobian is not None:
    f, J = step(h), cell.jacobian(params, h, x)
    if J.shape != jacobian_shape(cell, h.shape):
      raise ValueError(
        f"cell.jacobian returns shape {J.shape}, expected {jacobian_shape(cell, h.shape)} for"
        f" structure {cell.structure!r} and states of shape {h.shape}"
      )
  elif cell.structure == "diagonal":
    f, J = jax.jvp(step, (h,), (jnp.ones_like(h),))
  elif cell.structure == "block":
    units = np.eye(h.shape[-2])[..., None]
    tangents = [jnp.broadcast_to(jnp.asarray(unit, h.dtype), h.shape) for unit in units]
    columns = [jax.jvp(step, (h,), (tangent,)) for tangent in tangents]
    f, J = columns[0][0], jnp.stack([column for _, column in columns], axis=-2)
  else:
    f, linear = jax.linearize(step, h)
    column = lambda unit: linear(jnp.broadcast_to(unit, h.shape))
    J = jax.vmap(column, out_axes=-1)(jnp.eye(h.shape[-1], dtype=h.dtype))
  if diagonal and cell.structure == "block":
    J = jnp.stack([J[..., m, m, :] for m in range(h.shape[-2])], axis=-2)
  elif diagonal and cell.structure == "dense":
    J = jnp.diagonal(J, axis1=-2, axis2=-1)
  return f, J


def jacobian_shape(cell: Cell, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Of the Jacobians of states of this shape."""
  return {
    "diagonal": shape,
    "block": (*shape[:-1], *shape[-2:]),
    "dense": (*shape, shape[-1]),
  }[cell.structure]


def transpose(cell: Cell, J: Array) -> Array:
  """J with new and old exchanged."""
  if cell.structure == "diagonal":
    return J
  return jnp.swapaxes(J, -1, -2) if cell.structure == "dense" else jnp.swapaxes(J, -2, -3)


def product(cell: Cell, J: Array, v: Array) -> Array:
  """J v, for v of the shape of a state."""
  if cell.structure == "dense":
    with jax.default_matmul_precision("highest"):
      return affine.act(J, v[..., None], dense=True)[..., 0]
  return affine.act(J, v, **KINDS[cell.structure])


def unit(cell: Cell, J: Array) -> Array:
  """The Jacobian of h' = h, in the layout of J, up to broadcasting."""
  if cell.structure == "diagonal":
    return jnp.ones((), J.dtype)
  eye = jnp.eye(J.shape[-2], dtype=J.dtype)
  return eye[..., None] if cell.structure == "block" else eye


def guess_state_shape(cell: Cell, params: Any, x: Any) -> tuple[int, ...]:
  """The shape of one state, from `cell.state_shape` or by trying which shape the cell maps to
  itself; `x` is one token of each row, [B ...].

  Raises:
    ValueError: none was found.
  """
  if cell.state_shape is not None:
    return tuple(cell.state_shape(params) if callable(cell.state_shape) else cell.state_shape)
  # No other size is like this many rows: a shape that the rows broadcast into is told by it.
  rows, x = _many_rows(params, x)
  dtype = floating_dtype(params, x)
  widths = {n for leaf in jax.tree.leaves((params, x)) for n in (*leaf.shape[-1:], leaf.size)}
  for M in (2, 3, 4) if cell.structure == "block" else (None,):
    for width in (1, *sorted(widths - {1})):
      shape = (width,) if M is None else (M, width)
      for _ in range(2):  # a width of 1 becomes what the cell makes of it
        h = jax.ShapeDtypeStruct((rows, *shape), dtype)
        try:
          new = jax.eval_shape(cell.step, params, h, x)
        except (TypeError, ValueError, IndexError):
          break
        if not hasattr(new, "shape") or new.shape[:1] != (rows,) or rows in new.shape[1:]:
          break
        new = new.shape[1:]
        if new == shape:
          return shape
        if len(new) != len(shape) or new[:-1] != shape[:-1]:
          break
        shape = new
  raise ValueError(
    "initial_state is None and the shape of a state cannot be guessed: give the one or the cell's"
    " state_shape"
  )


def _many_rows(*trees: Any) -> tuple[int, Any]:
  """A number of rows that is no size in the trees, and the last tree [B ...] with so many."""
  rows = 1 + max(n for leaf in jax.tree.leaves(trees) for n in (1, *leaf.shape))
  widen = lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
  return rows, jax.tree.map(widen, trees[-1])


def floating_dtype(*trees: Any):
  """The dtype in which these are solved: float32, or float64 where any of them is."""
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(trees)]
  return jnp.result_type(jnp.float32, *(d for d in dtypes if jnp.issubdtype(d, jnp.floating)))


def check_step(cell: Cell, params: Any, state: Any, x: Any):
  """Raises ValueError unless the cell maps `state` [B ...] to its like and keeps its promise.

  Only shapes and dtypes are read: the promise is tried on random numbers, for `x` one token per
  row.
  """
  _, (state, x) = _many_rows(params, (state, x))
  show = lambda s: f"{s.dtype}{['B', *s.shape[1:]]}".replace("'", "")
  try:
    new = jax.eval_shape(cell.step, params, state, x)
  except (TypeError, ValueError, IndexError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(f"cell.step cannot take a state of {show(state)}: {reason}") from error
  if not hasattr(new, "shape") or (new.shape, new.dtype) != (state.shape, state.dtype):
    shown = show(new) if hasattr(new, "shape") else type(new).__name__
    raise ValueError(f"cell.step returns {shown} for a state of {show(state)}, expected its like")
  if cell.structure == "dense":
    return
  leaves, treedef = jax.tree.flatten((params, state, x))
  row = lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype))
  one = [row(leaf) for leaf in leaves[: treedef.children()[0].num_leaves]]
  one += [((1, *leaf.shape[1:]), leaf.dtype) for leaf in leaves[len(one) :]]
  complaint = _complaint(cell, treedef, tuple(one), bool(jax.config.jax_enable_x64))
  if complaint:
    raise ValueError(complaint)


@functools.lru_cache(maxsize=512)
def _complaint(cell, treedef, kinds, wide: bool) -> str | None:
  """What is false about the structure.

  Computed in a thread of its own: the one at hand is tracing, for a mesh whose devices may not be
  here.
  """

  def complain():
    with jax.enable_x64(wide):
      return _complaint_on_random_numbers(cell, treedef, kinds)

  with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
    return pool.submit(complain).result()


def _complaint_on_random_numbers(cell, treedef, kinds) -> str | None:
  """What is false about the structure, on random numbers of these shapes."""
  rng = np.random.default_rng(0)

  def normal(shape):
    fan_in = math.prod(shape[-2:-1]) if len(shape) > 1 else 1
    return rng.normal(size=shape) / np.sqrt(max(fan_in, 1))

  # Second, numbers that have a logarithm and a root, and so has one less each.
  for draw in (normal, lambda shape: rng.uniform(0.1, 0.9, size=shape)):
    drawn = [
      np.asarray(draw(shape), dtype)
      if jnp.issubdtype(dtype, jnp.floating)
      else np.zeros(shape, dtype)
      for shape, dtype in kinds
    ]
    params, h, x = jax.tree.unflatten(treedef, drawn)
    if all(np.isfinite(change).all() for change in _changes(cell, params, h, x)):
      return false_structure(cell, params, h, x)
  return None


def _changes(cell: Cell, params: Any, h: Any, x: Any) -> tuple[np.ndarray, np.ndarray]:
  """By how much the new state changes in a random direction of the old one: in truth, and
  according to the Jacobian in the layout of the cell's structure."""
  v = np.asarray(np.random.default_rng(1).normal(size=h.shape), h.dtype)

  def both(params, h, x, v):
    actual = jax.jvp(lambda h: cell.step(params, h, x), (h,), (v,))[1]
    return actual, product(cell, value_and_jacobian(cell, params, h, x)[1], v)

  actual, declared = jax.jit(both)(params, h, x, v)
  return np.asarray(actual), np.asarray(declared)


def false_structure(cell: Cell, params: Any, h: Any, x: Any) -> str | None:
  """What is false about `cell.structure` at these h [B ...] and x [B ...]; None if nothing is."""
  actual, declared = _changes(cell, params, h, x)
  scale = np.abs(actual).max() + np.abs(declared).max()
  if not np.abs(actual - declared).max() > 1e-3 * scale:
    return None
  row = np.unravel_index(np.argmax(np.abs(actual - declared)), h.shape)[0]
  pick = lambda a: a[row : row + 1]
  J = jax.jacfwd(lambda h: cell.step(params, h, jax.tree.map(pick, x)))(pick(jnp.asarray(h)))
  J = np.array(J).reshape(*h.shape[1:], *h.shape[1:])
  new, old = (np.arange(h.shape[-1]).reshape(s) for s in ((-1,) + (1,) * (h.ndim - 1), (-1,)))
  worst = np.unravel_index(np.argmax(np.where(new == old, 0, np.abs(J))), J.shape)
  channel_in, channel_out = worst[-1], worst[h.ndim - 2]
  return (
    f"cell declares structure {cell.structure!r}, which is false: channels mix, the new state of"
    f" channel {channel_out} changes with the old state of channel {channel_in} (derivative"
    f" {J[worst]:.3g}); declare 'dense', or take the mixing out of the recurrence"
  )
