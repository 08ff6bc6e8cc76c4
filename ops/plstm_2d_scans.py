"""`ops.plstm_2d` with states that are carried from node to node: one node after the other, one
anti-diagonal after the other, or, where the structure of the transitions allows it, with less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.precision import varying_like

# The axes of [B Y X ...] along which each run goes backwards.
FLIPS = ((), (2,), (1,), (1, 2))


class Grid(NamedTuple):
  """What the implementations take: one dtype, q scaled; R = 1 or 4 runs, each with its gates.

  A function of a single run takes it without the axis R, which is then in B.
  """

  q: Float[Array, "B Y X H K"]
  k: Float[Array, "B Y X H K"]
  v: Float[Array, "B Y X H V"]
  source: Float[Array, "B Y X R H 2"]
  transition: Float[Array, "B Y X R H 2 2"]
  mark: Float[Array, "B Y X R H 2"]


def in_frame(x: Array, runs: int) -> Array:
  """x [B Y X ...] for each run [B R Y X ...], where all of them go to the right and down."""
  return jnp.stack([jnp.flip(x, axes) for axes in FLIPS[:runs]], axis=1)


def gates_in_frame(x: Array) -> Array:
  """x [B Y X R ...] as [B R Y X ...], where all runs go to the right and down."""
  return jnp.stack([jnp.flip(x[:, :, :, r], FLIPS[r]) for r in range(x.shape[3])], axis=1)


def by_run(function: Callable) -> Callable:
  """An implementation, out of a function of a single run to the right and down: the runs become
  rows of the batch, and the sum of their outputs is returned."""

  def run(grid, initial_state, **options):
    (B, Y, X, R, H, _), K, V = grid.source.shape, grid.q.shape[-1], grid.v.shape[-1]
    if initial_state is None:
      initial_state = tuple(
        varying_like(jnp.zeros((B, R, n, H, K, V), grid.q.dtype), *grid) for n in (Y, X)
      )
    arrays = [in_frame(x, R) for x in grid[:3]] + [gates_in_frame(x) for x in grid[3:]]
    # B before R: rows of the batch stay on the devices that have them.
    flat = lambda x: x.reshape(B * R, *x.shape[2:])
    o, final_state = function(Grid(*map(flat, arrays)), *map(flat, initial_state), **options)
    split = lambda x: x.reshape(B, R, *x.shape[1:])
    o = split(o)
    o = sum(jnp.flip(o[:, r], FLIPS[r]) for r in range(R))
    return o, tuple(map(split, final_state))

  return run


def pass_nodes(nodes: Grid, left: Array, above: Array) -> tuple[Array, Array, Array]:
  """The outputs [... V] of nodes, and the states [... K V] that leave them, right and down."""
  widen = lambda gate: gate[..., None, None]
  t, s, m = nodes.transition, nodes.source, nodes.mark
  write = nodes.k[..., None] * nodes.v[..., None, :]
  read = widen(m[..., 0]) * left + widen(m[..., 1]) * above
  leave = lambda out: (
    widen(t[..., out, 0]) * left + widen(t[..., out, 1]) * above + widen(s[..., out]) * write
  )
  return jnp.sum(nodes.q[..., None] * read, axis=-2), leave(0), leave(1)


@by_run
def recurrent(grid, left, above, *, structure, chunk_size, precision):
  """A scan over rows, in each a scan over columns; a row's states are computed again for the
  gradients."""

  def node(left, token):
    nodes, above = token
    o, right, below = pass_nodes(nodes, left, above)
    return right, (o, below)

  @jax.checkpoint
  def row(above, token):
    nodes, left = token
    right, (o, below) = jax.lax.scan(node, left, (nodes, above))
    return below, (o, right)

  nodes = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), grid)
  below, (o, right) = jax.lax.scan(
    row, jnp.moveaxis(above, 0, 1), (nodes, jnp.moveaxis(left, 0, 1))
  )
  return jnp.moveaxis(o, 2, 0), (jnp.moveaxis(right, 1, 0), jnp.moveaxis(below, 1, 0))


@by_run
def wavefront(grid, left, above, *, structure, chunk_size, precision):
  """A scan over anti-diagonals, whose nodes wait only for the one before."""

  def step(states, token):
    right, above = states
    nodes, left = token
    left = jnp.concatenate([left[None], right[:-1]])
    o, right, below = pass_nodes(nodes, left, above)
    return (right, below), (o, right[-1])

  Y, X = grid.q.shape[1:3]
  left, above = jnp.moveaxis(left, 1, 0), jnp.moveaxis(above, 1, 0)
  states = (jnp.zeros_like(above), above)
  (_, below), (o, right) = sweep(step, states, (_diagonals(grid), lengthen(left, Y + X - 1)))
  return _from_diagonals(o, right, below, Y)


@by_run
def merged(grid, left, above, *, structure, chunk_size, precision):
  """`wavefront` with the sum of what enters a node as its only state."""
  widen = lambda gate: gate[..., None, None]

  def step(entering, token):
    nodes, next_left = token
    write = nodes.k[..., None] * nodes.v[..., None, :]
    leave = lambda out: (
      widen(nodes.transition[..., out, 0]) * entering + widen(nodes.source[..., out]) * write
    )
    right, below = leave(0), leave(1)
    o = jnp.sum((nodes.mark[..., :1] * nodes.q)[..., None] * entering, axis=-2)
    return below + jnp.concatenate([next_left[None], right[:-1]]), (o, right[-1])

  Y, X = grid.q.shape[1:3]
  left, above = jnp.moveaxis(left, 1, 0), jnp.moveaxis(above, 1, 0)
  entering = jnp.concatenate([above[:1] + left[:1], above[1:]])
  below, (o, right) = sweep(step, entering, (_diagonals(grid), lengthen(left[1:], Y + X - 1)))
  return _from_diagonals(o, right, below, Y)


@by_run
def separable(grid, left, above, *, structure, chunk_size, precision):
  """Down all columns first, then along all rows: nothing that goes along a row ever turns."""
  widen = lambda gate: gate[..., None, None]
  t, s, m = grid.transition, grid.source, grid.mark

  def down(above, token):
    k, v, t_du, source_d = token
    return widen(t_du) * above + widen(source_d) * (k[..., None] * v[..., None, :]), above

  @jax.checkpoint
  def along(left, token):
    q, k, v, above, t_rl, t_ru, source_r, mark_l, mark_u = token
    o = jnp.sum(q[..., None] * (widen(mark_l) * left + widen(mark_u) * above), axis=-2)
    write = k[..., None] * v[..., None, :]
    return widen(t_rl) * left + widen(t_ru) * above + widen(source_r) * write, o

  by = lambda axis, arrays: jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), arrays)
  below, above = jax.lax.scan(down, above, by(1, (grid.k, grid.v, t[..., 1, 1], s[..., 1])))
  above = jnp.moveaxis(above, 0, 1)
  right, o = jax.lax.scan(
    along,
    left,
    by(2, (*grid[:3], above, t[..., 0, 0], t[..., 0, 1], s[..., 0], m[..., 0], m[..., 1])),
  )
  return jnp.moveaxis(o, 0, 2), (right, below)


def sweep(step: Callable, states: Any, tokens: Any) -> tuple[Any, Any]:
  """`jax.lax.scan` that keeps for the gradients the states before groups of about sqrt(steps) steps
  and no others."""
  steps = jax.tree.leaves(tokens)[0].shape[0]
  group = round(steps**0.5)
  whole = steps - steps % group
  scan = jax.checkpoint(lambda states, tokens: jax.lax.scan(step, states, tokens))
  by_group = jax.tree.map(lambda x: x[:whole].reshape(-1, group, *x.shape[1:]), tokens)
  states, outputs = jax.lax.scan(scan, states, by_group)
  outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
  if whole == steps:
    return states, outputs
  states, rest = scan(states, jax.tree.map(lambda x: x[whole:], tokens))
  return states, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)


def lengthen(x: Array, length: int) -> Array:
  """x with zeros after it along the first axis."""
  return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def skew(x: Array, fill: Array | float) -> Array:
  """x [B Y X ...] as [Y+X-1 X B ...], with x[:, s - x, x] at [s, x], `fill` outside of the grid."""
  Y, X = x.shape[1:3]
  columns = jnp.moveaxis(x, (2, 1), (0, 1))
  inner = columns.shape[2:]
  outside = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (X, X, *inner))
  # A column has one row more than there are steps: each starts one step after the one before.
  flat = jnp.concatenate([columns, outside], axis=1).reshape(X * (Y + X), *inner)
  return jnp.swapaxes(flat[: X * (Y + X - 1)].reshape(X, Y + X - 1, *inner), 0, 1)


def unskew(x: Array, Y: int) -> Array:
  """The inverse of `skew`: [B Y X ...]."""
  steps, X, *inner = x.shape
  flat = jnp.swapaxes(x, 0, 1).reshape(steps * X, *inner)
  columns = lengthen(flat, (steps + 1) * X).reshape(X, steps + 1, *inner)
  return jnp.moveaxis(columns[:, :Y], (0, 1), (2, 1))


def _diagonals(grid):
  # What enters a column from above waits at the nodes outside of the grid for its first node, and
  # what leaves its last one stays there. Nothing enters them from the left.
  waits = jnp.zeros((2, 2), grid.q.dtype).at[1].set(1)
  return Grid(*(skew(x, fill) for x, fill in zip(grid, (0.0, 0.0, 0.0, 0.0, waits, 0.0))))


def _from_diagonals(o, right, below, Y):
  X = below.shape[0]
  return unskew(o, Y), (jnp.moveaxis(right[X - 1 :], 0, 1), jnp.moveaxis(below, 0, 1))
