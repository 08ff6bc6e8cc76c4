"""Which dtype an op computes in: float32 for float32 and narrower inputs, float64 for float64."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def state_dtype(*arrays) -> DTypeLike:
  """The dtype of states, gates and sums: float32 or float64, complex if any input is."""
  return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))
