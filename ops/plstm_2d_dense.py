"""`ops.plstm_2d` as attention: every pair of nodes, its score weighed by a gate.

  o = ((q k^T) * G) v,   G [N N]: how much of what a node writes another one reads, over all ways

G is made in blocks, never as a whole. Of two neighbouring blocks of rows, the lower one reads of
the upper one by node_above below_node of the block maps: a product over the X edges between them,
and at the same time over the runs to the right and to the left, which share the pairs of nodes. So
do a run down and one up, each with its half of the pairs: four runs are one pass over all pairs.
"""

import functools

import jax
import jax.numpy as jnp

from ops.plstm_2d_blocks import Maps, fold, row_maps, split_gates
from ops.plstm_2d_scans import gates_in_frame

# The axes of the maps of a row that count its columns.
COLUMNS = Maps(
  node_left=(-2,), node_above=(-2, -1), node_node=(-2, -1),
  right_left=(), right_above=(-1,), right_node=(-1,),
  below_left=(-2,), below_above=(-2, -1), below_node=(-2, -1),
)  # fmt: skip


def parallel(grid, initial_state, *, structure, chunk_size, precision):
  """All pairs of nodes. Nothing of their number is kept for the gradients."""
  core = functools.partial(_attend, precision=precision)
  return jax.checkpoint(core)(grid, initial_state)


def _attend(grid, initial_state, *, precision):
  (B, Y, X, R, H, _), V = grid.source.shape, grid.v.shape[-1]
  ways, sides = (R + 1) // 2, min(R, 2)  # down and up; to the right and to the left
  product = functools.partial(jnp.einsum, precision=precision)
  exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  batch = B * ways

  def directed(x):
    """x [B Y X H .] as [batch N H .], with the rows in the order of each way."""
    return jnp.stack([x, jnp.flip(x, 1)][:ways], axis=1).reshape(batch, Y * X, H, -1)

  def straight(x, axes):
    """x [batch sides ...], its columns from left to right for both sides."""
    return jnp.concatenate([x[:, :1], jnp.flip(x[:, 1:], axes)], axis=1) if axes else x

  q, k, v = (directed(x) for x in grid[:3])
  gates = jax.tree.map(
    lambda x: jnp.moveaxis(gates_in_frame(x).reshape(batch, sides, Y, X, H), -1, 2),
    split_gates(grid.source, grid.transition, grid.mark),
  )
  rows = Maps(*map(straight, row_maps(gates), COLUMNS))

  by_row = lambda x: x.reshape(batch, Y, X, H, -1)
  scores = product("byihk,byjhk->bhyij", by_row(q), by_row(k)) * jnp.sum(rows.node_node, axis=1)
  outputs = [product("bhyij,byjhv->byihv", scores, by_row(v)).reshape(v.shape)]

  def visit(upper, lower, top, heights):
    pairs, each = upper.below_node.shape[-3], sum(heights) * X
    first, past = top * X, top * X + pairs * each
    upper_nodes = heights[0] * X
    part = lambda x: x[:, first:past].reshape(batch, pairs, each, H, -1)
    G = exact("bshpnx,bshpxm->bhpnm", lower.node_above, upper.below_node)
    scores = product("bpnhk,bpmhk->bhpnm", part(q)[:, :, upper_nodes:], part(k)[:, :, :upper_nodes])
    o = product("bhpnm,bpmhv->bpnhv", scores * G, part(v)[:, :, :upper_nodes])
    o = jnp.pad(o, ((0, 0), (0, 0), (upper_nodes, 0), (0, 0), (0, 0)))
    o = o.reshape(batch, past - first, H, V)
    outputs.append(jnp.pad(o, ((0, 0), (first, Y * X - past), (0, 0), (0, 0))))

  maps = fold(rows._replace(node_node=None), visit)

  writes = k[..., None] * v[..., None, :]
  act = lambda matrix, states: product("bshij,bsjhkv->bsihkv", matrix, states)
  leave = lambda matrix: product("bshij,bjhkv->bsihkv", matrix, writes)
  right, below = leave(maps.right_node), leave(maps.below_node)
  if initial_state is not None:
    left, above = (x.reshape(batch, sides, *x.shape[2:]) for x in initial_state)
    above = straight(above, (-4,))
    seen = act(maps.node_left, left) + act(maps.node_above, above)
    outputs.append(jnp.sum(q[..., None] * jnp.sum(seen, axis=1), axis=-2))
    right = right + act(maps.right_left, left) + act(maps.right_above, above)
    below = below + act(maps.below_left, left) + act(maps.below_above, above)
  o = sum(outputs).reshape(B, ways, Y, X, H, V)
  o = sum(jnp.flip(o[:, i], 1) if i else o[:, i] for i in range(ways))
  runs = lambda x: x.reshape(B, R, *x.shape[2:])
  return o, (runs(right), runs(straight(below, (-4,))))
