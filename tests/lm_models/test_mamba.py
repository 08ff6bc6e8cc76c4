"""The Mamba block against a float64 loop over the paper's equations; how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lm_models import mamba
from tests.lm_models import oracle
from tests.lm_models.models import SEGMENT_IDS, random_params
from tests.quick_compilation import quick_compilation as quick_compilation

CONFIG = mamba.Config(D=6, L=2, N=3, W=4, dt_rank=2)
FAR_APART = np.array([[0] * 12, [4, 4, 9, -1, -1, 9, 9, 9, 9, 4, 4, -1]], np.int32)
IDS = np.concatenate([SEGMENT_IDS, FAR_APART])


@pytest.fixture(scope="module")
def block():
  """Parameters, input, cotangent, and the block's outputs and gradients on packed rows."""
  x = np.random.default_rng(1).standard_normal((len(IDS), 12, CONFIG.D)).astype(np.float32)
  cotangent = np.random.default_rng(2).standard_normal(x.shape) * (IDS >= 0)[..., None]
  mixer = mamba.Mixer(CONFIG)
  params = random_params(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"])

  @jax.jit
  def run(params, x):
    def loss(params, x):
      y, state = mixer.apply({"params": params}, x, None, jnp.asarray(IDS))
      return jnp.sum(y * cotangent), (y, state)

    (_, (y, state)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, state, gradients

  return mixer, params, x, cotangent, run(params, x)


def _truth(params, x):
  return oracle.by_document(lambda u: oracle.mamba(params, u), x, IDS)


def test_equals_the_papers_equations(block):
  _, params, x, _, (y, _, _) = block
  truth = _truth(oracle.to_float64(params), x.astype(np.float64))
  np.testing.assert_allclose(y, truth, atol=2e-5 * np.abs(truth).max(), rtol=1e-4)


def test_gradients_of_parameters_and_input(block):
  _, params, x, cotangent, (_, _, gradients) = block
  everything = {**params, "x": x}
  loss = lambda p: np.sum(_truth(p, p["x"]) * cotangent)
  oracle.check_gradient(loss, everything, {**gradients[0], "x": gradients[1]})


def test_whole_rows_without_ids_and_the_state_between_two_calls(block):
  mixer, params, x, _, (y, state, _) = block
  apply = jax.jit(lambda x, state: mixer.apply({"params": params}, x, state))
  first, middle = apply(x[:1, :5], mamba.init_state(CONFIG, 1))
  second, last = apply(x[:1, 5:], middle)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), y[:1], rtol=1e-5, atol=2e-5)
  for name in ("conv", "scan"):
    np.testing.assert_allclose(last[name], state[name][:1], rtol=1e-5, atol=2e-5)
  assert np.abs(middle["scan"]).max() > 0.1
  without = apply(x[:1, 5:], mamba.init_state(CONFIG, 1))[0]
  assert np.abs(without - second).max() > 1e-2


def test_bfloat16_follows_float32_and_keeps_the_scan_in_float32(block):
  _, params, x, _, (y, _, _) = block
  config = mamba.Config(D=6, L=2, N=3, W=4, dt_rank=2, dtype="bfloat16")
  low, state = jax.jit(mamba.Mixer(config).apply)({"params": params}, x, None, jnp.asarray(IDS))
  assert low.dtype == jnp.bfloat16
  assert state["conv"].dtype == jnp.bfloat16 and state["scan"].dtype == jnp.float32
  real = IDS >= 0
  error = np.abs(np.asarray(low, np.float32) - y)[real]
  assert 0 < error.max() < 0.1 * np.abs(y).max()
  expected = jax.tree.map(jnp.shape, mamba.init_state(config, len(IDS)))
  assert jax.tree.map(jnp.shape, state) == expected


@pytest.fixture(scope="module")
def initial():
  """A larger block's initial parameters."""
  config = mamba.Config(D=96, L=9, N=5)
  init = jax.jit(lambda key: mamba.Mixer(config).init(key, jnp.zeros((1, 2, 96)))["params"])
  return config, jax.device_get(init(jax.random.key(3)))


def test_initial_transition_and_skip(initial):
  config, params = initial
  assert config.rank == 6 and config.inner == 192
  expected = np.log(np.tile(np.arange(1.0, 6.0), (192, 1)))
  np.testing.assert_allclose(params["A_log"], expected, rtol=1e-6)
  np.testing.assert_array_equal(params["skip"], 1)


def test_initial_time_steps_are_log_uniform(initial):
  _, params = initial
  dt = oracle.softplus(params["dt_bias"].astype(np.float64))
  assert dt.min() > 1e-3 * 0.999 and dt.max() < 0.1 * 1.001
  fraction = (np.log(dt) - np.log(1e-3)) / np.log(100)
  assert stats.kstest(fraction, "uniform").pvalue > 1e-3


def test_initial_time_steps_respect_their_floor():
  config = mamba.Config(D=64, dt_min=1e-6, dt_floor=1e-4)
  init = jax.jit(lambda key: mamba.Mixer(config).init(key, jnp.zeros((1, 1, 64)))["params"])
  dt = oracle.softplus(np.asarray(init(jax.random.key(0))["dt_bias"], np.float64))
  # Two of the five decades lie below the floor.
  np.testing.assert_allclose(dt.min(), 1e-4, rtol=1e-3)
  assert 0.25 < np.mean(dt < 1.001e-4) < 0.55


@pytest.mark.parametrize(
  "name, bound",
  [
    ("in_proj", 96**-0.5),
    ("x_proj", 192**-0.5),
    ("dt_proj", 6**-0.5),
    ("out_proj", 192**-0.5 * 9**-0.5),
    ("conv_weight", 4**-0.5),
    ("conv_bias", 4**-0.5),
  ],
)
def test_initial_weights_are_uniform_within(initial, name, bound):
  leaf = initial[1][name]
  values = (leaf["kernel"] if isinstance(leaf, dict) else leaf).ravel()
  assert np.abs(values).max() <= bound * (1 + 1e-6)
  assert stats.kstest(values, "uniform", (-bound, 2 * bound)).pvalue > 1e-3
