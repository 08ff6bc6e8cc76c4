"""Rules over parameter paths."""

import jax
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.rules import first_match, map_rules, path_name

TREE = {"blocks": {"0_mamba": {"norm": {"scale": np.zeros(2)}}}, "embedding": np.zeros(3)}


def test_paths_are_written_as_people_write_them():
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(TREE)]
  assert paths == ["blocks/0_mamba/norm/scale", "embedding"]


def test_the_first_match_wins_wherever_it_stands_in_the_path():
  rules = ((r"mamba/norm", 1), (r"scale$", 2), (r".*", 3))
  assert first_match(rules, "blocks/0_mamba/norm/scale", "field") == 1
  assert first_match(rules[1:], "blocks/0_mamba/norm/scale", "field") == 2
  assert map_rules(rules, TREE, "field") == {
    "blocks": {"0_mamba": {"norm": {"scale": 1}}},
    "embedding": 3,
  }


@pytest.mark.parametrize(
  "rules, message",
  [
    (((r"scale", 1),), "optim.rules has no rule for embedding: add one"),
    (((r"(", 1),), r"optim.rules: '\(' is no regular expression"),
  ],
)
def test_errors_name_the_field_and_the_path(rules, message):
  with pytest.raises(UserError, match=message) as error:
    map_rules(rules, {"embedding": 0}, "optim.rules")
  assert "\n" not in str(error.value)
