"""The models with a matrix state: their options against the papers' equations, how they start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import defaults
from experiments.rules import map_rules
from lm_models import deltanet, gated_deltanet, gla, layers, mamba2, plstm, retnet
from tests.lm_models import oracle, oracle_matrix
from tests.lm_models.models import SEGMENT_IDS, random_params
from tests.quick_compilation import quick_compilation as quick_compilation

STEP = {"implementation": "recurrent"}
PLSTM = {"H": 2, "J": 2, "gate_activation": "identity"}
KDA = {"decay": "vector", "H": 2, "K": 3, "expand_v": 1.0}
# The first of each model runs what the op chooses by itself, in chunks that end inside rows.
CASES = [
  (gla, {"H": 2, "chunk_size": 5}),
  (gla, {"H": 4, "kv_heads": 2, "W": 3, "feature_map": "relu", **STEP}),
  (gla, {"H": 1, "output_gate": False, "gate_min": -0.04, "gate_rank": 3, **STEP}),
  (deltanet, {"H": 2, "use_gate": True, "allow_neg_eigval": True, "chunk_size": 5}),
  (deltanet, {"H": 2, "qk_activation": "elu", "qk_norm": "sum", "W": 0, **STEP}),
  (deltanet, {"H": 1, "qk_activation": "relu", "expand_v": 0.5, "W": 1, **STEP}),
  (deltanet, {"H": 4, "qk_activation": "identity", "W": 2, **STEP}),
  (gated_deltanet, {"H": 1, "value_heads": 3, "K": 4, "expand_v": 0.5, "chunk_size": 5}),
  (gated_deltanet, {"H": 2, "K": 3, "expand_v": 1.0, "allow_neg_eigval": True, "W": 0, **STEP}),
  (gated_deltanet, {**KDA, "chunk_size": 5}),
  (gated_deltanet, {**KDA, "value_heads": 4, "rank": 2, "allow_neg_eigval": True, **STEP}),
  (mamba2, {"P": 8, "N": 3, "chunk_size": 5}),
  (mamba2, {"P": 4, "N": 2, "n_groups": 2, "W": 2, **STEP}),
  (mamba2, {"P": 4, "N": 2, "dt_limit_min": 0.2, "dt_limit_max": 0.9, **STEP}),
  (retnet, {"H": 2, "rotary_base": 7.0, "chunk_size": 5}),
  (plstm, {"H": 2, "W": 3, "chunk_size": 5}),
  (plstm, {"H": 1, "J": 4, "K": 3, "W": 0, "gate_activation": "tanh", "chunk_size": 5}),
  (plstm, {**PLSTM, "transition_activation": "sigmoid", "passthrough": False, **STEP}),
]


def make(module, fields, dtype="float32"):
  """A mixer of width 8, and parameters far from their initial values."""
  mixer = module.Mixer(module.Config(**{"D": 8, "L": 2, **fields, "dtype": dtype}))
  x = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
  return mixer, random_params(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"])


def random_input(seed=1):
  """Float32 [5 12 8]."""
  return np.random.default_rng(seed).standard_normal((*SEGMENT_IDS.shape, 8)).astype(np.float32)


@pytest.mark.parametrize("module, fields", CASES)
def test_every_option_equals_the_papers_equations(module, fields):
  mixer, params = make(module, fields)
  x = random_input()
  y, state = jax.jit(mixer.apply)({"params": params}, x, None, jnp.asarray(SEGMENT_IDS))
  name = module.__name__.split(".")[-1]
  document = lambda u: getattr(oracle_matrix, name)(oracle.to_float64(params), u, mixer.config)
  truth = oracle.by_document(document, x.astype(np.float64), SEGMENT_IDS)
  np.testing.assert_allclose(y, truth, atol=5e-5 * np.abs(truth).max())
  described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert described(state) == described(module.init_state(mixer.config, len(x)))


@pytest.mark.parametrize(
  "module, fields",
  [
    (gla, {"H": 2, "W": 3}),
    (deltanet, {"H": 2}),
    (gated_deltanet, {"H": 2, "K": 3, "expand_v": 1.0}),
    (gated_deltanet, KDA),
    (mamba2, {"P": 4, "N": 3}),
    (retnet, {"H": 2}),
    (plstm, PLSTM),
  ],
)
def test_bfloat16_follows_float32_and_keeps_memory_and_gates_in_float32(module, fields):
  exact, params = make(module, {**fields, **STEP})
  low, _ = make(module, {**fields, **STEP}, "bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
  x, ids = random_input(), jnp.asarray(SEGMENT_IDS)
  expected, _ = jax.jit(exact.apply)({"params": params}, x, None, ids)
  y, state = jax.jit(low.apply)({"params": params}, x, None, ids)
  assert y.dtype == jnp.bfloat16 and state["memory"].dtype == jnp.float32
  assert all(leaf.dtype == jnp.bfloat16 for key, leaf in state.items() if key.endswith("conv"))
  error = np.abs(np.asarray(y, np.float32) - expected)[SEGMENT_IDS >= 0]
  assert 0 < error.mean() < 0.03 * np.std(expected)
  # What decides how long a memory lasts is not pulled towards zero.
  factors = map_rules(defaults.get_config().optim.weight_decay_rules, params, "rules")
  for path, factor in jax.tree_util.tree_leaves_with_path(factors):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert factor == float(name.endswith("kernel")), name


def initial(module, **fields):
  """A block's initial parameters and config."""
  config = module.Config(**fields)
  x = jnp.zeros((1, 1, config.D))
  params = jax.jit(module.Mixer(config).init)(jax.random.key(3), x)["params"]
  return config, jax.device_get(params)


@pytest.mark.parametrize("decay, low", [("scalar", 0.0), ("vector", 1.0)])
def test_gated_deltanet_starts_as_published(decay, low):
  _, p = initial(gated_deltanet, D=16, H=200, K=4, expand_v=1.0, decay=decay)
  A = np.exp(p["A_log"].astype(np.float64))
  assert A.shape == (200,) and A.min() > 0.999 * max(low, 1e-4)
  assert stats.kstest(A, "uniform", (low, 16 - low)).pvalue > 1e-3
  dt = np.log(oracle.softplus(p["dt_bias"].astype(np.float64))).ravel()
  assert len(dt) == {"scalar": 200, "vector": 800}[decay]
  assert stats.kstest(dt, "uniform", (np.log(1e-3), np.log(100))).pvalue > 1e-3
  assert abs(p["out_proj"]["kernel"].std() / 0.02 - 1) < 0.05
  assert abs(p["query_conv"]["conv_weight"].std() / 0.02 - 1) < 0.05


def test_A_log_is_finite_where_A_would_be_zero():
  init = gated_deltanet.recurrent_layers.A_log_init(0.0, 0.0)
  np.testing.assert_allclose(init(jax.random.key(0), (3,)), np.log(1e-4), rtol=1e-6)


def test_mamba2_starts_as_published():
  config, p = initial(mamba2, D=128, L=9, P=1, N=4)
  assert config.H == 256
  A = np.exp(p["A_log"].astype(np.float64))
  assert stats.kstest(A, "uniform", (1, 15)).pvalue > 1e-3
  dt = np.log(oracle.softplus(p["dt_bias"].astype(np.float64)))
  assert stats.kstest(dt, "uniform", (np.log(1e-3), np.log(100))).pvalue > 1e-3
  np.testing.assert_array_equal(p["skip"], 1)
  for values, bound in (
    (p["in_proj"]["kernel"], 128**-0.5),
    (p["bc_proj"]["kernel"], 128**-0.5),
    (p["x_conv"]["conv_weight"], 0.5),
    (p["x_conv"]["conv_bias"], 0.5),
    (p["out_proj"]["kernel"], 256**-0.5 / 3),
  ):
    assert stats.kstest(values.ravel(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3


def test_gla_starts_with_a_decay_near_one_in_twenty_three_tokens():
  _, p = initial(gla, D=64)
  np.testing.assert_array_equal(p["decay_up_proj"]["bias"], 0)
  assert abs(p["decay_down_proj"]["kernel"].std() / 0.02 - 1) < 0.1


def test_plstm_starts_with_open_gates_and_orthogonal_turns():
  config, p = initial(plstm, D=64, H=4, J=4, transition_spread=0.3)
  np.testing.assert_allclose(p["source_gate"]["bias"], -1)
  np.testing.assert_allclose(p["transition_gate"]["bias"].mean(1), [0.1, 0.3, 0.5, 0.7], rtol=1e-6)
  assert abs(p["source_gate"]["kernel"].std() / config.gate_std - 1) < 0.05
  assert 0.8 < p["rotation_gate"]["bias"].std() < 1.2
  turns = plstm.orthogonal(3 * jax.random.normal(jax.random.key(0), (50, 4, 4)))
  product = turns @ jnp.swapaxes(turns, 1, 2)
  np.testing.assert_allclose(product, np.broadcast_to(np.eye(4), (50, 4, 4)), atol=2e-5)


@pytest.mark.parametrize("start", [1_000_000, 2**31 - 7, -40])
def test_rotary_is_as_exact_after_a_million_tokens_as_at_the_first(start):
  """Also where the counter of a long stream wraps around."""
  x = jnp.asarray(random_input()[:, :, None])
  near = jnp.broadcast_to(jnp.arange(12), SEGMENT_IDS.shape)
  far = near + jnp.int32(start)
  products = lambda positions: np.einsum(
    "bthk,bshk->bts", *[np.float64(layers.rotary(x, positions))] * 2
  )
  np.testing.assert_allclose(products(far), products(near), atol=2e-5)
  if start <= 1_000_000:
    turned = np.asarray(layers.rotary(x, far))
    expected = oracle.rotate(np.float64(x[0, 3, 0]), start + 3, 10000.0)
    # Frequencies are rounded to 2^-32 of a turn.
    np.testing.assert_allclose(turned[0, 3, 0], expected, atol=1e-5 + 4e-9 * abs(start))


def test_retnet_goes_on_from_any_position():
  """A stream's second half is the same however many tokens came before the first."""
  mixer, params = make(retnet, {"H": 2, **STEP})
  apply = jax.jit(functools.partial(mixer.apply, {"params": params}))
  x = random_input()
  state = retnet.init_state(mixer.config, len(x))
  _, near = apply(x, state)
  _, far = apply(x, {**state, "position": state["position"] + jnp.int32(2**31 - 9)})
  assert near["position"][0] == 12 and far["position"][0] < 0
  np.testing.assert_allclose(apply(x, far)[0], apply(x, near)[0], atol=1e-5)
  _, after = apply(x, near, jnp.full(SEGMENT_IDS.shape, -1))
  jax.tree.map(np.testing.assert_array_equal, after, near)


@pytest.mark.parametrize(
  "module, fields, message",
  [
    (gla, {"H": 3}, "expand_k is 0.5, must make H = 3 heads of whole channels of D = 8"),
    (gla, {"H": 4, "kv_heads": 3}, "kv_heads is 3, must divide H = 4"),
    (gla, {"feature_map": "exp"}, "feature_map is 'exp', must be one of"),
    (gla, {"gate_normaliser": 0.0}, "gate_normaliser is 0.0, must be above 0"),
    (deltanet, {"H": 2, "qk_norm": "sum"}, "qk_norm is 'sum', must be 'l2' with qk_activation"),
    (deltanet, {"H": 2, "qk_activation": "tanh"}, "qk_activation is 'tanh', must be one of"),
    (gated_deltanet, {"H": 4, "value_heads": 6}, "value_heads is 6, must be a multiple of H = 4"),
    (gated_deltanet, {"K": 3, "expand_v": 0.5}, "expand_v is 0.5, must make whole channels"),
    (gated_deltanet, {"decay": "matrix"}, "decay is 'matrix', must be one of"),
    (gated_deltanet, {"dt_min": 0.0}, "dt_min is 0.0, must be above 0 and at most dt_max"),
    (mamba2, {"P": 3}, "P is 3, must divide expand D = 16"),
    (mamba2, {"P": 4, "n_groups": 3}, "n_groups is 3, must divide the 4 heads"),
    (mamba2, {"P": 4, "A_min": 0.0}, "A_min is 0.0, must be above 0 and at most A_max"),
    (plstm, {"H": 3}, "H is 3, H J = 3 must divide D = 8"),
    (plstm, {"H": 2, "J": 8}, "H is 2, H J = 16 must divide D = 8"),
    (plstm, {"gate_activation": "relu"}, "gate_activation is 'relu', must be one of"),
    (plstm, {"transition_activation": "exp"}, "transition_activation is 'exp', must be one of"),
    (retnet, {"H": 8}, "expand_k is 1.0, must make heads of even width, not 1"),
    (retnet, {"H": 2, "chunk_size": 0}, "chunk_size is 0, must be at least 1"),
    (retnet, {"H": 2, "implementation": "fast"}, "implementation is 'fast', must be one of"),
  ],
)
def test_wrong_fields(module, fields, message):
  with pytest.raises(ValueError, match=message):
    module.Config(**{"D": 8, **fields})
