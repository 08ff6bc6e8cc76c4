"""Nonlinear recurrent networks: the papers' equations, whether solved in parallel or in order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from configs import defaults, pararnn_lm
from experiments import models as experiment_models
from experiments.rules import map_rules
from lm_models import lm, pararnn, rnn_cells
from tests.lm_models import oracle, oracle_rnn
from tests.lm_models.models import SEGMENT_IDS, random_params
from tests.quick_compilation import quick_compilation as quick_compilation

SERIAL = [name for name, kind in rnn_cells.KINDS.items() if kind.serial]
CASES = [
  {"mode": "newton"},
  {"mode": "sequential", "H": 4, "W": 0, "norm_before_gate": False},
  {"mode": "newton", "bare": True, "H": 1, "iterations": 8, "recurrent_clip": None},
  {"cell": "paralstm", "mode": "newton", "H": 4, "window": 5},
  {"cell": "paralstm", "recurrent_clip": None, "W": 1},
  *({"cell": name} for name in SERIAL),
  {"cell": "elman", "mode": "newton", "H": 4, "iterations": 12, "bare": True},
  {"cell": "gru", "mode": "newton", "iterations": 12},
]
IDS = jnp.asarray(SEGMENT_IDS)
REAL = SEGMENT_IDS >= 0


def make(fields, dtype="float32"):
  """A mixer of width 8, and parameters far from their initial values."""
  mixer = pararnn.Mixer(pararnn.Config(**{"D": 8, "L": 2, "H": 2, **fields, "dtype": dtype}))
  sequential = dataclasses.replace(mixer.config, mode="sequential")
  x = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
  shapes = jax.eval_shape(pararnn.Mixer(sequential).init, jax.random.key(0), x)["params"]
  return mixer, random_params(shapes)


def random_input(seed=1):
  """Float32 [5 12 8]."""
  shape = (*SEGMENT_IDS.shape, 8)
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.slow
def test_every_option_equals_the_papers_equations():
  x, cases = random_input(), [make(fields) for fields in CASES]

  @jax.jit
  def run(params, x):
    apply = lambda mixer, p: mixer.apply({"params": p}, x, None, IDS)
    return [apply(mixer, p) for (mixer, _), p in zip(cases, params)]

  results = run([params for _, params in cases], x)
  for fields, (mixer, params), (y, state) in zip(CASES, cases, results):
    document = functools.partial(oracle_rnn.pararnn, oracle.to_float64(params), c=mixer.config)
    truth = oracle.by_document(document, np.float64(x), SEGMENT_IDS)
    error = np.abs(y - truth).max() / np.abs(truth).max()
    assert error < 5e-5, f"{fields}: {error:.1e}"
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(state) == described(pararnn.init_state(mixer.config, len(x)))


@pytest.mark.parametrize("cell", ["paragru", "paralstm"])
def test_the_jacobians_are_those_of_the_cells(cell):
  kind, generator = rnn_cells.KINDS[cell], np.random.default_rng(0)
  draw = lambda *shape: 2 * generator.standard_normal(shape)
  params, u = {"a": draw(3, 8), "w": draw(2, 8)}, draw(5, 7, 3, 8)
  state, tangent = draw(2, 5, 7, 2, 8)[:, ..., : kind.numbers, :]
  if kind.numbers == 1:
    state, tangent = state[..., 0, :], tangent[..., 0, :]
  with jax.enable_x64(True):
    params, state, u, tangent = jax.tree.map(jnp.asarray, (params, state, u, tangent))
    J = kind.cell.jacobian(params, state, u)
    _, expected = jax.jvp(lambda h: kind.cell.step(params, h, u), (state,), (tangent,))
  product = J * tangent if kind.numbers == 1 else np.einsum("...mnd,...nd->...md", J, tangent)
  assert J.dtype == np.float64 and np.abs(expected).max() > 0.5
  np.testing.assert_allclose(product, expected, rtol=0, atol=1e-12)


def test_the_first_token_of_an_slstm_counts_however_small_its_gate():
  """Nothing came before it: its share is all there is, not 0 divided by 0."""
  u = jnp.asarray([[[-200.0], [3.0], [0.7], [0.4]]])  # i, f, n, o of one channel
  step = lambda u: rnn_cells.slstm({"R": jnp.zeros((4, 1, 1, 1))}, jnp.zeros((1, 4)), u)
  h, gradient = jax.value_and_grad(lambda u: step(u)[0, 0])(u)
  np.testing.assert_allclose(h, np.tanh(0.7) / (1 + np.exp(-0.4)), rtol=1e-6)
  assert np.isfinite(gradient).all()


def test_both_modes_have_the_same_values_and_gradients():
  """In float64, documents, padding and a state before the first token included."""
  with jax.enable_x64(True):
    x, cotangent = np.random.default_rng(3).standard_normal((2, *SEGMENT_IDS.shape, 8))
    cotangent = cotangent * REAL[..., None]
    cases = [
      {"iterations": 12, "recurrent_clip": None},
      {"cell": "paralstm", "iterations": 12, "window": 5},
      {"cell": "lstm", "iterations": 12, "W": 0},
    ]
    made = [make({**fields, "mode": "newton"}, "float64") for fields in cases]

    def run(mixer, mode, *arguments):
      mixer = pararnn.Mixer(dataclasses.replace(mixer.config, mode=mode))

      def loss(params, x, memory):
        state = {**pararnn.init_state(mixer.config, len(x)), "memory": memory}
        y, state = mixer.apply({"params": params}, x, state, IDS)
        return jnp.sum(y * cotangent) + jnp.sum(jnp.sin(state["memory"])), y

      return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)

    @jax.jit
    def both(params, memories):
      modes = ("newton", "sequential")
      return [
        [run(mixer, mode, p, x, memory) for mode in modes]
        for (mixer, _), p, memory in zip(made, params, memories)
      ]

    memories = [
      0.9 * np.random.default_rng(4).uniform(-1, 1, (5, *mixer.config.state_shape))
      for mixer, _ in made
    ]
    params = [oracle.to_float64(params) for _, params in made]
    for fields, (newton, sequential) in zip(cases, both(params, memories)):
      for got, truth in zip(jax.tree.leaves(newton), jax.tree.leaves(sequential)):
        assert got.dtype == np.float64
        message = str(fields)
        np.testing.assert_allclose(got, truth, rtol=0, atol=1e-10, err_msg=message)
      assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(newton[1]))


def test_a_prompt_and_then_one_token_after_the_other_are_the_whole():
  cases = [make({"cell": cell, "W": 3}) for cell in rnn_cells.KINDS]

  def both(mixer, params, x):
    apply = functools.partial(mixer.apply, {"params": params})
    first, state = apply(x[:, :7], pararnn.init_state(mixer.config, len(x)))

    def step(state, token):
      y, state = apply(token[:, None], state)
      return state, y[:, 0]

    state, rest = jax.lax.scan(step, state, jnp.moveaxis(x[:, 7:], 1, 0))
    return apply(x), (jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], 1), state)

  @jax.jit
  def run(params, x):
    return [both(mixer, p, x) for (mixer, _), p in zip(cases, params)]

  for whole, parts in run([params for _, params in cases], random_input()):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), parts, whole)


def test_bfloat16_follows_float32_and_keeps_the_cell_in_float32():
  def both(fields, x):
    exact, params = make(fields)
    low, _ = make(fields, "bfloat16")
    apply = lambda mixer: mixer.apply({"params": params}, x, None, IDS)
    return apply(exact)[0], *apply(low)

  @jax.jit
  def run(x):
    return [both({"mode": "newton", "cell": cell}, x) for cell in ("paragru", "paralstm")]

  for expected, y, state in run(random_input()):
    assert y.dtype == state["x_conv"].dtype == jnp.bfloat16
    assert state["memory"].dtype == jnp.float32
    error = np.abs(np.asarray(y, np.float32) - expected)[REAL]
    assert 0 < error.mean() < 0.03 * np.std(expected)


@pytest.mark.parametrize("cell", list(rnn_cells.KINDS))
def test_initial_values(cell):
  config = pararnn.Config(D=128, L=4, H=2, cell=cell, memory_bias_min=-1.0, memory_bias_max=9.0)
  x = jnp.zeros((1, 1, 128))
  params = jax.jit(pararnn.Mixer(config).init)(jax.random.key(3), x)["params"]
  p = jax.device_get(params)
  kernel = p["input_proj"]["kernel"]
  assert kernel.shape == (2, 64, config.kind.gates, 64)
  bound = (6 / 64) ** 0.5
  assert stats.kstest(kernel.ravel(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
  bound = 128**-0.5
  assert stats.kstest(p["out_proj"]["kernel"].ravel(), "uniform", (-bound / 2, bound)).pvalue > 1e-3
  if config.kind.serial:
    blocks = p["recurrent_matrix"].reshape(-1, 64, 64)
    np.testing.assert_allclose(blocks[-1] @ blocks[-1].T, np.eye(64), atol=1e-5)
    assert len({block.tobytes() for block in blocks}) == 2 * config.kind.gates
  else:
    for name in {"recurrent_weight", "peephole_weight"} & set(p):
      assert stats.kstest(p[name].ravel() * 128**0.5, "norm").pvalue > 1e-3
  # A channel keeps its state the longer the larger its bias is, whatever the cell calls it.
  bare = dataclasses.replace(config, bare=True, mode="sequential")
  number = {"lstm": 1, "slstm": 1}.get(cell, 0)
  before = np.zeros((2, config.kind.numbers, 128), np.float32)
  before[:, number] = [[0.4], [0.5]]
  if cell == "slstm":
    before[:, 2] = 1  # its normaliser
  memory = jnp.asarray(before.reshape(2, *config.state_shape))
  _, state = pararnn.Mixer(bare).apply(
    {"params": params}, jnp.tile(x, (2, 1, 1)), {"memory": memory}
  )
  low, high = state["memory"].reshape(before.shape)[:, number]
  kept = (high - low) / 0.1
  if cell == "elman":
    np.testing.assert_array_equal(p["gate_bias"], 0)
  else:
    assert abs(kept[-1] - 1) < 0.01 and kept[0] < 0.9


def test_the_residual_is_a_metric_where_there_is_one():
  newton, params = make({"mode": "newton", "iterations": 2, "recurrent_clip": None})
  sown = {}
  for name, fields in {
    "two": {},
    "eight": {"iterations": 8},
    "none": {"mode": "sequential"},
  }.items():
    mixer = pararnn.Mixer(dataclasses.replace(newton.config, **fields))
    _, sown[name] = mixer.apply({"params": params}, random_input(), mutable=["metrics"])
  residual = lambda name: float(sown[name]["metrics"]["newton_residual"])
  assert residual("two") > 1e-4 and residual("eight") < 1e-6
  assert "metrics" not in sown["none"]


def test_the_clip_bounds_what_the_cell_uses_and_nothing_else():
  free, params = make({"recurrent_clip": None, "mode": "sequential"})
  x = random_input()
  clipped = pararnn.Mixer(dataclasses.replace(free.config, recurrent_clip=0.3))
  bounded = {**params, "recurrent_weight": jnp.clip(params["recurrent_weight"], -0.3, 0.3)}
  y = clipped.apply({"params": params}, x)[0]
  np.testing.assert_array_equal(y, free.apply({"params": bounded}, x)[0])
  assert np.abs(y - free.apply({"params": params}, x)[0]).max() > 1e-3


def test_a_language_model_learns_alike_in_both_modes():
  """The losses of thirty steps; two hundred were compared once, and differed by less."""
  options = {"D": 32, "L": 2, "vocab_size": 24, "pattern": ("paragru",)}
  base = lm.make_config(**options, paragru={"H": 2, "mlp_width": 32, "mode": "newton"})
  tokens = np.random.default_rng(0).integers(0, 24, (30, 4, 49))
  tokens[:, :, 1::2] = tokens[:, :, :-1:2]  # every other token repeats the one before
  optimizer = optax.adamw(3e-3)

  @functools.partial(jax.jit, static_argnums=0)
  def losses(config, params):
    def step(carry, rows):
      params, moments = carry
      loss = lambda p: jnp.mean(lm.token_nats(config, p, rows[:, :-1], rows[:, 1:])[0])
      value, gradient = jax.value_and_grad(loss)(params)
      updates, moments = optimizer.update(gradient, moments, params)
      return (optax.apply_updates(params, updates), moments), value

    return jax.lax.scan(step, (params, optimizer.init(params)), tokens)[1]

  params = jax.jit(functools.partial(lm.init, base))(jax.random.key(0))
  serial = dataclasses.replace(base.mixers[0], mode="sequential")
  parallel = losses(base, params)
  sequential = losses(dataclasses.replace(base, mixers=(serial,)), params)
  assert sequential[-1] < sequential[0] - 0.2
  np.testing.assert_allclose(parallel, sequential, rtol=0, atol=1e-3)


def test_what_keeps_a_memory_is_not_pulled_towards_zero():
  rules = defaults.get_config().optim.weight_decay_rules
  for cell in rnn_cells.KINDS:
    _, params = make({"cell": cell})
    for path, factor in jax.tree_util.tree_leaves_with_path(map_rules(rules, params, "rules")):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      assert factor == float(name.endswith(("kernel", "recurrent_matrix"))), name


@pytest.mark.parametrize(
  "size, published, gru, lstm",
  [
    ("406m", 406e6, 405_619_712, 405_668_864),
    ("1b42", 1.42e9, 1_415_219_200, 1_415_317_504),
    ("2b90", 2.90e9, 2_901_772_800, 2_901_936_640),
    ("6b76", 6.76e9, 6_756_765_696, 6_757_027_840),
  ],
)
def test_the_published_models_have_the_published_sizes(size, published, gru, lstm):
  for arg, count in ((size, gru), (f"lstm_{size}", lstm)):
    config = pararnn_lm.get_config(arg)
    config.model[config.model.pattern[0]].mode = "sequential"
    assert lm.parameter_count(experiment_models.language_model(config)) == count
    assert count == pytest.approx(published, rel=0.02)
    assert f"{count:,}" in pararnn_lm.__doc__


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"H": 3}, "H is 3, must divide D = 8"),
    ({"cell": "rnn"}, "cell is 'rnn', must be one of"),
    ({"mode": "parallel"}, "mode is 'parallel', must be one of"),
    ({"policy": "stop"}, "policy is 'stop', must be one of"),
    ({"input_init": "zero"}, "input_init is 'zero', must be one of"),
    ({"recurrent_clip": 0.0}, "recurrent_clip is 0.0, must be above 0"),
    ({"recurrent_std": -1.0}, "recurrent_std is -1.0, must be above 0"),
    ({"iterations": 0}, "iterations is 0, must be at least 1"),
    ({"W": -1}, "W is -1, must be at least 0"),
    (
      {"cell": "slstm", "mode": "newton"},
      "mode is 'newton', must be 'sequential' or None: slstm is only run in order",
    ),
    (
      {"cell": "lstm", "mode": "newton", "D": 64},
      "mode is 'newton', must be 'sequential' or None: lstm has a full Jacobian of 128 x 128",
    ),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    pararnn.Config(**{"D": 8, **fields})
