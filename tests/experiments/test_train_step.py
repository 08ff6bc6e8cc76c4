"""One training step: what it computes, what it skips, what it carries, and on which devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import models
from experiments.errors import UserError
from lm_models import lm
from tests.experiments.small import B, Run, T, assert_equal, make_batch, make_config
from tests.quick_compilation import quick_compilation as quick_compilation

HYBRID = ("mamba", "sliding_attention")


@pytest.fixture(scope="module")
def streaming():
  """A streaming run that remembers four steps and averages its weights, and its first state."""
  run = Run(
    make_config(
      HYBRID, data__mode="streaming", train__spike_window=4, train__ema_decay=0.9,
      schedule__name="cosine", schedule__warmup_steps=3, optim__learning_rate=1e-2,
    )
  )  # fmt: skip
  return run, run.start()


@pytest.fixture(scope="module")
def one_step(streaming):
  """The state and the metrics after one step on batch 0."""
  run, state = streaming
  return run.step(state, make_batch())


def test_loss_and_gradient_norm_are_those_of_the_real_tokens(streaming, one_step):
  run, state = streaming
  model, batch = models.language_model(run.config), make_batch()

  @jax.jit
  @jax.value_and_grad
  def mean(params):
    logits, _ = lm.apply(model, params, *map(jnp.asarray, (batch["inputs"],)), None, ids)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(nats * real) / real.sum()

  ids, targets = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["targets"])
  real = batch["segment_ids"] >= 0
  loss, gradients = mean(state.params)
  _, metrics = one_step
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
  assert metrics["targets"] == real.sum() < B * T


def test_what_a_good_step_changes(streaming, one_step):
  run, before = streaming
  after, metrics = one_step
  assert (int(before.step), int(after.step)) == (0, 1)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, after.params)
  assert all(jax.tree.leaves(changed))
  recent = after.recent
  assert (int(recent.accepted), int(recent.skipped), int(recent.skipped_in_a_row)) == (1, 0, 0)
  np.testing.assert_array_equal(recent.loss, [metrics["loss"], 0, 0, 0])
  np.testing.assert_array_equal(recent.norm, [metrics["gradient_norm"], 0, 0, 0])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
  assert run.config.train.ema_decay == 0.9
  for average, old, new in zip(*map(jax.tree.leaves, (after.average, before.params, after.params))):
    np.testing.assert_allclose(average, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7)


def test_the_same_bits_every_time(streaming, one_step):
  run, _ = streaming
  assert_equal(run.step(run.start(), make_batch()), one_step)


def test_the_state_given_is_donated(streaming):
  run, state = streaming
  copied = jax.tree.map(jnp.copy, state)
  run.donating_step(copied, make_batch())
  deleted = [leaf.is_deleted() for leaf in jax.tree.leaves(copied.params)]
  assert all(deleted)


@pytest.mark.parametrize("wrong", ["parameters", "batch", "carry"])
def test_a_step_that_is_not_finite_changes_only_counters(streaming, one_step, wrong):
  run, _ = streaming
  state, _ = one_step
  batch = make_batch(1, continues=[True] * B)
  if wrong == "parameters":
    scale = state.params["norm"]["scale"].at[0].set(jnp.nan)
    state = state.replace(params={**state.params, "norm": {"scale": scale}})
  elif wrong == "batch":
    batch["inputs"][2, 0] = 10**6  # no row of the embedding: read as not-a-number
  else:
    state = state.replace(carry=jax.tree.map(lambda x: x.at[:, 3].set(True), state.carry))
    poison = lambda x: x.at[:, 3].set(jnp.nan) if x.dtype == jnp.float32 else x
    state = state.replace(carry=jax.tree.map(poison, state.carry))
  after, metrics = run.step(state, batch)
  for part in ("params", "optimizer", "average"):
    assert_equal(getattr(after, part), getattr(state, part))
  assert_equal((after.recent.loss, after.recent.norm), (state.recent.loss, state.recent.norm))
  assert int(after.step) == 2 and int(after.recent.accepted) == 1
  assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
  # Another document follows in row 3: the poison ends with the one that was carried.
  spoilt = [2] if wrong == "batch" else []
  for leaf in jax.tree.leaves(after.carry):
    assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(leaf[:, spoilt], 0)
    assert np.asarray(leaf)[:, [0, 1]].any()
  if wrong == "carry":
    # All is well again: the count in a row is over.
    after, metrics = run.step(after, batch)
    assert np.isfinite(metrics["loss"])
    assert int(metrics["skipped"]) == 1 and int(metrics["skipped_in_a_row"]) == 0
    # The learning rate of the warm-up's second step: the skipped one did not use it up.
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("quantity", ["loss", "norm"])
def test_a_spike_is_skipped_once_the_window_is_full(streaming, one_step, quantity):
  run, state = streaming
  _, metrics = one_step
  value = float(metrics["loss" if quantity == "loss" else "gradient_norm"])
  high = np.full(4, 1e6, np.float32)

  def step(threshold, accepted):
    # Mean and standard deviation of (m - s, m + s, m - s, m + s) are m and s.
    s = 0.01
    window = np.float32(threshold - 6 * s) + np.array([-s, s, -s, s], np.float32)
    windows = {"loss": high, "norm": high, quantity: window}
    recent = state.recent.replace(
      **{name: jnp.asarray(x) for name, x in windows.items()}, accepted=jnp.int32(accepted)
    )
    return run.step(state.replace(recent=recent), make_batch())

  after, measured = step(value - 1e-3, accepted=4)
  assert int(measured["skipped"]) == 1
  assert_equal(after.params, state.params)
  after, measured = step(value + 1e-3, accepted=4)
  assert int(measured["skipped"]) == 0
  # The oldest of the window gives way.
  windows = after.recent.loss if quantity == "loss" else after.recent.norm
  np.testing.assert_allclose(windows[0], value, rtol=1e-6)
  _, measured = step(value - 1e-3, accepted=3)
  assert int(measured["skipped"]) == 0


def test_streamed_batches_are_one_long_sequence():
  """With frozen parameters: the losses and the state of a forward pass over all tokens."""
  run = Run(make_config(HYBRID, data__mode="streaming", optim__learning_rate_rules=((r".*", 0.0),)))
  first = state = run.start()
  model = models.language_model(run.config)
  long = make_batch(3, length=4 * T)
  long["segment_ids"] = np.zeros_like(long["segment_ids"])
  nats, expected = jax.jit(functools.partial(lm.token_nats, model))(
    state.params, jnp.asarray(long["inputs"]), jnp.asarray(long["targets"])
  )
  for n in range(4):
    part = {name: x[:, n * T : (n + 1) * T] for name, x in long.items() if x.ndim == 2}
    # What is carried before the first batch must not matter: it is not continued.
    if n == 0:
      state = state.replace(carry=jax.tree.map(jnp.ones_like, state.carry))
    state, metrics = run.step(state, {**part, "continues": np.full(B, n > 0)})
    np.testing.assert_allclose(metrics["loss"], nats[:, n * T : (n + 1) * T].mean(), rtol=1e-5)
  assert_equal(state.params, first.params)
  for got, truth in zip(jax.tree.leaves(state.carry), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, truth, atol=1e-5)
  # Row 0 starts afresh, row 1 goes on.
  part = {**make_batch(4), "segment_ids": np.zeros((B, T), np.int32)}
  continues = np.arange(B) > 0
  apply = jax.jit(functools.partial(lm.token_nats, model))
  inputs, targets = jnp.asarray(part["inputs"]), jnp.asarray(part["targets"])
  alone, _ = apply(state.params, inputs, targets, lm.init_state(model, B))
  carried, _ = apply(state.params, inputs, targets, state.carry)
  assert np.abs(alone[0] - carried[0]).max() > 1e-4
  _, metrics = run.step(state, {**part, "continues": continues})
  expected = np.where(continues[:, None], carried, alone).mean()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def accumulated():
  """The step after batch 0 in one part, and what came before it."""
  make = lambda parts: Run(
    make_config(HYBRID, data__mode="streaming", train__accumulate=parts, optim__clip_norm=0.0)
  )
  run = make(1)
  before = run.start()
  return make, before, run.step(before, make_batch())


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_same_update(accumulated, parts):
  make, before, (expected, expected_metrics) = accumulated
  run = make(parts)
  after, metrics = run.step(before, make_batch())
  for name in ("loss", "gradient_norm", "targets"):
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
  moments = lambda state: state.optimizer[1].mu  # a tenth of the gradient
  for got, truth in zip(jax.tree.leaves(moments(after)), jax.tree.leaves(moments(expected))):
    np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())
  for got, truth in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected.params)):
    np.testing.assert_allclose(got, truth, atol=1e-5)
  for got, truth in zip(jax.tree.leaves(after.carry), jax.tree.leaves(expected.carry)):
    np.testing.assert_allclose(got, truth, atol=1e-6)
  # The microbatches exist: parts of B / parts rows.
  program = str(jax.make_jaxpr(run.donating_step)(before, make_batch()))
  assert f"i32[{parts},{B // parts},{T}]" in program


def test_bfloat16_computes_low_and_keeps_high(streaming, one_step):
  config = streaming[0].config.copy_and_resolve_references()
  config.model.dtype = "bfloat16"
  run = Run(config)
  state = run.start()
  assert_equal(state.params, streaming[1].params)
  after, metrics = run.step(state, make_batch())
  assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
  exact = float(one_step[1]["loss"])
  assert metrics["loss"].dtype == jnp.float32
  assert 0 < abs(float(metrics["loss"]) - exact) < 0.02 * exact


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"train__batch_size": 6, "mesh__data": 4}, r"train.batch_size is 6, .* mesh.fsdp = 4$"),
    ({"train__accumulate": 3}, r"train.batch_size is 8, .* = 1 \* 3$"),
    ({"train__accumulate": 0}, r"train.batch_size is 8, "),
    ({"optim__name": "sgd"}, "optim.name is 'sgd', must be one of"),
    ({"schedule__name": "step"}, "schedule.name is 'step', must be one of"),
    ({"model__D": 0}, "model.D is 0, must be at least 1"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message) as error:
    Run(make_config(**fields))
  assert "\n" not in str(error.value)
