"""What fields of a config may hold, checked before anything is made of them."""

from collections.abc import Iterable

from experiments import configuration
from experiments.errors import UserError
from ops.time_axis import METHODS

AT_LEAST_ONE = """
  data.T model.vocab_size model.D model.L model.unroll model.mamba.expand model.mamba.N
  model.mamba.W train.steps train.batch_size train.accumulate train.spike_window train.max_skipped
  eval.batch_size eval.T eval.examples checkpoint.keep_last data.side
"""
AT_LEAST_ZERO = """
  data.prefetch data.examples model.mamba.mlp_width optim.learning_rate optim.weight_decay
  optim.clip_norm schedule.warmup_steps train.seed train.spike_sigma eval.every_steps
  eval.max_tokens
  eval.final_max_tokens checkpoint.every_steps checkpoint.keep_best checkpoint.keep_every_hours
  log.every_steps sample.tokens sample.temperature sample.top_k sample.seed
"""
ABOVE_ZERO = "data.scale model.norm_epsilon optim.epsilon sample.top_p"
BELOW_ONE = "optim.b1 optim.b2 optim.momentum train.ema_decay"
AT_MOST_ONE = "schedule.decay_fraction schedule.final_fraction sample.top_p"


def check(config) -> None:
  """Raises UserError, in one line, where a field holds what has no meaning.

  Fields that the config does not have, or that are None, are passed over.
  """
  values = dict(configuration.fields_of(config))
  _require(values, AT_LEAST_ONE.split(), lambda x: x >= 1, "at least 1")
  _require(values, AT_LEAST_ZERO.split(), lambda x: x >= 0, "at least 0")
  _require(values, ABOVE_ZERO.split(), lambda x: x > 0, "above 0")
  _require(values, BELOW_ONE.split(), lambda x: 0 <= x < 1, "at least 0 and below 1")
  methods = (*METHODS, "auto")
  allowed = f"one of {', '.join(methods)}"
  _require(values, ["mesh.exchange"], lambda x: x in methods, allowed)
  _require(values, AT_MOST_ONE.split(), lambda x: 0 <= x <= 1, "between 0 and 1")


def _require(values: dict, names: Iterable[str], holds, allowed: str) -> None:
  for name in names:
    value = values.get(name)
    # A comparison with NaN is false: it is refused everywhere.
    if value is not None and not holds(value):
      raise UserError(f"{name} is {value}, must be {allowed}")
