"""Selective scan of Mamba: a diagonal recurrence with a state of N numbers per channel.

h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t,    y_t = h_t C_t + D x_t
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import affine, dispatch
from ops.precision import state_dtype
from ops.segments import find_segments, where_mask


def selective_scan(
  x: Float[Array, "B T D"],
  dt: Float[Array, "B T D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B T N"],
  C: Float[Array, "B T N"],
  D: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
  """h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t,   y_t = h_t C_t + D x_t.

  The recurrence of Mamba (Gu and Dao 2023, arXiv:2312.00752).

  Args:
    x: [B T D], the input.
    dt: [B T D], the step size, used as given: apply softplus and the bias before.
    A: [D N], real and negative.
    B: [B T N], what each number of the state takes from the input.
    C: [B T N], what the output takes from each number of the state.
    D: [D], the skip connection; None is zero.
    initial_state: [B D N], the state before the first token; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: scan from the right.
    implementation: "recurrent" (one token after the other), "parallel" (associative scan),
      "chunked" (states kept at chunk borders only, recomputed in the backward pass), or None.
    chunk_size: tokens per chunk of "chunked"; None chooses.

  Returns:
    y [B T D] in the dtype of `x`, and the final state [B D N] in float32 (float64 for float64
    inputs).

  Raises:
    ValueError: a shape or `implementation` that cannot be.
  """
  dispatch.check_shapes(
    x=(x, "B T D"), dt=(dt, "B T D"), A=(A, "D N"), B=(B, "B T N"), C=(C, "B T N"), D=(D, "D"),
    initial_state=(initial_state, "B D N"), segment_ids=(segment_ids, "B T"),
  )  # fmt: skip
  dispatch.check_segment_ids(segment_ids)
  dispatch.check_chunk_size(chunk_size)
  _, run = dispatch.choose(
    "selective_scan", implementation, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state,
    segment_ids=segment_ids, reverse=reverse, chunk_size=chunk_size,
  )  # fmt: skip
  dtype, out_dtype = state_dtype(x, dt, A, B, C, D, initial_state), x.dtype
  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], *A.shape), dtype)
  x, dt, A, B, C, state = (array.astype(dtype) for array in (x, dt, A, B, C, initial_state))
  start = None
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
    x, dt, B, C = (where_mask(segments.real, array) for array in (x, dt, B, C))
    start = segments.start
  tokens = (x, dt, B, C, start)
  if reverse:
    tokens = tuple(None if array is None else jnp.flip(array, 1) for array in tokens)
  y, final_state = run(*tokens, A, state, chunk_size)
  if reverse:
    y = jnp.flip(y, 1)
  if D is not None:
    y = y + D.astype(dtype) * x
  if segment_ids is not None:
    y = where_mask(segments.real, y)
  return y.astype(out_dtype), final_state


def selective_scan_step(
  state: Float[Array, "B D N"],
  x: Float[Array, "B D"],
  dt: Float[Array, "B D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B N"],
  C: Float[Array, "B N"],
  D: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
  """One token of `selective_scan`: y [B D] in the dtype of `x`, and the new state [B D N]."""
  dispatch.check_shapes(
    state=(state, "B D N"),
    x=(x, "B D"),
    dt=(dt, "B D"),
    A=(A, "D N"),
    B=(B, "B N"),
    C=(C, "B N"),
    D=(D, "D"),
  )
  dtype, out_dtype = state_dtype(state, x, dt, A, B, C, D), x.dtype
  x, dt, A, B, C, state = (array.astype(dtype) for array in (x, dt, A, B, C, state))
  state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
  y = jnp.sum(state * C[:, None], axis=-1)
  if D is not None:
    y = y + D.astype(dtype) * x
  return y.astype(out_dtype), state


def _recurrent(x, dt, B, C, start, A, state, chunk_size):
  def step(h, token):
    x, dt, B, C, start = token
    element = affine.Affine(jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, None], start)
    h = affine.apply(element, h)
    return h, jnp.sum(h * C[:, None], axis=-1)

  tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, dt, B, C, start))
  final_state, y = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(y, 0, 1), final_state


def _parallel(x, dt, B, C, start, A, state, chunk_size):
  elements = affine.Affine(jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
  if start is not None:
    elements = affine.reset(elements, start)
  h = affine.apply(jax.lax.associative_scan(affine.compose, elements, axis=1), state[:, None])
  return jnp.sum(h * C[:, :, None], axis=-1), h[:, -1]


def _chunked(x, dt, B, C, start, A, state, chunk_size):
  return _recurrent(x, dt, B, C, start, A, state, chunk_size)


dispatch.declare(
  "selective_scan",
  {
    "chunked": dispatch.Implementation(
      _chunked, dispatch.anything, "states kept at chunk borders only"
    ),
    "recurrent": dispatch.Implementation(
      _recurrent, dispatch.anything, "T steps, every state kept for gradients"
    ),
    "parallel": dispatch.Implementation(
      _parallel, dispatch.anything, "log T depth, arrays of [B T D N]"
    ),
    "pallas": dispatch.NO_KERNEL,
  },
)
