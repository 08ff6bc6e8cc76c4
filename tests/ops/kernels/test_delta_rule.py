"""The Hopper kernels of the delta rule, in the interpreter on a CPU, and lowered for a GPU that is
not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ops import dispatch, reference
from ops.kernels.gpu import delta_rule
from tests.ops import compare

needs_mosaic = pytest.mark.skipif(
  tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="the kernels need jax 0.11"
)


@needs_mosaic
def test_values_and_gradients():
  """Correlated keys, beta up to 2, strong gates, and a chunk that is not full."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  T, K, V = 130, 64, 128
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, T, 1, n)) for n in (K, K, V))
  k = np.maximum(k, -0.3)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  gates = np.resize([-0.05] * 9 + [-20.0] + [-0.05] * 40 + [-1e4], T)[None, :, None]
  inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in {"q": q, "k": k, "v": v}.items()} | {
    "log_decay": jnp.asarray(gates, jnp.float32),
    "beta": jnp.asarray(2 * rng.random((1, T, 1)), jnp.float32),
    "initial_state": jnp.asarray(rng.standard_normal((1, 1, K, V)), jnp.float32),
  }

  def kernel(q, k, v, log_decay, beta, initial_state):
    interpret = plgpu.InterpretGPUParams()
    return delta_rule.attend(q, k, v, log_decay, beta, initial_state, K**-0.5, interpret)

  compare.check(
    compare.run(kernel, inputs), compare.truth(reference.linear_attention, inputs), "bfloat16"
  )


@needs_mosaic
def test_lowers_for_a_hopper_gpu():
  from jax.sharding import AbstractDevice

  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  B, T, H, K = 2, 1024, 2, 128
  struct = jax.ShapeDtypeStruct
  q, g = struct((B, T, H, K), jnp.bfloat16), struct((B, T, H), jnp.float32)
  arguments = dict(q=q, k=q, v=q, log_decay=g, beta=g, scale=None, chunk_size=None)

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4, 5))
  def everything(q, k, v, g, beta, state):
    o, state = delta_rule.attend(q, k, v, g, beta, state, 0.1)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  with jax.sharding.use_abstract_mesh(mesh), dispatch.for_platform("gpu"):
    assert delta_rule.supports(**arguments, segment_ids=None) is None
    assert "segment_ids" in delta_rule.supports(**arguments, segment_ids=g)
    state = struct((B, H, K, K), jnp.float32)
    lowered = jax.jit(everything).trace(q, q, q, g, g, state).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu_v2") >= 2
