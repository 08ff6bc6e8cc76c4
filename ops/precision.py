"""What a state is: float32 for float32 and narrower inputs, float64 for float64; over which devices
it varies.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def state_dtype(*arrays) -> DTypeLike:
  """The dtype of states, gates and sums: float32 or float64, complex if any input is."""
  return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def varying_like(state: jax.Array, *arrays) -> jax.Array:
  """`state`, varying over the mesh axes over which any of `arrays` does.

  Inside `jax.shard_map` a loop's state must have the type that it will end with.
  """
  varying = lambda array: jax.typeof(array).manual_axis_type.varying
  given = [array for array in arrays if array is not None]
  axes = frozenset().union(*map(varying, given)) - varying(state)
  return jax.lax.pcast(state, tuple(axes), to="varying") if axes else state
