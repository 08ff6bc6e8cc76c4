"""One training step: what it carries, how it is made and placed, and what it computes."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from experiments import sharding
from experiments.optimizers import make_optimizer, make_schedule
from experiments.tasks import make_task
from lm_models import lm
from ops import sharded


@flax.struct.dataclass
class Recent:
  """The losses and gradient norms of the last accepted steps, against which a spike is measured."""

  loss: jax.Array  # [window]
  norm: jax.Array  # [window]
  accepted: jax.Array  # steps so far that were not skipped
  skipped: jax.Array  # steps so far that were
  skipped_in_a_row: jax.Array  # of these, the latest without a good one between


@flax.struct.dataclass
class TrainState:
  """Everything that a run needs to go on, apart from the position in the data."""

  step: jax.Array
  params: Any
  optimizer: Any
  average: Any  # exponential moving average of the parameters, or None
  carry: Any  # the model's state after the last batch where documents are streamed, or None
  recent: Recent


def make_state(config, key: jax.Array) -> TrainState:
  """The state before the first step; a pure function of the config and the key."""
  task = make_task(config)
  params = task.init(key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    optimizer=_optimizer(config).init(params),
    average=jax.tree.map(jnp.copy, params) if config.train.ema_decay else None,
    carry=task.init_carry(config.train.batch_size),
    recent=Recent(
      loss=jnp.zeros(config.train.spike_window),
      norm=jnp.zeros(config.train.spike_window),
      accepted=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      skipped_in_a_row=jnp.zeros((), jnp.int32),
    ),
  )


def abstract_state(config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, without making any array."""
  # The key is made within: the mesh in force may be of devices that are not here.
  shapes = jax.eval_shape(lambda: make_state(config, jax.random.key(0)))
  copied = functools.partial(jax.tree.map, lambda _: sharding.replicated(mesh))
  shardings = TrainState(
    step=copied(shapes.step),
    params=sharding.parameter_shardings(mesh, shapes.params),
    optimizer=sharding.parameter_shardings(mesh, shapes.optimizer),
    average=sharding.parameter_shardings(mesh, shapes.average),
    carry=sharding.state_shardings(mesh, shapes.carry),
    recent=copied(shapes.recent),
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def shardings_of(tree: Any) -> Any:
  """The shardings of arrays or of their shapes."""
  return jax.tree.map(lambda x: x.sharding, tree)


def initialise(config, mesh: jax.sharding.Mesh) -> TrainState:
  """Makes the state before the first step where it belongs, each device its part."""
  shardings = shardings_of(abstract_state(config, mesh))
  init = jax.jit(functools.partial(make_state, config), out_shardings=shardings)
  return init(jax.random.key(config.train.seed))


def make_step(config, mesh: jax.sharding.Mesh):
  """The jitted step: (state, batch) -> (state, metrics). The state given is donated.

  metrics: `loss` in nats per target before the update, `gradient_norm` before clipping, `targets`
  (how many counted), `learning_rate`, `skipped` and `skipped_in_a_row`, scalars; and `further`, a
  dict of scalars by name: what the task sums over targets, as means, and what layers watch.

  Raises:
    UserError: rows that devices or microbatches do not divide, tokens of a row that devices do not
    divide, or an optimizer that does not exist.
  """
  step, arrays = _jitted(config, mesh), make_task(config).arrays
  return lambda state, batch: step(state, {name: batch[name] for name in arrays})


def lower_step(config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The step of `make_step`, to be compiled ahead of time: for devices that need not be here.

  Raises:
    UserError: as `make_step`.
  """
  task = make_task(config)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in task.example_batch().items()}
  return _jitted(config, mesh).lower(abstract_state(config, mesh), batch)


def _jitted(config, mesh: jax.sharding.Mesh):
  arrays = make_task(config).arrays
  rows, parts = config.train.batch_size, config.train.accumulate
  sharding.check_rows(mesh, arrays, "train.batch_size", rows, parts)
  sharding.check_lengths(mesh, arrays, "data.T", (config.data.T,))
  state_shardings = shardings_of(abstract_state(config, mesh))
  batch_shardings = {name: sharding.batch_sharding(mesh, ndim) for name, ndim in arrays.items()}
  return jax.jit(
    sharded.exchange(config.mesh.exchange)(functools.partial(_step, config)),
    in_shardings=(state_shardings, batch_shardings),
    out_shardings=(state_shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def _optimizer(config):
  schedule = make_schedule(config.schedule, config.train.steps, config.optim.learning_rate)
  return make_optimizer(config.optim, schedule)


def _step(config, state: TrainState, batch):
  task = make_task(config)
  targets = jnp.maximum(task.count(batch), 1)

  def loss(params, batch, carry, key):
    measured, carry = task.forward(params, batch, carry, key)
    return measured.nats / targets, (carry, measured.sums, measured.largest)

  gradient = jax.value_and_grad(loss, has_aux=True)
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  if config.train.accumulate == 1:
    (loss_value, (carry, sums, largest)), gradients = gradient(
      state.params, batch, state.carry, key
    )
  else:
    loss_value, gradients, carry, sums, largest = _accumulate(
      gradient, state.params, batch, state.carry, key, config.train.accumulate
    )

  norm = optax.tree.norm(gradients)
  updates, optimizer = _optimizer(config).update(gradients, state.optimizer, state.params)
  good = _is_good(config.train, state.recent, loss_value, norm)
  good &= jnp.isfinite(optax.tree.norm(updates))
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
  params, optimizer = keep(params, state.params), keep(optimizer, state.optimizer)
  average = state.average
  if average is not None:
    weight = 1.0 - config.train.ema_decay
    average = jax.tree.map(lambda a, p: jnp.where(good, a + weight * (p - a), a), average, params)
  if carry is not None:
    # Only a state that is not finite is forgotten. To forget more would make the next losses worse,
    # hence spikes, hence skipped, without end.
    carry = lm.keep_state(carry, _finite_rows(carry))
  recent = _remember(state.recent, loss_value, norm, good)
  schedule = make_schedule(config.schedule, config.train.steps, config.optim.learning_rate)
  metrics = {
    "loss": loss_value,
    "gradient_norm": norm,
    "targets": targets,
    "learning_rate": schedule(state.recent.accepted),  # a skipped step does not count
    "skipped": recent.skipped,
    "skipped_in_a_row": recent.skipped_in_a_row,
    "further": {**{name: total / targets for name, total in sums.items()}, **largest},
  }
  return TrainState(state.step + 1, params, optimizer, average, carry, recent), metrics


def _finite_rows(carry):
  """bool [B]: the rows whose states [repeats B ...] are finite throughout."""
  floating = [x for x in jax.tree.leaves(carry) if jnp.issubdtype(x.dtype, jnp.inexact)]
  rows = [jnp.isfinite(x).all(axis=(0, *range(2, x.ndim))) for x in floating]
  return functools.reduce(jnp.logical_and, rows)


def _accumulate(gradient, params, batch, carry, key, parts: int):
  """Loss and gradients summed over microbatches, one after the other in memory; and their states,
  sums and largest values together."""
  # Each microbatch takes every parts-th row, so that it lies over all devices as the batch does.
  split = lambda axis, x: jnp.moveaxis(
    x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :]), axis + 1, 0
  )
  join = lambda axis, x: jnp.moveaxis(x, 0, axis + 1).reshape(
    *x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]
  )

  def body(total, part):
    (loss, further), gradients = gradient(params, *part)
    return jax.tree.map(jnp.add, total, (loss, gradients)), further

  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  microbatches = (
    jax.tree.map(functools.partial(split, 0), batch),
    jax.tree.map(functools.partial(split, 1), carry),
    jax.random.split(key, parts),
  )
  (loss, gradients), (carry, sums, largest) = jax.lax.scan(body, zero, microbatches)
  carry = jax.tree.map(functools.partial(join, 1), carry)
  over_parts = lambda reduce, tree: jax.tree.map(functools.partial(reduce, axis=0), tree)
  return loss, gradients, carry, over_parts(jnp.sum, sums), over_parts(jnp.max, largest)


def _is_good(config, recent: Recent, loss, norm):
  """Whether to take a step: finite, and no spike once the window has filled."""
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  if config.spike_sigma:
    full = recent.accepted >= config.spike_window
    for value, window in ((loss, recent.loss), (norm, recent.norm)):
      spike = value > jnp.mean(window) + config.spike_sigma * jnp.std(window)
      good &= ~(full & spike)
  return good


def _remember(recent: Recent, loss, norm, good) -> Recent:
  slot = recent.accepted % recent.loss.shape[0]
  put = lambda window, value: jnp.where(good, window.at[slot].set(value), window)
  return Recent(
    loss=put(recent.loss, loss),
    norm=put(recent.norm, norm),
    accepted=recent.accepted + good,
    skipped=recent.skipped + ~good,
    skipped_in_a_row=jnp.where(good, 0, recent.skipped_in_a_row + 1),
  )
