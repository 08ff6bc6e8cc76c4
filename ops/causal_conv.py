"""Short depthwise causal convolution with a state:  y_t = bias + sum_w weight[w] x_{t-(W-1)+w}.

The last row of `weight` meets the token itself. Documents do not see one another and padding is
skipped: a token sees the real tokens before it, however much padding lies between. For that the
real tokens of a row are moved together, convolved, and moved back.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import dispatch
from ops.precision import state_dtype, varying_like
from ops.segments import find_segments, where_mask
from ops.time_axis import splits_time


@splits_time
def causal_conv(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B W-1 D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
  """y_t = bias + sum_w weight[w] x_{t-(W-1)+w}, each channel on its own.

  Args:
    x: [B T D], the input.
    weight: [W D]; `weight[W-1]` meets the token itself, `weight[0]` the one W-1 before.
    bias: [D]; None is zero.
    initial_state: [B W-1 D], the tokens before the first, the latest last; None is zeros.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: from the right; `weight[0]` then meets the token W-1 after.
    implementation: "recurrent" (one token after the other), "parallel" (W shifted products), or
      None.

  Returns:
    y [B T D] in the dtype of `x`, and the final state [B W-1 D]: the last W-1 real tokens of the
    last document, zeros where it has fewer, in float32 (float64 for float64 inputs).

  Raises:
    ValueError: a shape or `implementation` that cannot be.
  """
  dispatch.check_shapes(
    x=(x, "B T D"), weight=(weight, "W D"), bias=(bias, "D"),
    initial_state=(initial_state, "B W-1 D"), segment_ids=(segment_ids, "B T"),
  )  # fmt: skip
  dispatch.check_dtypes(x=x, weight=weight, bias=bias, initial_state=initial_state)
  dispatch.check_segment_ids(segment_ids)
  _, run = dispatch.choose(
    "causal_conv", implementation, x=x, weight=weight, bias=bias, initial_state=initial_state,
    segment_ids=segment_ids, reverse=reverse,
  )  # fmt: skip
  dtype, out_dtype = state_dtype(x, weight, bias, initial_state), x.dtype
  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), dtype)
  x, weight, state = (array.astype(dtype) for array in (x, weight, initial_state))
  state = varying_like(state, x, weight, segment_ids)
  segments = None
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
    x = where_mask(segments.real, x)
  if reverse:
    x, segments = jax.tree.map(lambda array: jnp.flip(array, 1), (x, segments))
  y, final_state = run(x, weight, state, segments)
  if bias is not None:
    y = y + bias.astype(dtype)
  if segments is not None:
    y = where_mask(segments.real, y)
  y = jnp.flip(y, 1) if reverse else y
  return y.astype(out_dtype), final_state


def causal_conv_step(
  state: Float[Array, "B _ D"],
  x: Float[Array, "B D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
  """One token of `causal_conv`: y [B D] in the dtype of `x`, and the new state [B W-1 D]."""
  dispatch.check_shapes(
    weight=(weight, "W D"), state=(state, "B W-1 D"), x=(x, "B D"), bias=(bias, "D")
  )
  dispatch.check_dtypes(state=state, x=x, weight=weight, bias=bias)
  dtype = state_dtype(state, x, weight, bias)
  window = jnp.concatenate([state.astype(dtype), x[:, None].astype(dtype)], axis=1)
  y = jnp.sum(window * weight.astype(dtype), axis=1)
  if bias is not None:
    y = y + bias.astype(dtype)
  return y.astype(x.dtype), window[:, 1:]


def _recurrent(x, weight, state, segments):
  def step(state, token):
    x, real, start = token
    if start is not None:
      state = where_mask(~start, state)
    window = jnp.concatenate([state, x[:, None]], axis=1)
    y = jnp.sum(window * weight, axis=1)
    after = window[:, 1:]
    if real is not None:
      after = jnp.where(real[:, None, None], after, state)
    return after, y

  real, start = (None, None) if segments is None else (segments.real, segments.start)
  tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, real, start))
  final_state, y = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(y, 0, 1), final_state


def _parallel(x, weight, state, segments):
  W, T = weight.shape[0], x.shape[1]
  if segments is None:
    window = jnp.concatenate([state, x], axis=1)
    return _products(window, weight, T), window[:, T:]
  real, _, document = segments
  count = jnp.sum(real, axis=1, keepdims=True)
  position = jnp.where(real, jnp.cumsum(real, axis=1) - 1, count + jnp.cumsum(~real, axis=1) - 1)
  order = jnp.argsort(position, axis=1)
  window = jnp.concatenate([state, _permute(x, order, position)], axis=1)
  documents = jnp.pad(_rows(document, order), ((0, 0), (W - 1, 0)))
  y = _permute(_products(window, weight, T, documents), position, order)
  tail = count + jnp.arange(W - 1)
  kept = _rows(documents, tail) == document[:, -1:]
  return y, where_mask(kept, _rows(window, tail))


def _products(window, weight, T, documents=None):
  """The sum of W shifted products; a token of another document counts as zero."""
  W = weight.shape[0]
  y = weight[W - 1] * window[:, W - 1 :]
  for w in range(W - 1):
    shifted = window[:, w : w + T]
    if documents is not None:
      shifted = where_mask(documents[:, w : w + T] == documents[:, W - 1 :], shifted)
    y = y + weight[w] * shifted
  return y


_rows = jax.vmap(lambda array, indices: array[indices])


@jax.custom_vjp
def _permute(array, indices, inverse):
  """`array` [B T D] with its tokens in the order `indices` [B T]; its gradient is no scatter."""
  return _rows(array, indices)


_permute.defvjp(
  lambda array, indices, inverse: (_rows(array, indices), inverse),
  lambda inverse, cotangent: (_rows(cotangent, inverse), None, None),
)


dispatch.declare(
  "causal_conv",
  {
    "parallel": dispatch.Implementation(_parallel, dispatch.anything, "W shifted products"),
    "recurrent": dispatch.Implementation(_recurrent, dispatch.anything, "T steps"),
    "pallas": dispatch.NO_KERNEL,
  },
)
