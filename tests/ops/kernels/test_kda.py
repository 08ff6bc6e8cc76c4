"""The Hopper kernels of the delta rule with a decay per row of the state, in the interpreter on a
CPU, and lowered for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import reference
from ops.kernels.gpu import kda, linear_attention
from ops.segments import find_segments
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic, on_hopper


@needs_mosaic
@pytest.mark.parametrize("gates", ["mild", "strong"])
def test_values_and_gradients(gates):
  """Correlated keys, beta up to 2, a chunk that is not full, two heads of values for one of keys;
  gates of one level, and of all with documents."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  T, H, K, V = 70, 2, 64, 64
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, T, *heads)) for heads in ((1, K), (1, K), (H, V)))
  k = np.maximum(k, -0.3)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_decay = -np.log1p(np.exp(-rng.standard_normal((1, T, H, K)))) / 16
  if gates == "strong":
    log_decay[rng.random(log_decay.shape) < 0.1] = -20.0
    log_decay[:, 40, :, ::2] = -1e4
    log_decay[..., 0] = 0.0
  inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in {"q": q, "k": k, "v": v}.items()} | {
    "log_decay": jnp.asarray(log_decay, jnp.float32),
    "beta": jnp.asarray(2 * rng.random((1, T, H)), jnp.float32),
    "initial_state": jnp.asarray(rng.standard_normal((1, H, K, V)), jnp.float32),
  }

  segment_ids, document = None, None
  if gates == "strong":
    segment_ids = np.repeat([3, 4, 7, 5], [10, 45, 1, T - 56])[None].astype(np.int32)
    document = find_segments(jnp.asarray(segment_ids)).document

  def kernel(q, k, v, log_decay, beta, initial_state):
    interpret = plgpu.InterpretGPUParams()
    return kda.attend(q, k, v, log_decay, beta, initial_state, document, K**-0.5, interpret)

  expected = compare.truth(reference.linear_attention, inputs, segment_ids=segment_ids)
  compare.check(compare.run(kernel, inputs), expected, "bfloat16")


@needs_mosaic
def test_scores_and_inverses_of_two_warpgroups():
  """Where K is 128 each of two warpgroups has a half of it: the sums are the whole's."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu import kda_operands

  T, K = 64, 128
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.standard_normal((1, T, 1, K)) / 8, jnp.bfloat16) for _ in range(2))
  # The first half of K is mild, the second is not.
  g = np.where(np.arange(K) < 64, -0.05, -7.0 * rng.random((1, T, 1, K)))
  g, beta = jnp.asarray(g, jnp.float32), jnp.asarray(2 * rng.random((1, 1, T)), jnp.float32)
  interpret = plgpu.InterpretGPUParams()
  *_, scores, inverses = kda_operands.operands(q, k, g, beta, None, 0.5, 2, interpret)

  wide = lambda x: np.asarray(x, np.float64)[0, :, 0]
  b = np.cumsum(wide(g), 0)
  lower = np.tril(np.ones((T, T), bool))
  decays = np.exp(np.where(lower[..., None], b[:, None] - b, -np.inf))
  expected = np.einsum("ik,jk,ijk->ij", wide(q), wide(k), decays) * 0.5
  np.testing.assert_allclose(np.asarray(scores[0, 0, 0], np.float64), expected, atol=6e-3)
  step = np.asarray(beta[0, 0], np.float64)
  pairs = np.tril(np.einsum("ik,jk,ijk->ij", wide(k), wide(k), decays), -1)
  expected = np.linalg.inv(np.eye(T) + step[:, None] * pairs) * step
  actual = np.asarray(inverses[0, 0, 0], np.float64).sum(0)
  np.testing.assert_allclose(actual, expected, atol=1e-2 * np.abs(expected).max())


@needs_mosaic
def test_lowers_for_a_hopper_gpu():
  B, T, H, K = 2, 1024, 2, 128
  struct = jax.ShapeDtypeStruct
  q, g = struct((B, T, H, K), jnp.bfloat16), struct((B, T, H, K), jnp.float32)
  beta, state = struct((B, T, H), jnp.float32), struct((B, H, K, K), jnp.float32)
  arguments = dict(q=q, k=q, v=q, log_decay=g, beta=beta, scale=None, chunk_size=None)

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4, 5))
  def everything(q, k, v, g, beta, state):
    o, state = kda.attend(q, k, v, g, beta, state, None, 0.1)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  with on_hopper():
    assert linear_attention.supports(**arguments, segment_ids=None) is None
    assert "one decay per row" in kda.supports(**arguments | dict(beta=None), segment_ids=None)
  text = lowered(everything, q, q, q, g, beta, state)
  assert text.count("custom_call @mosaic_gpu_v2") >= 4
