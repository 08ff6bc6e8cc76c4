"""Diagonal linear recurrence, real or complex:  h_t = a_t h_{t-1} + b_t.

The core of S4D, S5, LRU, RG-LRU and HGRN. The backward pass of a scan is a scan: with e_t =
dL/dh_t the direct cotangents, from right to left

  d_t = e_t + a_{t+1} d_{t+1},    db_t = d_t,    da_t = d_t h_{t-1},    dh_{-1} = a_0 d_0,

so every implementation has one custom VJP: itself, reversed, with `a` shifted by one. JAX's
cotangents of complex numbers are not conjugated, hence neither is `a`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from ops import affine, dispatch
from ops.kernels import shards
from ops.kernels.gpu import linear_scan as kernels
from ops.precision import state_dtype, varying_like
from ops.segments import find_segments, where_mask
from ops.time_axis import splits_time


@splits_time
def linear_scan(
  a: Inexact[Array, "B T D"],
  b: Inexact[Array, "B T D"],
  *,
  initial_state: Inexact[Array, "B D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
  """h_t = a_t h_{t-1} + b_t for every token t and channel d (Martin and Cundy 2018,
  arXiv:1709.04057).

  Args:
    a: [B T D], the decay itself (not its logarithm); real or complex, |a| <= 1 for a stable
      recurrence.
    b: [B T D], what is written.
    initial_state: [B D], the state before the first token; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: scan from the right.
    implementation: "recurrent" (one token after the other), "parallel" (associative scan),
      "chunked", "pallas" (a kernel for Hopper GPUs, real only), or None.
    chunk_size: tokens per chunk of "chunked"; None chooses.

  Returns:
    h [B T D] in the dtype of `b` (complex if `a` is), and the final state [B D] in float32
    (float64 for float64 inputs; complex64 or complex128 for complex ones).

  Raises:
    ValueError: a shape or `implementation` that cannot be.
  """
  dispatch.check_shapes(
    a=(a, "B T D"),
    b=(b, "B T D"),
    initial_state=(initial_state, "B D"),
    segment_ids=(segment_ids, "B T"),
  )
  dispatch.check_dtypes(a=a, b=b, complex_allowed=True)
  is_complex = jnp.iscomplexobj(a) or jnp.iscomplexobj(b)
  dispatch.check_dtypes(initial_state=initial_state, complex_allowed=is_complex)
  dispatch.check_segment_ids(segment_ids)
  dispatch.check_chunk_size(chunk_size)
  name, run = dispatch.choose(
    "linear_scan", implementation, a=a, b=b, initial_state=initial_state, segment_ids=segment_ids,
    reverse=reverse, chunk_size=chunk_size,
  )  # fmt: skip
  dtype = state_dtype(a, b, initial_state)
  out_dtype = jnp.result_type(b.dtype, dtype) if jnp.iscomplexobj(a) else b.dtype
  if initial_state is None:
    initial_state = jnp.zeros((a.shape[0], a.shape[2]), dtype)
  state = varying_like(initial_state.astype(dtype), a, b, segment_ids)
  segments = start = None
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
  if name == "pallas":
    return shards.on_shards(
      functools.partial(run, reverse=reverse), ("B T D", "B T D", "B D", "B T"), ("B T D", "B D"),
      (a, b, state, segments), B=a.shape[0], D=a.shape[2],
    )  # fmt: skip
  a, b = a.astype(dtype), b.astype(dtype)
  if segments is not None:
    a, b, start = where_mask(segments.real, a, 1.0), where_mask(segments.real, b), segments.start
  if reverse:
    a, b, start = (None if x is None else jnp.flip(x, 1) for x in (a, b, start))
  h = _scan(run, chunk_size, a, b, state, start)
  final_state = h[:, -1]
  h = jnp.flip(h, 1) if reverse else h
  if segments is not None:
    h = where_mask(segments.real, h)
  return h.astype(out_dtype), final_state


def linear_scan_step(
  state: Inexact[Array, "B D"], a: Inexact[Array, "B D"], b: Inexact[Array, "B D"]
) -> tuple[Inexact[Array, "B D"], Inexact[Array, "B D"]]:
  """One token of `linear_scan`: h [B D] in the dtype of `b`, and the new state [B D]."""
  dispatch.check_shapes(state=(state, "B D"), a=(a, "B D"), b=(b, "B D"))
  dispatch.check_dtypes(state=state, a=a, b=b, complex_allowed=True)
  dtype = state_dtype(a, b, state)
  out_dtype = (
    jnp.result_type(b.dtype, dtype) if jnp.issubdtype(dtype, jnp.complexfloating) else b.dtype
  )
  state = a.astype(dtype) * state + b
  return state.astype(out_dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(run, chunk_size, a, b, state, start):
  """All states h [B T D]; `start` bool [B T] or None resets before a token."""
  return run(a, b, state, start, chunk_size)


def _scan_forward(run, chunk_size, a, b, state, start):
  h = _scan(run, chunk_size, a, b, state, start)
  return h, (a, h, state, start)


def _scan_backward(run, chunk_size, residuals, dh):
  a, h, state, start = residuals
  shifted = jnp.pad(a[:, 1:], ((0, 0), (0, 1), (0, 0)))
  start_after = None if start is None else jnp.flip(jnp.pad(start[:, 1:], ((0, 0), (0, 1))), 1)
  nothing = jnp.zeros_like(state)
  d = jnp.flip(
    _scan(run, chunk_size, jnp.flip(shifted, 1), jnp.flip(dh, 1), nothing, start_after), 1
  )
  before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
  da = d * before
  if start is not None:
    da = where_mask(~start, da)
  return da, d, a[:, 0] * d[:, 0], None


_scan.defvjp(_scan_forward, _scan_backward)


def _recurrent(a, b, state, start, chunk_size):
  def step(h, token):
    h = affine.apply(affine.Affine(*token), h)
    return h, h

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (a, b, start))
  return jnp.moveaxis(jax.lax.scan(step, state, tokens)[1], 0, 1)


def _parallel(a, b, state, start, chunk_size):
  elements = affine.Affine(a, b)
  if start is not None:
    elements = affine.reset(elements, start)
  prefix = jax.lax.associative_scan(affine.compose, elements, axis=1)
  return affine.apply(prefix, state[:, None])


def _chunked(a, b, state, start, chunk_size):
  B, T, D = a.shape
  C = min(T, chunk_size or 32)
  split = lambda x, fill: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    .reshape(B, -(-T // C), C, *x.shape[2:]), 2, 0)  # fmt: skip
  elements = affine.Affine(split(a, 1), split(b, 0), None if start is None else split(start, False))

  def step(prefix, element):
    prefix = affine.compose(prefix, element)
    return prefix, prefix

  first = affine.identity(jax.tree.map(lambda x: x[0], elements))
  whole, local = jax.lax.scan(step, first, elements)

  def carry(h, chunk):
    return affine.apply(chunk, h), h

  _, incoming = jax.lax.scan(carry, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), whole))
  h = affine.apply(local, jnp.moveaxis(incoming, 0, 1)[None])
  return jnp.moveaxis(h, 0, 2).reshape(B, -1, D)[:, :T]


def _preference(a, **arguments):
  if a.shape[1] == 1 or dispatch.platform() == "cpu":
    return ["recurrent", "chunked", "parallel"]
  if dispatch.platform() == "tpu":  # where XLA's associative scan moves its array tens of times
    return ["chunked", "parallel", "recurrent"]
  # The kernel has a program for every few channels: where they are few, XLA's passes are quicker.
  many = a.shape[0] * a.shape[2] >= 256
  return ["pallas", "parallel", "chunked", "recurrent"][not many :]


dispatch.declare(
  "linear_scan",
  {
    "recurrent": dispatch.Implementation(_recurrent, dispatch.anything, "T steps, least memory"),
    "parallel": dispatch.Implementation(
      _parallel, dispatch.anything, "log T depth, many passes over memory"
    ),
    "chunked": dispatch.Implementation(
      _chunked, dispatch.anything, "C + T/C steps, three passes over memory"
    ),
    "pallas": dispatch.Implementation(kernels.scan, kernels.supports, "one pass over memory"),
  },
  _preference,
)
