"""`selective_scan` on Hopper GPUs: arguments, and gradients.

The state of a channel stays in registers for all of time; a few of them are kept for the backward
pass, which makes the others again. Arrays of the state are [N D] here, channels last. The kernels
are in `selective_scan_forward.py` and `selective_scan_backward.py`, imported when they run: older
versions of jax lack what they use.
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import heuristics
from ops.kernels.gpu.linear_scan import find_marks
from ops.kernels.gpu.scalar_decay import folding_mapped_axes
from ops.segments import Segments, where_mask

SIZES = (16, 32, 64)  # of the state
LOG2_E = 1.4426950408889634


def supports(*, x, dt, A, B, C, D, initial_state, chunk_size, **arguments) -> dispatch.Reason:
  """Why the kernels cannot run `selective_scan` on these arguments; None if they can."""
  reason = heuristics.no_hopper()
  if reason is not None:
    return reason
  given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state}
  for name, array in given.items():
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"it takes bfloat16 and float32, {name} is {array.dtype}"
  if A.shape[1] not in SIZES:
    return f"N is {A.shape[1]}, it knows {SIZES}"
  width = shards.part("D", x.shape[2])
  if width % 8:
    return f"D is {width}, it needs a multiple of 8: rows of whole 16 bytes"
  if chunk_size is not None:
    return "it chooses its chunks, chunk_size is for others"
  return shards.refusal(B=x.shape[0], D=x.shape[2])


def scan(x, dt, A, B, C, D, state, segments: Segments | None, reverse: bool, interpret=None):
  """y [B T D] in the dtype of `x` and the final state float32 [B D N], with gradients.

  Args:
    x, dt, A, B, C, D: as in `ops.selective_scan`.
    state: float32 [B D N].
    segments: of `ops.segments`, found in the direction of the scan, or None.
    reverse: scan from the right.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  batch, _, width = x.shape
  rates = A.T.astype(jnp.float32) * LOG2_E
  rates = jnp.broadcast_to(rates, (batch, *rates.shape))
  skip = jnp.zeros(width) if D is None else D.astype(jnp.float32)
  skip = jnp.broadcast_to(skip, (batch, width))
  B, C, marks = B.astype(jnp.float32), C.astype(jnp.float32), None
  if segments is not None:
    B, C = where_mask(segments.real, B), where_mask(segments.real, C)
    marks = find_marks(segments)
  state = jnp.swapaxes(state.astype(jnp.float32), 1, 2)
  y, final_state = _scan(x, dt, rates, B, C, skip, state, marks, reverse, interpret)
  return y, jnp.swapaxes(final_state, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _scan(*arguments):
  *arrays, reverse, interpret = arguments
  call = functools.partial(_forward, reverse=reverse, save=False, interpret=interpret)
  return folding_mapped_axes(call)(*arrays)


def _scan_forward(*arguments):
  *arrays, reverse, interpret = arguments
  call = functools.partial(_forward, reverse=reverse, save=True, interpret=interpret)
  y, final_state, before = folding_mapped_axes(call)(*arrays)
  x, dt, A, B, C, D, _, marks = arrays
  return (y, final_state), (x, dt, A, B, C, D, before, marks)


def _scan_backward(reverse, interpret, residuals, cotangents):
  call = functools.partial(_backward, reverse=reverse, interpret=interpret)
  return *folding_mapped_axes(call)(*residuals, *cotangents), None


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(*arrays, **options):
  from ops.kernels.gpu.selective_scan_forward import outputs

  return outputs(*arrays, **options)


def _backward(*arrays, **options):
  from ops.kernels.gpu.selective_scan_backward import gradients

  return gradients(*arrays, **options)
