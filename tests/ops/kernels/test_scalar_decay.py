"""The Hopper kernels, in the interpreter on a CPU, and lowered for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import scalar_decay
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic


def _inputs(T, H, K, V, log_decay):
  rng = np.random.default_rng(T + K)
  shapes = {"q": (1, T, 1, K), "k": (1, T, 1, K), "v": (1, T, H, V)}
  arrays = {name: jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for name, s in shapes.items()}
  gates = np.broadcast_to(np.resize(log_decay, T)[:, None], (1, T, H))
  arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
  return arrays | {"initial_state": jnp.asarray(rng.standard_normal((1, H, K, V)), jnp.float32)}


@needs_mosaic
@pytest.mark.parametrize(
  ("T", "H", "K", "V", "log_decay", "starts"),
  [
    (130, 2, 64, 64, [-0.05] * 6 + [-20.0], [5, 64, 90]),
    (130, 1, 128, 128, [-0.1] * 30 + [-1e4], []),
  ],
  ids=["two heads that share keys, documents", "wide"],
)
def test_values_and_gradients(T, H, K, V, log_decay, starts):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def kernel(q, k, v, log_decay, initial_state, segment_ids):
    document = segment_ids if starts else None
    interpret = plgpu.InterpretGPUParams()
    return scalar_decay.attend(q, k, v, log_decay, initial_state, document, K**-0.5, interpret)

  inputs = _inputs(T, H, K, V, log_decay)
  segment_ids = np.searchsorted(starts, np.arange(T)[None], side="right").astype(np.int32)
  actual = compare.run(kernel, inputs, segment_ids)
  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  _check_gates(actual, expected, inputs)
  compare.check(actual, expected, "bfloat16")


def _check_gates(actual, expected, inputs):
  """Takes their gradients out: sums of what rounding of q . dq has left."""
  q = np.asarray(inputs["q"], np.float64)
  size = np.sqrt(np.mean(q**2 * expected["dq"] ** 2))
  gates = expected.pop("dlog_decay")
  error = np.abs(actual.pop("dlog_decay") - gates)
  assert error.max() <= 8e-3 * np.sqrt(np.mean(gates**2)) + 4e-3 * np.sqrt(64 * q.shape[3]) * size


@needs_mosaic
def test_segments_of_the_sequence():
  """Forwards and backwards."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu.scalar_decay_forward import Tiling

  inputs = _inputs(320, 1, 64, 64, [-0.01])
  # The second segment, from token 192 on, goes on with the document before it.
  segment_ids = (np.arange(320)[None] >= 70).astype(np.int32)
  options = dict(scale=64**-0.5, tiling=Tiling(2, 2, 64), interpret=plgpu.InterpretGPUParams())

  names = tuple(inputs)

  @jax.jit
  def run(inputs, document):
    q, k, v, g, state = (inputs[name] for name in names)
    o, final, before = scalar_decay.forward(q, k, v, g, state, document, save=True, **options)
    do, dfinal = (
      jnp.asarray(compare.weights(x.shape, n), x.dtype) for x, n in ((o, 0), (final, 2))
    )
    gradients = scalar_decay.backward(q, k, v, g, document, before, do, dfinal, **options)
    return {"o": o, "state": final, **{"d" + name: x for name, x in zip(names, gradients)}}

  actual = jax.tree.map(np.asarray, run(inputs, jnp.asarray(segment_ids)))
  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  _check_gates(actual, expected, inputs)
  compare.check(actual, expected, "bfloat16")


@needs_mosaic
@pytest.mark.parametrize("mapped", [(), (3,)], ids=["", "vmap"])
def test_lowers_for_a_hopper_gpu(mapped):
  B, T, H, K = 2, 1000, 2, 128
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((*mapped, *shape), dtype)
  q, v = struct(B, T, 1, K), struct(B, T, H, K)
  g, state = struct(B, T, H, dtype=jnp.float32), struct(B, H, K, K, dtype=jnp.float32)

  @functools.partial(jax.grad, argnums=(0, 1, 2, 3, 4))
  def gradients(q, k, v, g, state, segment_ids):
    o, state = ops.linear_attention(
      q, k, v, log_decay=g, initial_state=state, segment_ids=segment_ids, implementation="pallas"
    )
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  function = jax.vmap(gradients) if mapped else gradients
  text = lowered(function, q, q, v, g, state, struct(B, T, dtype=jnp.int32))
  assert text.count("custom_call @mosaic_gpu_v2") >= 3
