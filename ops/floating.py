"""The arrays of a pytree that can be differentiated, apart from the others."""

from typing import Any

import jax
import jax.numpy as jnp


def floating(tree: Any) -> Any:
  """`tree` with None in place of what is not floating, and so has no cotangent."""
  is_floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
  return jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, tree)


def filled_in(moved: Any, tree: Any) -> Any:
  """`tree` with the arrays of `moved` in place of its floating ones."""
  return jax.tree.map(
    lambda given, leaf: leaf if given is None else given,
    moved,
    tree,
    is_leaf=lambda leaf: leaf is None,
  )
