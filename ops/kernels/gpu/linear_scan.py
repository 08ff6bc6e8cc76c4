"""`linear_scan` on Hopper GPUs: one pass over memory in each direction.

The backward pass reads the h that the forward pass returned, in its dtype. The kernel is in
`linear_scan_tiles.py`, imported when it runs: older versions of jax lack what it uses.

Marks tell how a token differs, where any does: START forgets the state before it, PADDING leaves
the state as it is.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import heuristics
from ops.kernels.gpu.scalar_decay import folding_mapped_axes
from ops.segments import Segments, where_mask

PLAIN, START, PADDING = range(3)


def supports(*, a, b, chunk_size, initial_state=None, **arguments) -> dispatch.Reason:
  """Why the kernel cannot run `linear_scan` on these arguments; None if it can."""
  reason = heuristics.no_hopper()
  if reason is not None:
    return reason
  if any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in (a, b)):
    return f"it takes bfloat16 and float32, a and b are {a.dtype} and {b.dtype}"
  if initial_state is not None and initial_state.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it takes bfloat16 and float32, initial_state is {initial_state.dtype}"
  multiple = 16 // min(a.dtype.itemsize, b.dtype.itemsize)
  D = shards.part("D", a.shape[2])
  if D % multiple:
    return f"D is {D}, it needs a multiple of {multiple}: rows of whole 16 bytes"
  if chunk_size is not None:
    return "it chooses its chunks, chunk_size is for others"
  return shards.refusal(B=a.shape[0], D=a.shape[2])


def scan(a, b, state, segments: Segments | None, reverse: bool, interpret=None):
  """States h [B T D] in the dtype of `b` and the final one [B D], with gradients.

  Args:
    a, b: bfloat16 or float32 [B T D].
    state: float32 [B D].
    segments: of `ops.segments`, found in the direction of the scan, or None.
    reverse: scan from the right.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  marks = None if segments is None else find_marks(segments)
  h, final_state = _scan(a, b, state, marks, reverse, interpret)
  return h if segments is None else where_mask(segments.real, h), final_state


def find_marks(segments: Segments):
  """int32 [B T]."""
  return jnp.where(segments.start, START, jnp.where(segments.real, PLAIN, PADDING))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _scan(*arguments):
  return _scan_forward(*arguments)[0]


def _scan_forward(a, b, state, marks, reverse, interpret):
  call = functools.partial(forward, reverse=reverse, interpret=interpret)
  h, final_state = folding_mapped_axes(call)(a, b, state, marks)
  return (h, final_state), (a, h, state, marks)


def _scan_backward(reverse, interpret, residuals, cotangents):
  call = functools.partial(backward, reverse=reverse, interpret=interpret)
  return *folding_mapped_axes(call)(*residuals, *cotangents), None


_scan.defvjp(_scan_forward, _scan_backward)


def forward(a, b, state, marks, *, reverse, tiling=None, interpret=None):
  """h [B T D] in the dtype of `b`, also at padding, and the final state float32 [B D]."""
  from ops.kernels.gpu import linear_scan_tiles as tiles

  (h,), final_state = tiles.walk(
    tiles.states, (a, b), (0, 0), (b.dtype,), state, state, marks, reverse, False, tiling, interpret
  )
  return h, final_state


def backward(a, h, state, marks, dh, dstate, *, reverse, tiling=None, interpret=None):
  """Gradients of `a`, `b` and the state, from what `forward` gave."""
  from ops.kernels.gpu import linear_scan_tiles as tiles

  (da, db), dstate = tiles.walk(
    tiles.gradients, (a, dh, h), (0, 0, 1), (a.dtype, dh.dtype), dstate, state, marks, reverse,
    True, tiling, interpret,
  )  # fmt: skip
  return da, db, dstate


def tile_marks(marks, tiles: int, tokens: int, reverse: bool):
  """[B T] -> [B tiles tokens], tiles counted from where time begins; padding where it ends.

  Tiles of less than 32 tokens have room for 32.
  """
  beyond = tiles * tokens - marks.shape[1]
  marks = marks.astype(jnp.int32)
  ends = (beyond, 0) if reverse else (0, beyond)
  marks = jnp.pad(marks, ((0, 0), ends), constant_values=PADDING)
  marks = marks.reshape(marks.shape[0], tiles, tokens)
  marks = jnp.pad(marks, ((0, 0), (0, 0), (0, max(0, 32 - tokens))))  # copies are of 128 bytes
  return jnp.flip(marks, 1) if reverse else marks
