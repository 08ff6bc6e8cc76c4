"""The Hopper kernels, in the interpreter on a CPU, and lowered for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ops import dispatch, reference
from ops.kernels.gpu import scalar_decay
from tests.ops import compare

needs_mosaic = pytest.mark.skipif(
  tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="jax is older than 0.11"
)


def _inputs(T, K, V, log_decay):
  rng = np.random.default_rng(T + K)
  shapes = {"q": (1, T, 1, K), "k": (1, T, 1, K), "v": (1, T, 1, V)}
  arrays = {name: jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for name, s in shapes.items()}
  gates = np.broadcast_to(np.resize(log_decay, T)[:, None], (1, T, 1))
  arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
  return arrays | {"initial_state": jnp.asarray(rng.standard_normal((1, 1, K, V)), jnp.float32)}


@needs_mosaic
@pytest.mark.parametrize(
  ("T", "K", "V", "log_decay"),
  [(130, 64, 64, [-0.05] * 6 + [-20.0]), (64, 128, 128, [-0.1] * 30 + [-1e4])],
)
def test_values_and_gradients(T, K, V, log_decay):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def kernel(q, k, v, log_decay, initial_state):
    interpret = plgpu.InterpretGPUParams()
    return scalar_decay.attend(q, k, v, log_decay, initial_state, K**-0.5, interpret)

  inputs = _inputs(T, K, V, log_decay)
  actual = compare.run(kernel, inputs)
  expected = compare.truth(reference.linear_attention, inputs)
  size = np.sqrt(np.mean(np.asarray(inputs["q"], np.float64) ** 2 * expected["dq"] ** 2))
  error = np.abs(actual.pop("dlog_decay") - expected["dlog_decay"])
  gates = expected.pop("dlog_decay")
  assert error.max() <= 8e-3 * np.sqrt(np.mean(gates**2)) + 4e-3 * np.sqrt(64 * K) * size
  compare.check(actual, expected, "bfloat16")


@needs_mosaic
def test_lowers_for_a_hopper_gpu():
  from jax.sharding import AbstractDevice

  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  B, T, H, K = 2, 1024, 2, 128
  struct = jax.ShapeDtypeStruct
  q, g, state = (
    struct((B, T, H, K), jnp.bfloat16), struct((B, T, H), jnp.float32),
    struct((B, H, K, K), jnp.float32),
  )  # fmt: skip

  @functools.partial(jax.grad, argnums=(0, 1, 2, 3, 4))
  def gradients(q, k, v, g, state):
    o, state = scalar_decay.attend(q, k, v, g, state, 0.1)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  with jax.sharding.use_abstract_mesh(mesh), dispatch.for_platform("gpu"):
    reason = scalar_decay.supports(
      q=q, k=q, v=q, log_decay=g, beta=None, segment_ids=None, chunk_size=None
    )
    assert reason is None
    lowered = jax.jit(gradients).trace(q, q, q, g, state).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu_v2") >= 3
