"""What a block of a grid does to its states, as matrices of gates.

A block of y rows and x columns, so of n = y x nodes, row after row, is a linear map from what
enters at its borders and what its nodes write, to what leaves at its borders and what its nodes
read:

  node  = node_left l  + node_above u  + node_node s       [n]
  right = right_left l + right_above u + right_node s      [y]
  below = below_left l + below_above u + below_node s      [x]

A row has them in closed form, by the products of its transitions to the right. Blocks above one
another share the edges between them, and `merge` eliminates those: log2(Y) merges make one block of
all rows, of any number. Products are made of factors, never by division or logarithms: transitions
may be negative or zero. All arrays have at most three more axes in front.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Gates(NamedTuple):
  """The gates of nodes, one array for each; the names are those of `ops.plstm_2d`'s docstring."""

  source_r: Float[Array, "... Y X"]
  source_d: Float[Array, "... Y X"]
  t_rl: Float[Array, "... Y X"]
  t_ru: Float[Array, "... Y X"]
  t_dl: Float[Array, "... Y X"]
  t_du: Float[Array, "... Y X"]
  mark_l: Float[Array, "... Y X"]
  mark_u: Float[Array, "... Y X"]


class Maps(NamedTuple):
  """A block, as out_in: nodes n, rows y (left and right), columns x (above and below)."""

  node_left: Float[Array, "... n y"]
  node_above: Float[Array, "... n x"]
  node_node: Float[Array, "... n n"] | None  # None is left out of merges
  right_left: Float[Array, "... y y"]
  right_above: Float[Array, "... y x"]
  right_node: Float[Array, "... y n"]
  below_left: Float[Array, "... x y"]
  below_above: Float[Array, "... x x"]
  below_node: Float[Array, "... x n"]


def split_gates(source: Array, transition: Array, mark: Array) -> Gates:
  """Gates out of source [... 2], transition [... 2 2] and mark [... 2]."""
  t = transition
  return Gates(
    source[..., 0], source[..., 1], t[..., 0, 0], t[..., 0, 1], t[..., 1, 0], t[..., 1, 1],
    mark[..., 0], mark[..., 1],
  )  # fmt: skip


def _segments(t: Float[Array, "... n"]) -> Float[Array, "... n+1 n+1"]:
  """[i, j]: how much of a state on the edge that enters node j arrives on the one that enters node
  i (leaves node i-1): the product of t from j to i-1, zero for i < j."""
  n = t.shape[-1]
  edges = jnp.arange(n + 1)
  factors = jnp.where(edges[:-1, None] >= edges, t[..., None], 1)
  first = jnp.ones_like(factors[..., :1, :])
  products = jnp.cumprod(jnp.concatenate([first, factors], axis=-2), axis=-2)
  return jnp.where(edges[:, None] >= edges, products, 0)


def row_maps(gates: Gates) -> Maps:
  """The maps of each row, [... Y . .]."""
  segments = _segments(gates.t_rl)
  columns = lambda x: x[..., None]
  eye = jnp.eye(gates.t_rl.shape[-1], dtype=gates.t_rl.dtype)
  from_left, from_nodes = segments[..., :-1, :1], segments[..., :-1, 1:]
  past_nodes = segments[..., -1:, 1:]
  turned, written = gates.t_ru[..., None, :], gates.source_r[..., None, :]
  return Maps(
    node_left=columns(gates.mark_l) * from_left,
    node_above=columns(gates.mark_l) * from_nodes * turned + eye * columns(gates.mark_u),
    node_node=columns(gates.mark_l) * from_nodes * written,
    right_left=segments[..., -1:, :1],
    right_above=past_nodes * turned,
    right_node=past_nodes * written,
    below_left=columns(gates.t_dl) * from_left,
    below_above=columns(gates.t_dl) * from_nodes * turned + eye * columns(gates.t_du),
    below_node=columns(gates.t_dl) * from_nodes * written + eye * columns(gates.source_d),
  )


def fold(rows: Maps, visit: Callable | None = None) -> Maps:
  """The maps of one block out of those of its rows, [... Y . .]. Pairs of neighbours are merged at
  once, again and again; of an odd number the last goes on top of a tail.

  Before each merge `visit(upper, lower, top, heights)` sees the blocks [... pairs . .]: the first
  pair begins at row `top`, the others follow, each an upper block of heights[0] rows and a lower
  one of heights[1].
  """

  def join(upper, lower, top, heights):
    if visit is not None:
      visit(upper, lower, top, heights)
    return merge(upper, lower)

  pick = lambda part: jax.tree.map(lambda x: x[..., part, :, :], rows)
  tail, tail_height, height = None, 0, 1
  while (count := rows.right_left.shape[-3]) > 1:
    if count % 2:
      last, top = pick(slice(-1, None)), (count - 1) * height
      tail = last if tail is None else join(last, tail, top, (height, tail_height))
      tail_height += height
      rows = pick(slice(None, -1))
    rows = join(pick(slice(0, None, 2)), pick(slice(1, None, 2)), 0, (height, height))
    height *= 2
  block = rows if tail is None else join(rows, tail, 0, (height, tail_height))
  return jax.tree.map(lambda x: x[..., 0, :, :], block)


def merge(a: Maps, b: Maps) -> Maps:
  """The maps of block `a` with block `b` below it, of the same columns."""
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  over = lambda x, y: jnp.concatenate([x, y], axis=-2)
  beside = lambda x, y: jnp.concatenate([x, y], axis=-1)

  def into_rows(a_own, b_own, b_above, below):
    # Rows of `a` see nothing of `b`; rows of `b` see what leaves `a`.
    top = jnp.pad(a_own, [(0, 0)] * (a_own.ndim - 1) + [(0, b_own.shape[-1])])
    return over(top, beside(product(b_above, below), b_own))

  return Maps(
    node_left=into_rows(a.node_left, b.node_left, b.node_above, a.below_left),
    node_above=over(a.node_above, product(b.node_above, a.below_above)),
    node_node=None
    if a.node_node is None
    else into_rows(a.node_node, b.node_node, b.node_above, a.below_node),
    right_left=into_rows(a.right_left, b.right_left, b.right_above, a.below_left),
    right_above=over(a.right_above, product(b.right_above, a.below_above)),
    right_node=into_rows(a.right_node, b.right_node, b.right_above, a.below_node),
    below_left=beside(product(b.below_above, a.below_left), b.below_left),
    below_above=product(b.below_above, a.below_above),
    below_node=beside(product(b.below_above, a.below_node), b.below_node),
  )
