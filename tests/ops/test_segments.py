"""Documents and padding, on rows short enough to read."""

import jax.numpy as jnp
import numpy as np

from ops.segments import find_segments


def test_masks_of_a_packed_row():
  ids = jnp.array([[-1, 5, 5, -1, 5, 2, -3, 2, 5, 5]])
  real, start, document = find_segments(ids)
  np.testing.assert_array_equal(real[0], [0, 1, 1, 0, 1, 1, 0, 1, 1, 1])
  np.testing.assert_array_equal(start[0], [0, 0, 0, 0, 0, 1, 0, 0, 1, 0])
  np.testing.assert_array_equal(document[0], [0, 0, 0, 0, 0, 1, 1, 1, 2, 2])


def test_reversed_masks_count_from_the_right():
  ids = jnp.array([[-1, 5, 5, -1, 5, 2, -3, 2, 5, 5]])
  real, start, document = find_segments(ids, reverse=True)
  np.testing.assert_array_equal(real[0], [0, 1, 1, 0, 1, 1, 0, 1, 1, 1])
  np.testing.assert_array_equal(start[0], [0, 0, 0, 0, 1, 0, 0, 1, 0, 0])
  np.testing.assert_array_equal(document[0], [2, 2, 2, 2, 2, 1, 1, 1, 0, 0])


def test_a_row_of_padding_starts_nothing():
  real, start, document = find_segments(jnp.full((2, 4), -1))
  assert not real.any() and not start.any() and not document.any()
