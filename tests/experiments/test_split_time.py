"""A training step whose time is split: what its devices send does not grow with the length."""

from collections import Counter

import jax
import pytest

from experiments import sharding, train_step
from experiments.collectives import collectives
from tests.experiments.small import make_config

PATTERNS = [("mamba", "retnet"), ("gated_deltanet", "plstm"), ("paragru", "sliding_attention")]


def sent(pattern, T):
  """(kind, bytes) of all that one step sends -> how often."""
  config = make_config(pattern, data__T=T, mesh__seq=8, train__batch_size=2)
  config.model.paragru.H = 2
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    text = train_step.lower_step(config, mesh).compile().as_text()
  count = Counter()
  for one in collectives(text):
    count[one.kind, one.bytes] += one.count
  return count


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_what_a_step_sends_does_not_grow_with_the_length(pattern):
  short, long = sent(pattern, 64), sent(pattern, 128)
  assert short == long
  kinds = {kind for kind, _ in short}
  assert "all-to-all" not in kinds and "all-gather" in kinds
