"""The Hopper kernels of the delta rule, in the interpreter on a CPU, and lowered for a GPU that is
not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import delta_rule
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic


@needs_mosaic
@pytest.mark.parametrize(
  "starts", [[], [5, 64, 90]], ids=["", "two heads that share keys, documents"]
)
def test_values_and_gradients(starts):
  """Correlated keys, beta up to 2, strong gates, and a chunk that is not full."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  T, H, K, V = 130, 2 if starts else 1, 64, 128
  rng = np.random.default_rng(0)
  q, k = (rng.standard_normal((1, T, 1, K)) for _ in range(2))
  v = rng.standard_normal((1, T, H, V))
  k = np.maximum(k, -0.3)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  # Nothing but a document's end may hide what comes before it.
  strong = [] if starts else [-20.0] + [-0.05] * 40 + [-1e4]
  gates = np.resize([-0.05] * 9 + strong, T)[None, :, None]
  beta = 2 * rng.random((1, T, H))
  beta[:, ::7] = 0
  inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in {"q": q, "k": k, "v": v}.items()} | {
    "log_decay": jnp.asarray(np.broadcast_to(gates, (1, T, H)), jnp.float32),
    "beta": jnp.asarray(beta, jnp.float32),
    "initial_state": jnp.asarray(rng.standard_normal((1, H, K, V)), jnp.float32),
  }

  def kernel(q, k, v, log_decay, beta, initial_state, segment_ids):
    document = segment_ids if starts else None
    arrays = (q, k, v, log_decay, beta, initial_state, document)
    return delta_rule.attend(*arrays, K**-0.5, plgpu.InterpretGPUParams())

  segment_ids = np.searchsorted(starts, np.arange(T)[None], side="right").astype(np.int32)
  actual = compare.run(kernel, inputs, segment_ids)
  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  compare.check(actual, expected, "bfloat16")
  assert not actual["dk"][:, ::7].any()
  assert not actual["dv"][:, ::7].any()


@needs_mosaic
@pytest.mark.parametrize("mapped", [(), (3,)], ids=["", "vmap"])
def test_lowers_for_a_hopper_gpu(mapped):
  B, T, H, K = 2, 1000, 2, 128
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((*mapped, *shape), dtype)
  q, v = struct(B, T, 1, K), struct(B, T, H, K)
  g, state = struct(B, T, H, dtype=jnp.float32), struct(B, H, K, K, dtype=jnp.float32)

  @functools.partial(jax.grad, argnums=(0, 1, 2, 3, 4, 5))
  def gradients(q, k, v, g, beta, state, segment_ids):
    o, state = ops.linear_attention(
      q, k, v, log_decay=g, beta=beta, initial_state=state, segment_ids=segment_ids,
      implementation="pallas",
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  function = jax.vmap(gradients) if mapped else gradients
  text = lowered(function, q, q, v, g, g, state, struct(B, T, dtype=jnp.int32))
  assert text.count("custom_call @mosaic_gpu_v2") == 4
