"""Schedules at their marked steps; AdamW and Muon against their definitions; the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import defaults
from experiments.errors import UserError
from experiments.optimizers import make_optimizer, make_schedule
from tests.quick_compilation import quick_compilation as quick_compilation


def make_rates(**fields):
  """The learning rates of a run of 100 steps and a peak of 2."""
  config = defaults.get_config().schedule
  config.update({"warmup_steps": 10, "decay_fraction": 0.2, "final_fraction": 0.1, **fields})
  schedule = make_schedule(config, 100, 2.0)
  return np.array([schedule(jnp.int32(step)) for step in range(101)])


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_the_warm_up_rises_linearly_from_its_first_share_to_the_peak(name):
  rates = make_rates(name=name)
  np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
  np.testing.assert_allclose(rates[10], 2.0, rtol=1e-6)


def test_cosine():
  steps = np.arange(90 + 1)
  expected = 2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi * steps / 90)) / 2)
  rates = make_rates(name="cosine")
  np.testing.assert_allclose(rates[10:], expected, rtol=1e-5)
  np.testing.assert_allclose(rates[100], 0.2, rtol=1e-5)


def test_wsd_stays_and_then_falls():
  rates = make_rates(name="wsd")
  np.testing.assert_allclose(rates[9:81], 2.0, rtol=1e-6)
  fraction = np.arange(21) / 20
  np.testing.assert_allclose(rates[80:], 2 * (1 - 0.9 * np.sqrt(fraction)), rtol=1e-5)


def test_wsd_whose_decay_fills_the_run_falls_from_the_peak():
  rates = make_rates(name="wsd", decay_fraction=1.0)
  np.testing.assert_allclose(rates[[9, 10, 100]], [2.0, 2.0, 0.2], rtol=1e-5)
  assert (np.diff(rates[10:]) < 0).all()


@pytest.mark.parametrize("warmup, first", [(0, 2.0), (1, 2.0), (2, 1.0), (100, 0.02)])
def test_short_and_long_warm_ups(warmup, first):
  rates = make_rates(name="constant", warmup_steps=warmup)
  np.testing.assert_allclose([rates[0], rates[100]], [first, 2.0], rtol=1e-6)
  assert np.isfinite(rates).all() and rates.max() <= 2.0 + 1e-6


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"name": "step"}, r"schedule.name is 'step', must be one of \['constant', 'cosine', 'wsd'\]"),
    (
      {"warmup_steps": 101},
      "schedule.warmup_steps is 101, must be between 0 and train.steps = 100",
    ),
    ({"warmup_steps": -1}, "schedule.warmup_steps is -1, must be between"),
  ],
)
def test_wrong_schedules(fields, message):
  with pytest.raises(UserError, match=message):
    make_rates(**fields)


def random_params(seed=0):
  """One parameter of each sort, with two repeats of the blocks."""
  generator = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
  attention = {
    "query_proj": {"kernel": draw(2, 8, 4, 3)},
    "out_proj": {"kernel": draw(2, 4, 3, 8)},
  }
  mamba = {
    "in_proj": {"kernel": draw(2, 8, 2, 10)},
    "dt_bias": draw(2, 10),
    "A_log": draw(2, 10, 3),
    "skip": draw(2, 10),
    "conv_weight": draw(2, 4, 10),
  }
  return {
    "embedding": draw(13, 8),
    "norm": {"scale": draw(8)},
    "blocks": {
      "0_mamba": {"mixer": mamba, "norm": {"scale": draw(2, 8)}},
      "1_attention": {"mixer": attention, "mlp": {"out_proj": {"kernel": draw(2, 12, 8)}}},
    },
  }


def make(rate=0.1, **fields):
  """An optimizer at a constant learning rate; by default it neither clips nor decays."""
  config = defaults.get_config().optim
  config.update({"weight_decay": 0.0, "clip_norm": 0.0, **fields})
  return make_optimizer(config, optax.constant_schedule(rate))


def update(optimizer, gradients, params, steps=1):
  """The updates of the last of so many steps with the same gradients."""
  state = optimizer.init(params)
  for _ in range(steps):
    updates, state = optimizer.update(gradients, state, params)
  return updates


def named(tree):
  """{path: leaf}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_adamw_is_its_definition():
  params = random_params()
  optimizer = make(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.5)
  decayed = ("kernel", "embedding")
  state, p = optimizer.init(params), params
  m = {name: 0.0 for name in named(params)}
  v = dict(m)
  for t in (1, 2, 3):
    gradients = random_params(t)
    updates, state = optimizer.update(gradients, state, p)
    old = named(p)
    p = optax.apply_updates(p, updates)
    for name, g in named(gradients).items():
      m[name] = 0.8 * m[name] + 0.2 * g
      v[name] = 0.9 * v[name] + 0.1 * g**2
      step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3)
      step = step + 0.5 * old[name] * name.endswith(decayed)
      np.testing.assert_allclose(named(p)[name], old[name] - 0.1 * step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_what_its_rules_name_and_nothing_else(name):
  params = random_params()
  nothing = jax.tree.map(jnp.zeros_like, params)
  updates = named(update(make(name=name, weight_decay=0.5), nothing, params))
  for path, leaf in named(params).items():
    decays = path.endswith("kernel") or path == "embedding"
    np.testing.assert_allclose(updates[path], -0.1 * 0.5 * decays * leaf, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rate_rules_multiply_and_freeze(name):
  params, gradients = random_params(), random_params(1)
  rules = ((r"embedding", 0.0), (r"out_proj", 0.5), (r".*", 1.0))
  changed = named(
    update(make(name=name, weight_decay=0.5, learning_rate_rules=rules), gradients, params)
  )
  plain = named(update(make(name=name, weight_decay=0.5), gradients, params))
  for path, leaf in plain.items():
    assert np.abs(leaf).max() > 0
    factor = 0.0 if path == "embedding" else 0.5 if "out_proj" in path else 1.0
    np.testing.assert_allclose(changed[path], factor * leaf, rtol=1e-6)


@pytest.mark.parametrize(
  "name, field",
  [("adamw", "weight_decay_rules"), ("adamw", "learning_rate_rules"), ("muon", "muon_rules")],
)
def test_a_parameter_that_no_rule_covers_is_named_at_once(name, field):
  optimizer = make(name=name, **{field: ((r"blocks|scale", True),)})
  with pytest.raises(UserError, match=f"optim.{field} has no rule for embedding"):
    optimizer.init(random_params())


def test_an_unknown_optimizer():
  with pytest.raises(UserError, match=r"optim.name is 'sgd', must be one of \['adamw', 'muon'\]"):
    make(name="sgd")


@pytest.mark.parametrize("largest", [1.0, 1e6])
def test_clipping_is_by_the_global_norm(largest):
  params = random_params()
  gradients = jax.tree.map(lambda x: 3 * x, random_params(1))
  norm = np.sqrt(sum(np.sum(leaf.astype(float) ** 2) for leaf in named(gradients).values()))
  # With b1 = b2 = 0 and a large epsilon Adam is the gradient itself over that epsilon.
  optimizer = make(rate=1e6, b1=0.0, b2=0.0, epsilon=1e6, clip_norm=largest)
  updates = named(update(optimizer, gradients, params))
  factor = min(1.0, largest / norm)
  for path, gradient in named(gradients).items():
    np.testing.assert_allclose(updates[path], -factor * gradient, rtol=1e-3, atol=1e-6)


MATRICES = {  # how each parameter that Muon takes is a matrix, repeats apart
  "blocks/0_mamba/mixer/in_proj/kernel": (8, 20),
  "blocks/1_attention/mixer/query_proj/kernel": (8, 12),
  "blocks/1_attention/mixer/out_proj/kernel": (12, 8),
  "blocks/1_attention/mlp/out_proj/kernel": (12, 8),
}


def test_muon_makes_each_matrix_of_each_repeat_nearly_orthogonal():
  """Singular values within Newton-Schulz's band, in the gradient's own directions, of Adam's size.

  The gradients are of full rank with condition numbers of about ten, and differ between repeats.
  """
  params, gradients = random_params(), random_params(1)
  updates = named(update(make(name="muon", momentum=0.0), gradients, params))
  for path, shape in MATRICES.items():
    for step, gradient in zip(updates[path], named(gradients)[path]):
      step = step.reshape(shape) / -0.1 / (0.2 * np.sqrt(max(shape)))
      values = np.linalg.svd(step, compute_uv=False)
      assert values.min() > 0.6 and values.max() < 1.3, path
      left, _, right = np.linalg.svd(gradient.reshape(shape), full_matrices=False)
      overlap = np.trace(left.T @ step @ right.T) / np.linalg.norm(step) / np.sqrt(8)
      assert overlap > 0.95, path
      # Descent, with about the root mean square of AdamW's updates.
      assert np.sum(step * gradient.reshape(shape)) > 0
  others = set(updates) - set(MATRICES)
  adam = named(update(make(name="adamw"), gradients, params))
  for path in others:
    np.testing.assert_allclose(updates[path], adam[path], rtol=1e-4, atol=1e-6)
