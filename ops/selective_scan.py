"""Selective scan of Mamba: a diagonal recurrence with a state of N numbers per channel.

  h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t,    y_t = h_t C_t + D x_t

An array [B T D N] would be N times the input, so "chunked" holds one chunk of states at a time: the
forward pass keeps the state at every chunk border, the backward pass computes the others again.
With e_t = dL/dy_t, d = dL/dh_t, u_t = dt_t x_t and a_t = exp(dt_t A), from right to left:

  dC_t = sum_D e_t h_t     d <- d + e_t C_t     dB_t = sum_D u_t d     du_t = sum_N d B_t
  d <- a_t d    w = d h_{t-1}    ddt_t = x_t du_t + sum_N w A    dx_t = dt_t du_t    dA += w dt_t

The steps of a chunk are written out, not looped over: on a CPU, where XLA runs one fused loop per
state and step, that is more than twice as fast as a loop inside a loop.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import affine, dispatch
from ops.exponential import exp2
from ops.kernels import shards
from ops.kernels.gpu import selective_scan as kernels
from ops.precision import state_dtype, varying_like
from ops.segments import find_segments, where_mask
from ops.time_axis import splits_time

DEFAULT_CHUNK = 16  # tokens; a chunk's steps are unrolled, so compile time grows with it
LOG2_E = 1.4426950408889634


@splits_time
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
      "chunked" (states kept at chunk borders only, recomputed in the backward pass), "pallas" (the
      same in kernels for Hopper GPUs), or None.
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
  dispatch.check_dtypes(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
  dispatch.check_segment_ids(segment_ids)
  dispatch.check_chunk_size(chunk_size)
  name, run = dispatch.choose(
    "selective_scan", implementation, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state,
    segment_ids=segment_ids, reverse=reverse, chunk_size=chunk_size,
  )  # fmt: skip
  dtype, out_dtype = state_dtype(x, dt, A, B, C, D, initial_state), x.dtype
  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], *A.shape), dtype)
  state = varying_like(initial_state.astype(dtype), x, dt, A, B, C, segment_ids)
  segments = start = None
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
  if name == "pallas":
    letters = "B T D", "B T D", "D N", "B T N", "B T N", "D", "B D N", "B T"
    return shards.on_shards(
      functools.partial(run, reverse=reverse), letters, ("B T D", "B D N"),
      (x, dt, A, B, C, D, state, segments), B=x.shape[0], D=x.shape[2],
    )  # fmt: skip
  x, dt, A, B, C = (array.astype(dtype) for array in (x, dt, A, B, C))
  if segments is not None:
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
  if segments is not None:
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
  dispatch.check_dtypes(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D)
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
  T = x.shape[1]
  size = min(T, chunk_size or DEFAULT_CHUNK)
  chunks = tuple(_split(array, size) for array in (x, dt, B, C, start))
  y, final_state = _scan_chunks(*chunks, A.T, jnp.swapaxes(state, 1, 2))
  return _join(y)[:, :T], jnp.swapaxes(final_state, 1, 2)


def _split(array, size):
  """[B T ...] -> [T/C B C ...]; zeros at the end are tokens that leave the state as it is."""
  if array is None:
    return None
  array = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size)) + ((0, 0),) * (array.ndim - 2))
  return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)


def _join(chunks):
  """[T/C B C ...] -> [B T ...]."""
  array = jnp.moveaxis(chunks, 0, 1)
  return array.reshape(array.shape[0], -1, *array.shape[3:])


def _token(chunk, i):
  """Token `i` of every array [B C ...] of a chunk."""
  return jax.tree.map(lambda array: array[:, i], chunk)


def _kept(start, h):
  """The state `h` [B N D] as the next token finds it: nothing where a document starts."""
  return h if start is None else where_mask(~start, h)


def _advance(h, A, x, dt, B, start):
  """h_t [B N D] from h_{t-1}."""
  return _decay(dt, A) * _kept(start, h) + (dt * x)[:, None] * B[:, :, None]


def _decay(dt, A):
  return exp2(dt[:, None] * (A * LOG2_E))


def _contract(equation, *arrays):
  return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _scan_chunks(x, dt, B, C, start, A, state):
  """Arrays in chunks [T/C B C ...], A [N D], state [B N D]: D is last, for the vector unit."""
  return _forward(x, dt, B, C, start, A, state)[0]


def _forward(x, dt, B, C, start, A, state):
  def chunk(h, tokens):
    incoming, y = h, []
    for i in range(tokens[0].shape[1]):
      x, dt, B, C, start = _token(tokens, i)
      h = _advance(h, A, x, dt, B, start)
      y.append(_contract("bnd,bn->bd", h, C))
    return h, (jnp.stack(y, 1), incoming)

  final_state, (y, incoming) = jax.lax.scan(chunk, state, (x, dt, B, C, start))
  return (y, final_state), (x, dt, B, C, start, A, incoming)


def _backward(residuals, cotangents):
  x, dt, B, C, start, A, incoming = residuals
  dy, dh = cotangents

  def chunk(carry, inputs):
    dh, dA = carry
    h, dy, tokens = inputs
    size = dy.shape[1]
    states = [h]
    for i in range(size):
      x, dt, B, _, start = _token(tokens, i)
      states.append(_advance(states[-1], A, x, dt, B, start))
    gradients, dA_terms = [], []
    for i in reversed(range(size)):
      (x, dt, B, C, start), e = _token(tokens, i), dy[:, i]
      dC = _contract("bnd,bd->bn", states[i + 1], e)
      dh = dh + e[:, None] * C[:, :, None]
      dB = _contract("bnd,bd->bn", dh, dt * x)
      du = _contract("bnd,bn->bd", dh, B)
      dh = _kept(start, _decay(dt, A) * dh)
      w = _kept(start, dh * states[i])
      gradients.append((dt * du, x * du + jnp.sum(w * A, axis=1), dB, dC))
      dA_terms.append(w * dt[:, None])
    gradients = jax.tree.map(lambda *tokens: jnp.stack(tokens[::-1], 1), *gradients)
    return (dh, dA + sum(dA_terms)), gradients

  inputs = (incoming, dy, (x, dt, B, C, start))
  (dh, dA), gradients = jax.lax.scan(chunk, (dh, jnp.zeros_like(dh)), inputs, reverse=True)
  return (*gradients, None, jnp.sum(dA, axis=0), dh)


_scan_chunks.defvjp(_forward, _backward)


def _preference(x, **arguments):
  fast = ["pallas"] if x.shape[1] > 1 else []  # one token needs no kernel
  return [*fast, "chunked", "recurrent", "parallel"]


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
    "pallas": dispatch.Implementation(
      kernels.scan, kernels.supports, "one pass over memory, few states kept"
    ),
  },
  _preference,
)
