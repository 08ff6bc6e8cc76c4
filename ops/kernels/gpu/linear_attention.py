"""`linear_attention` on Hopper GPUs: which kernels serve which recurrence.

The columns of a state know nothing of each other. Where there are more than a kernel has room for,
a head is taken for several, side by side, with the same keys and gates.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import decode_step, delta_rule, kda, scalar_decay, vector_decay

WIDEST = 128  # columns of a state that a kernel has room for


def supports(*, q, v, log_decay, beta, **arguments) -> dispatch.Reason:
  """Why no kernel can run `linear_attention` on these arguments; None if one can."""
  B, T, H, V = v.shape
  v = jax.ShapeDtypeStruct((B, T, H * _blocks(V), V // _blocks(V)), v.dtype)
  shared = shards.refusal(B=q.shape[0], H=q.shape[2] if q.shape[2] > 1 else v.shape[2])
  kernels = _kernels(v.shape[1], beta, log_decay is not None and log_decay.ndim == 4)
  return kernels.supports(q=q, v=v, log_decay=log_decay, beta=beta, **arguments) or shared


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""

  def kernel(tokens, state):
    by_row = tokens.log_decay is not None and tokens.log_decay.ndim == 5
    kernels = _kernels(tokens.v.shape[1], tokens.beta, by_row)
    return kernels.run(tokens, state, scale, chunk_size, precision)

  B, _, Hq, M, _ = tokens.v.shape
  # Where one key head serves all heads, those are shared, and every device has the key head.
  keys, values, states = ("B T H", "B T H", "B H") if Hq > 1 else ("B T", "B T Hq H", "B Hq H")
  letters = tokens._replace(q=keys, k=keys, v=values, log_decay=values, beta=values, segments="B T")
  run = functools.partial(_side_by_side, kernel)
  return shards.on_shards(
    run, (letters, states), (values, states), (tokens, state), B=B, H=Hq if Hq > 1 else M
  )


def _side_by_side(kernel, tokens, state):
  """`kernel(tokens, state)`, of heads no wider than it has room for."""
  v, (*_, K, V) = tokens.v, state.shape
  n = _blocks(V)
  if n == 1:
    return kernel(tokens, state)
  repeat = lambda x: None if x is None else jnp.repeat(x, n, axis=3)
  by_block = tokens._replace(
    v=v.reshape(*v.shape[:3], -1, V // n),
    log_decay=repeat(tokens.log_decay),
    beta=repeat(tokens.beta),
  )
  states = jnp.moveaxis(state.reshape(*state.shape[:3], K, n, -1), 4, 3)
  o, states = kernel(by_block, states.reshape(*state.shape[:2], -1, K, V // n))
  states = states.reshape(*state.shape[:3], n, K, -1)
  return o.reshape(v.shape), jnp.moveaxis(states, 3, 4).reshape(state.shape)


def _blocks(V: int) -> int:
  return V // WIDEST if V % WIDEST == 0 else 1


def _kernels(T, beta, by_row: bool):
  """For so many tokens; `by_row` is a decay for each row of the state."""
  if T == 1:
    return decode_step
  if by_row:
    return vector_decay if beta is None else kda
  return scalar_decay if beta is None else delta_rule
