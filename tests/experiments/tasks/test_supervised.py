"""Tasks with right answers: what is counted, at which lengths, and what a step makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import plstm_rays
from experiments import sharding, train_step
from experiments.errors import UserError
from experiments.tasks import make_task
from tests.experiments import small


def rays(**fields):
  """The smallest experiment on rays; fields of the groups train, eval and data."""
  config = plstm_rays.get_config("vit")
  config.model.D, config.model.L, config.model.mlp_ratio = 12, 1, 0.0
  config.data.side, config.eval.lengths = 4, (4, 6)
  config.train.batch_size, config.eval.batch_size = 4, 4
  config.mesh.data = 1
  for name, value in fields.items():
    group, field = name.split("__")
    config[group][field] = value
  return config


def parity(**fields):
  """The smallest experiment on parity."""
  fields = {"data__name": "parity", "model__vocab_size": 2, "eval__batch_size": 4, **fields}
  return small.make_config(**fields)


def evaluate(task, params, brief=False):
  mesh = sharding.make_mesh(task.config.mesh)
  with jax.set_mesh(mesh):
    return task.evaluator(mesh)(params, "validation", brief)


@pytest.mark.slow
@pytest.mark.parametrize("brief", [False, True])
def test_an_evaluation_counts_so_many_examples_and_no_more(brief):
  task = make_task(rays(eval__examples=70))
  params = task.init(jax.random.key(1))
  found = evaluate(task, params, brief).metrics
  examples = 7 if brief else 70
  assert set(found) == {f"{name}/{side}" for name in ("loss", "accuracy", "f1") for side in (4, 6)}
  for place, side in enumerate((4, 6)):
    batch = task.batches(side, 72, 100_042 + place, 0, slice(None))[0]
    images, targets = (jnp.asarray(batch[name][:examples]) for name in ("images", "targets"))
    logits = np.asarray(jax.jit(task.logits)(params, {"images": images})[0], np.float64)
    answers, targets = logits.argmax(-1), np.asarray(targets)
    assert found[f"accuracy/{side}"] == pytest.approx(np.mean(answers == targets))
    hits, ones = np.sum(answers & targets), np.sum(answers) + np.sum(targets)
    assert found[f"f1/{side}"] == pytest.approx(2 * hits / ones)
    nats = (
      np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    assert found[f"loss/{side}"] == pytest.approx(nats.mean(), rel=1e-5)


def test_only_the_last_bit_counts_where_only_it_is_learnt_from():
  task = make_task(parity(data__supervise="last"))
  params = task.init(jax.random.key(0))
  batch = {name: jnp.asarray(x) for name, x in task.example_batch().items()}
  measured, carry = task.forward(params, batch, None, jax.random.key(0))
  logits, _ = task.logits(params, batch)
  nats = task.nats(logits, batch["targets"])
  assert carry is None and int(task.count(batch)) == task.config.train.batch_size
  np.testing.assert_allclose(measured.nats, nats[:, -1].sum(), rtol=1e-6)
  right = jnp.argmax(logits[:, -1], -1) == batch["targets"][:, -1]
  assert int(measured.sums["accuracy"]) == int(right.sum())


@pytest.mark.slow
def test_microbatches_measure_the_same():
  results = []
  for parts in (1, 2):
    run = small.Run(rays(train__accumulate=parts))
    batch = make_task(run.config).example_batch()
    results.append(run.step(run.start(), batch)[1])
  whole, parts = jax.device_get(results)
  for name in ("loss", "gradient_norm", "targets"):
    np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
  assert parts["further"].keys() == whole["further"].keys() == {"accuracy"}
  np.testing.assert_allclose(parts["further"]["accuracy"], whole["further"]["accuracy"], rtol=1e-6)


@pytest.mark.slow
def test_the_largest_of_what_layers_watch_is_a_metric():
  config = rays(train__accumulate=2)
  config.model.pattern = ("plstm_p",)
  config.model.plstm_p.gate_inputs = "all"
  run = small.Run(config)
  _, metrics = run.step(run.start(), make_task(config).example_batch())
  assert 0.5 < float(metrics["further"]["largest_column_sum"]) <= 1 + 1e-6


def test_batches_go_on_where_they_stopped_and_only_there():
  task = make_task(parity())
  batches = task.train_batches()
  for _ in range(3):
    next(batches)
  state, expected = batches.get_state(), next(batches)
  again = task.train_batches()
  again.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, next(again), expected)
  longer = make_task(parity(data__T=7)).train_batches()
  with pytest.raises(UserError, match="the length of an example is 7 here, 6 in the checkpoint"):
    longer.set_state(state)


@pytest.mark.parametrize(
  "config, message",
  [
    (lambda: parity(data__mode="streaming"), r"data.mode is 'streaming', must be 'packed'"),
    (lambda: parity(data__supervise="some"), r"supervise='some'"),
    (lambda: rays(eval__lengths=(0,)), r"eval.lengths is \(0,\), must be of ints of at least 1"),
    (lambda: rays(model__channels=3), r"model.channels is 3, must be 5 with data.name='rays'"),
    (lambda: rays(data__examples=16), r"data.examples is 16, must be 0 with data.name='rays'"),
    (lambda: parity(train__seed=200_042), r"train.seed is 200042, with which examples are made"),
    (lambda: rays(model__patch=2), r"model.patch is 2, must be 1"),
    (lambda: rays(model__pooling="mean"), r"model.pooling is 'mean', must be 'none'"),
    (lambda: parity(model__vocab_size=1), r"model.vocab_size is 1, must be at least 2 for parity"),
  ],
)
def test_wrong_fields_are_told_in_one_line(config, message):
  with pytest.raises(UserError, match=message) as caught:
    config = config()
    task = make_task(config)
    task.train_batches()
    task.evaluator(sharding.make_mesh(config.mesh))
  assert "\n" not in str(caught.value)


def test_there_is_no_text_to_sample():
  with pytest.raises(UserError, match="of which no text can be sampled"):
    make_task(parity()).sample(None)


def test_steps_learn():
  run = small.Run(parity(optim__learning_rate=1e-2))
  state, batch = run.start(), make_task(run.config).example_batch()
  losses = []
  for _ in range(5):
    state, metrics = run.step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  assert train_step.make_state(run.config, jax.random.key(0)).carry is None
