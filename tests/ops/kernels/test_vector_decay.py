"""The kernels of the vector decay, in the interpreter on a CPU, and lowered for a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import vector_decay
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic


def _inputs(T, Hq, H, K, V, gates):
  rng = np.random.default_rng(T + K)
  shapes = {"q": (1, T, Hq, K), "k": (1, T, Hq, K), "v": (1, T, H, V)}
  arrays = {name: jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for name, s in shapes.items()}
  gates = rng.choice(np.asarray(gates), (1, T, H, K))
  arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
  return arrays | {"initial_state": jnp.asarray(rng.standard_normal((1, H, K, V)), jnp.float32)}


def _check(actual, expected, inputs):
  """The gates' gradients are sums of q dq, which leave their rounding behind where they cancel."""
  q, dq = (np.asarray(x, np.float64) for x in (inputs["q"], expected["dq"]))
  error = np.abs(actual.pop("dlog_decay") - expected["dlog_decay"])
  rounding = 4e-3 * np.sqrt(64 * np.mean(q**2 * dq**2))
  rms = np.sqrt(np.mean(expected.pop("dlog_decay") ** 2))
  assert np.sqrt(np.mean(error**2)) <= 8e-3 * rms + rounding
  assert error.max() <= 8e-2 * rms + rounding
  compare.check(actual, expected, "bfloat16")


@needs_mosaic
@pytest.mark.parametrize(
  ("T", "Hq", "H", "K", "V", "gates", "starts"),
  [
    (70, 1, 2, 64, 64, [-0.05] * 9 + [-20.0], [5, 40, 64]),
    (60, 1, 1, 128, 128, [-0.1], []),
    (64, 1, 1, 128, 64, [-0.1] * 30 + [-1e4, -np.inf], []),
  ],
  ids=["heads that share keys, strong gates, documents", "wide", "resets"],
)
def test_values_and_gradients(T, Hq, H, K, V, gates, starts):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def kernel(q, k, v, log_decay, initial_state, segment_ids):
    document = segment_ids if starts else None
    interpret = plgpu.InterpretGPUParams()
    return vector_decay.attend(q, k, v, log_decay, initial_state, document, K**-0.5, interpret)

  inputs = _inputs(T, Hq, H, K, V, np.maximum(gates, -1e9))
  segment_ids = np.searchsorted(starts, np.arange(T)[None], side="right").astype(np.int32)
  actual = compare.run(kernel, inputs, segment_ids)
  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  _check(actual, expected, inputs)


@needs_mosaic
def test_segments_of_the_sequence():
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu.scalar_decay_forward import Tiling

  scale, options = 64**-0.5, {"tiling": Tiling(2, 2, 64), "interpret": plgpu.InterpretGPUParams()}
  inputs = _inputs(192, 1, 1, 64, 64, [-0.01, -0.1])
  # The second segment, from token 128 on, goes on with the document before it.
  segment_ids = (np.arange(192)[None] >= 70).astype(np.int32)
  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  do, dstate = (compare.weights(expected[x].shape, seed) for x, seed in (("o", 0), ("state", 2)))

  @jax.jit
  def forward(document, q, k, v, log_decay, initial_state):
    arrays = (q, k, v, log_decay, initial_state, document)
    return vector_decay.forward(*arrays, scale=scale, save=True, **options)

  @jax.jit
  def backward(document, before, do, dstate, q, k, v, log_decay, initial_state):
    arrays = (q, k, v, log_decay, document, before, do, dstate)
    return vector_decay.backward(*arrays, scale=scale, **options)

  document = jnp.asarray(segment_ids)
  o, state, before = forward(document, **inputs)
  cotangents = jnp.asarray(do, jnp.bfloat16), jnp.asarray(dstate, jnp.float32)
  gradients = backward(document, before, *cotangents, **inputs)
  names = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")
  _check(dict(zip(names, map(np.asarray, (o, state, *gradients)))), expected, inputs)


@needs_mosaic
@pytest.mark.parametrize("mapped", [(), (3,)], ids=["", "vmap"])
def test_lowers_for_a_hopper_gpu(mapped):
  B, T, H, K = 2, 1000, 2, 128
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((*mapped, *shape), dtype)
  q, v = struct(B, T, 1, K), struct(B, T, H, K)
  g, state = struct(B, T, H, K, dtype=jnp.float32), struct(B, H, K, K, dtype=jnp.float32)

  @functools.partial(jax.grad, argnums=(0, 1, 2, 3, 4))
  def gradients(q, k, v, g, state, segment_ids):
    o, state = ops.linear_attention(
      q, k, v, log_decay=g, initial_state=state, segment_ids=segment_ids, implementation="pallas"
    )
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  function = jax.vmap(gradients) if mapped else gradients
  text = lowered(function, q, q, v, g, state, struct(B, T, dtype=jnp.int32))
  assert text.count("custom_call @mosaic_gpu_v2") >= 2
