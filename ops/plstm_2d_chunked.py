"""`ops.plstm_2d` by blocks: all pairs of nodes inside, states at the borders between them."""

import functools

import jax
import jax.numpy as jnp

from ops.plstm_2d_blocks import Gates, fold, row_maps, split_gates
from ops.plstm_2d_scans import by_run, lengthen, skew, sweep, unskew

# The gates of a node that lets everything pass straight.
NEUTRAL = Gates(
  source_r=0.0, source_d=0.0, t_rl=1.0, t_ru=0.0, t_dl=0.0, t_du=1.0, mark_l=0.0, mark_u=0.0
)


@by_run
def chunked(grid, left, above, *, structure, chunk_size, precision):
  """A scan over the anti-diagonals of a grid of blocks, after the maps of all blocks at once."""
  (B, Y, X, H, K), V = grid.q.shape, grid.v.shape[-1]
  C = min(chunk_size or 8, max(Y, X))
  rows, columns = -(-Y // C), -(-X // C)
  product = functools.partial(jnp.einsum, precision=precision)
  act = lambda matrix, states: product("...ij,...jkv->...ikv", matrix, states)

  def blocks(x, fill=0.0):
    """[B Y X ...] as [B * rows * columns, C, C, ...]."""
    pad = [(0, 0), (0, rows * C - Y), (0, columns * C - X)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, pad, constant_values=fill).reshape(B, rows, C, columns, C, *x.shape[3:])
    return jnp.swapaxes(x, 2, 3).reshape(-1, C, C, *x.shape[5:])

  def borders(x, count):
    """[B Y H K V] as [rows B H C K V]; the same for columns."""
    x = jnp.moveaxis(lengthen(jnp.moveaxis(x, 1, 0), count * C), 0, 1)
    return jnp.moveaxis(x.reshape(B, count, C, H, K, V), (1, 3), (0, 2))

  def from_borders(x, length):
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(B, -1, H, K, V)[:, :length]

  def inside(grid):
    """The outputs of blocks, and everything that the borders between them need."""
    gates = split_gates(grid.source, grid.transition, grid.mark)
    gates = jax.tree.map(lambda x, fill: jnp.moveaxis(blocks(x, fill), -1, 1), gates, NEUTRAL)
    maps = fold(row_maps(gates))
    q, k, v = (jnp.moveaxis(blocks(x), -2, 1).reshape(-1, H, C * C, x.shape[-1]) for x in grid[:3])
    scores = product("bhnk,bhmk->bhnm", q, k) * maps.node_node
    leave = jnp.concatenate([maps.right_node, maps.below_node], axis=-2)
    across = jnp.block([
      [maps.right_left, maps.right_above],
      [maps.below_left, maps.below_above],
    ])  # fmt: skip
    seen = jnp.concatenate([maps.node_left, maps.node_above], axis=-1)
    written = product("bhin,bhnk,bhnv->bhikv", leave, k, v)
    return product("bhnm,bhmv->bhnv", scores, v), across, written, seen

  def step(states, token):
    right, above = states
    (across, written), left = token
    left = jnp.concatenate([left[None], right[:-1]])
    entering = jnp.concatenate([left, above], axis=-3)
    right, below = jnp.split(act(across, entering) + written, 2, axis=-3)
    return (right, below), (entering, right[-1])

  def read(grid, seen, entering):
    q = jnp.moveaxis(blocks(grid.q), -2, 1).reshape(-1, H, C * C, K)
    return jnp.sum(q[..., None] * act(seen, entering), axis=-2)

  o, across, written, seen = jax.checkpoint(inside)(grid)
  straight = jnp.zeros((2 * C, 2 * C), o.dtype).at[C:, C:].set(jnp.eye(C, dtype=o.dtype))
  on_grid = lambda x: x.reshape(B, rows, columns, *x.shape[1:])
  above = borders(above, columns)
  (_, below), (entering, right) = sweep(
    step,
    (jnp.zeros_like(above), above),
    (
      (skew(on_grid(across), straight), skew(on_grid(written), 0.0)),
      lengthen(borders(left, rows), rows + columns - 1),
    ),
  )
  entering = unskew(entering, rows)
  o = o + jax.checkpoint(read)(grid, seen, entering.reshape(-1, *entering.shape[3:]))
  o = jnp.moveaxis(o.reshape(B, rows, columns, H, C, C, V), (2, 3), (3, 5))
  o = o.reshape(B, rows * C, columns * C, H, V)[:, :Y, :X]
  return o, (from_borders(right[columns - 1 :], Y), from_borders(below, X))
