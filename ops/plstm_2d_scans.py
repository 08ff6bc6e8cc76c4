"""`ops.plstm_2d` with states that are carried from node to node: node after node."""

from collections.abc import Callable
from typing import NamedTuple

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
  """A scan over anti-diagonals, whose nodes wait only for the one before: at step s the nodes (s -
  x, x) of all columns x. Every group of about sqrt(Y + X) steps is computed again for the
  gradients."""
  Y, X = grid.q.shape[1:3]
  steps = Y + X - 1
  group = max(1, round(steps**0.5))
  padded = -(-steps // group) * group
  # What enters a column from above waits there, at nodes outside of the grid, for its first node;
  # what leaves its last one stays.
  waits = jnp.zeros((2, 2), grid.q.dtype).at[1, 1].set(1)
  fill = Grid(0, 0, 0, 0, waits, 0)
  nodes = Grid(*(_skew(x, value, padded) for x, value in zip(grid, fill)))
  left = jnp.moveaxis(left, 1, 0)
  left = jnp.pad(left, [(0, padded - Y)] + [(0, 0)] * (left.ndim - 1))

  def step(states, token):
    right, above = states
    nodes, left = token
    left = jnp.concatenate([left[None], right[:-1]])
    o, right, below = pass_nodes(nodes, left, above)
    return (right, below), (o, right[-1])

  @jax.checkpoint
  def steps_of_group(states, tokens):
    return jax.lax.scan(step, states, tokens)

  by_group = lambda x: x.reshape(padded // group, group, *x.shape[1:])
  above = jnp.moveaxis(above, 1, 0)
  states = (jnp.zeros_like(above), above)
  (_, below), (o, right) = jax.lax.scan(
    steps_of_group, states, jax.tree.map(by_group, (nodes, left))
  )
  o, right = (x.reshape(padded, *x.shape[2:]) for x in (o, right))
  right = right[X - 1 : steps]
  return _unskew(o, Y), (jnp.moveaxis(right, 1, 0), jnp.moveaxis(below, 1, 0))


def _skew(x: Array, fill: Array | float, steps: int) -> Array:
  """x [B Y X ...] as [steps X B ...], with x[:, s - x, x] at [s, x], `fill` outside of the grid."""
  B, Y, X = x.shape[:3]
  x = jnp.moveaxis(x, 0, 2)
  columns = jnp.swapaxes(x, 0, 1)
  outside = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (X, steps + 1 - Y, *columns.shape[2:]))
  # One more than the steps for each column: column x starts x steps later.
  flat = jnp.concatenate([columns, outside], axis=1).reshape(X * (steps + 1), *columns.shape[2:])
  return jnp.swapaxes(flat[: X * steps].reshape(X, steps, *columns.shape[2:]), 0, 1)


def _unskew(x: Array, Y: int) -> Array:
  """The inverse of `_skew`: [B Y X ...]."""
  steps, X = x.shape[:2]
  flat = jnp.swapaxes(x, 0, 1).reshape(steps * X, *x.shape[2:])
  flat = jnp.pad(flat, [(0, X)] + [(0, 0)] * (flat.ndim - 1))
  columns = flat.reshape(X, steps + 1, *x.shape[2:])[:, :Y]
  return jnp.moveaxis(jnp.swapaxes(columns, 0, 1), 2, 0)
