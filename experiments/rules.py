"""Ordered (regex, value) rules over parameter paths: the first match wins, a path without one is
an error."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from experiments.errors import UserError


def path_name(path) -> str:
  """A key path as people write it: blocks/0_mamba/mixer/in_proj/kernel."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(rules: Sequence[tuple[str, Any]], name: str, field: str) -> Any:
  """The value of the first rule whose regex is found in `name`.

  Raises:
    UserError: no rule matches, or a regex is malformed; the message names the field and the path.
  """
  for pattern, value in rules:
    try:
      if re.search(pattern, name):
        return value
    except re.error as error:
      raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from None
  raise UserError(f"{field} has no rule for {name}: add one, (r'.*', ...) matches the rest")


def map_rules(rules: Sequence[tuple[str, Any]], tree: Any, field: str) -> Any:
  """A tree of `tree`'s structure with the value that `rules` gives each leaf's path."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: first_match(rules, path_name(path), field), tree
  )
