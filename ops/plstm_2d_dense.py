"""`ops.plstm_2d` as attention: every pair of nodes, its score weighed by a gate.

  o = ((q k^T) * G) v,   G [N N]: how much of what a node writes another one reads, over all ways

The G of all runs are added before, so that four runs need one pass. Nothing of size N N is kept for
the gradients.
"""

import functools

import jax
import jax.numpy as jnp

from ops.plstm_2d_blocks import block_maps, split_gates
from ops.plstm_2d_scans import FLIPS, gates_in_frame, in_frame


def parallel(grid, initial_state, *, structure, chunk_size, precision):
  """All pairs of nodes."""
  core = functools.partial(_attend, separable=structure == "separable", precision=precision)
  return jax.checkpoint(core)(grid, initial_state)


def _attend(grid, initial_state, *, separable, precision):
  (B, Y, X, R, H, _), V = grid.source.shape, grid.v.shape[-1]
  product = functools.partial(jnp.einsum, precision=precision)
  in_frames = lambda x: in_frame(x, R).reshape(B * R, Y * X, H, -1)
  gates = jax.tree.map(
    lambda x: jnp.moveaxis(gates_in_frame(x).reshape(B * R, Y, X, H), -1, 1),
    split_gates(grid.source, grid.transition, grid.mark),
  )
  maps = block_maps(gates, separable=separable)

  pairs = maps.node_node.reshape(B, R, H, Y, X, Y, X)
  G = 0
  for r, axes in enumerate(FLIPS[:R]):
    axes = [1 + axis for axis in axes] + [3 + axis for axis in axes]
    G = G + jnp.flip(pairs[:, r], axes).reshape(B, H, Y * X, Y * X)
  q, k, v = (x.reshape(B, Y * X, H, -1) for x in (grid.q, grid.k, grid.v))
  o = product("bhnm,bmhv->bnhv", product("bnhk,bmhk->bhnm", q, k) * G, v)
  o = o.reshape(B, Y, X, H, V)

  writes = in_frames(grid.k)[..., None] * in_frames(grid.v)[..., None, :]
  act = lambda matrix, states: product("bhij,bjhkv->bihkv", matrix, states)
  right, below = act(maps.right_node, writes), act(maps.below_node, writes)
  if initial_state is not None:
    left, above = (x.reshape(B * R, *x.shape[2:]) for x in initial_state)
    seen = act(maps.node_left, left) + act(maps.node_above, above)
    read = jnp.sum(in_frames(grid.q)[..., None] * seen, axis=-2).reshape(B, R, Y, X, H, V)
    o = o + sum(jnp.flip(read[:, r], axes) for r, axes in enumerate(FLIPS[:R]))
    right = right + act(maps.right_left, left) + act(maps.right_above, above)
    below = below + act(maps.below_left, left) + act(maps.below_above, above)
  return o, tuple(x.reshape(B, R, *x.shape[1:]) for x in (right, below))
