"""A fixture for tests that compile much and compute little."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """XLA without most of its optimisations: the same results, compiled in half the time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
