"""The Hopper kernel of `linear_scan`, in the interpreter on a CPU, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import linear_scan
from ops.segments import find_segments
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic

# Padding first, in between and last.
DOCUMENTS = np.repeat(np.int32([[-1, 4, -1, 4, 2, 7, -1]]), [3, 20, 6, 11, 30, 1, 8], axis=1)


def _scan(a, b, initial_state, segment_ids=None, reverse=False):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams()
  segments = None if segment_ids is None else find_segments(segment_ids, reverse=reverse)
  return linear_scan.scan(a, b, initial_state, segments, reverse, interpret)


def _inputs(T, D, dtype):
  rng = np.random.default_rng(T + D)
  draw = {"a": rng.choice([-1.0, 0.0, 0.3, 0.9, 1.0], (1, T, D)), "b": rng.normal(size=(1, T, D))}
  return compare.cast(draw | {"initial_state": rng.normal(size=(1, D))}, dtype)


@needs_mosaic
@pytest.mark.parametrize(
  ("T", "D", "dtype", "reverse", "segment_ids"),
  [
    (67, 24, "float32", False, None),
    (79, 16, "bfloat16", True, DOCUMENTS),
  ],
  ids=["", "documents from the right"],
)
def test_values_and_gradients(monkeypatch, T, D, dtype, reverse, segment_ids):
  monkeypatch.setattr(
    "ops.kernels.gpu.linear_scan_tiles.ROWS", 2
  )  # several tiles, little to compile
  inputs = _inputs(T, D, dtype)
  actual = compare.run(_scan, inputs, segment_ids, reverse=reverse)
  options = {"reverse": reverse, "segment_ids": segment_ids}
  compare.check(actual, compare.truth(reference.linear_scan, inputs, **options), dtype)
  if segment_ids is not None:
    inputs = {name: np.array(x) for name, x in inputs.items()}
    for name in ("a", "b"):
      inputs[name][0, (segment_ids[0] == 2) | (segment_ids[0] < 0)] = np.nan
    spoilt = compare.run(_scan, inputs, segment_ids, reverse=reverse)
    for name in ("o", "da", "db"):
      others = segment_ids[0] != 2
      np.testing.assert_array_equal(spoilt[name][0, others], actual[name][0, others], name)


@needs_mosaic
@pytest.mark.parametrize(
  ("B", "D", "dtypes"),
  [(4, 2048, ("bfloat16", "bfloat16")), (1, 40, ("float32", "bfloat16"))],
  ids=["bfloat16", "few channels"],
)
@pytest.mark.parametrize("mapped", [(), (3,)], ids=["", "vmap"])
def test_lowers_for_a_hopper_gpu(B, D, dtypes, mapped):
  T = 1000
  struct = lambda *shape, dtype: jax.ShapeDtypeStruct((*mapped, *shape), dtype)

  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(a, b, state, segment_ids):
    h, state = ops.linear_scan(
      a, b, initial_state=state, segment_ids=segment_ids, implementation="pallas"
    )
    return jnp.sum(h.astype(jnp.float32)) + jnp.sum(state)

  text = lowered(
    jax.vmap(gradients) if mapped else gradients,
    *[struct(B, T, D, dtype=dtype) for dtype in dtypes],
    struct(B, D, dtype="float32"), struct(B, T, dtype="int32"),
  )  # fmt: skip
  assert text.count("custom_call @mosaic_gpu_v2") == 2
