"""The Hopper kernels of `selective_scan`, in the interpreter on a CPU, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import selective_scan
from ops.segments import find_segments
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic

# Padding first, in between and last.
DOCUMENTS = np.repeat(np.int32([[-1, 4, -1, 4, 2, 7, -1]]), [3, 20, 6, 11, 20, 1, 8], axis=1)


def _scan(x, dt, A, B, C, D, initial_state, segment_ids=None, reverse=False):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams()
  segments = None if segment_ids is None else find_segments(segment_ids, reverse=reverse)
  return selective_scan.scan(x, dt, A, B, C, D, initial_state, segments, reverse, interpret)


def _inputs(T, D, N, dtype):
  rng = np.random.default_rng(T + D)
  normal = lambda *shape: rng.normal(size=shape)
  steps = rng.choice([0.0, 0.01, 0.1, 30.0], (1, T, D), p=[0.1, 0.4, 0.45, 0.05])
  draw = {"x": normal(1, T, D), "dt": steps, "A": -rng.uniform(0.1, 8, (D, N)), "D": normal(D)}
  draw |= {"B": normal(1, T, N), "C": normal(1, T, N), "initial_state": normal(1, D, N)}
  return compare.cast(draw, dtype)


@needs_mosaic
@pytest.mark.parametrize(
  ("T", "D", "N", "dtype", "reverse", "segment_ids"),
  [
    (41, 24, 16, "float32", False, None),
    (69, 24, 32, "bfloat16", True, DOCUMENTS),
  ],
  ids=["", "documents from the right"],
)
def test_values_and_gradients(T, D, N, dtype, reverse, segment_ids):
  inputs = _inputs(T, D, N, dtype)
  actual = compare.run(_scan, inputs, segment_ids, reverse=reverse)
  options = {"reverse": reverse, "segment_ids": segment_ids}
  compare.check(actual, compare.truth(reference.selective_scan, inputs, **options), dtype)
  if segment_ids is not None:
    inputs = {name: np.array(x) for name, x in inputs.items()}
    for name in ("x", "dt", "B", "C"):
      inputs[name][0, (segment_ids[0] == 2) | (segment_ids[0] < 0)] = np.nan
    spoilt = compare.run(_scan, inputs, segment_ids, reverse=reverse)
    for name in ("o", "dx", "ddt", "dB", "dC"):
      others = segment_ids[0] != 2
      np.testing.assert_array_equal(spoilt[name][0, others], actual[name][0, others], name)


@needs_mosaic
@pytest.mark.parametrize(
  ("B", "D", "N", "dtypes"),
  [
    (8, 2048, 16, ("bfloat16", "bfloat16")),
    (1, 40, 32, ("bfloat16", "bfloat16")),
    (1, 40, 64, ("bfloat16", "float32")),
    (1, 136, 16, ("float32", "float32")),
  ],
)
@pytest.mark.parametrize("mapped", [(), (3,)], ids=["", "vmap"])
def test_lowers_for_a_hopper_gpu(B, D, N, dtypes, mapped):
  T = 1000
  struct = lambda *shape, dtype="float32": jax.ShapeDtypeStruct((*mapped, *shape), dtype)

  @functools.partial(jax.grad, argnums=range(7))
  def gradients(x, dt, A, in_, out, skip, state, segment_ids):
    y, state = ops.selective_scan(
      x, dt, A, in_, out, skip, initial_state=state, segment_ids=segment_ids
    )
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

  text = lowered(
    jax.vmap(gradients) if mapped else gradients,
    *[struct(B, T, D, dtype=dtype) for dtype in dtypes],
    struct(D, N), struct(B, T, N, dtype=dtypes[0]), struct(B, T, N), struct(D), struct(B, D, N),
    struct(B, T, dtype="int32"),
  )  # fmt: skip
  assert text.count("custom_call @mosaic_gpu_v2") == 2
