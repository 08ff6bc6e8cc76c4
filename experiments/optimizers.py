"""Optimizers and schedules, from optax, with weight decay and learning rates by parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from experiments.errors import UserError
from experiments.rules import first_match, map_rules, path_name

# How many axes of a parameter, after the repeats, number matrices of their own, such as heads.
STACK_AXES = ((r"/input_proj/kernel$", 1), (r".*", 0))

# How many axes after these a matrix product sums over; the rest are outputs.
INPUT_AXES = ((r"attention/mixer/out_proj/kernel$", 2), (r".*", 1))

# Muon's updates have this root mean square times the learning rate, about that of AdamW's, so that
# one learning rate serves both. Liu et al., "Muon is Scalable for LLM Training", 2025.
MUON_RMS = 0.2


def make_schedule(config, steps: int, peak: float) -> optax.Schedule:
  """The learning rate by step: a linear warm-up, then cosine, wsd or constant.

  wsd (warm up, stay, decay) stays at the peak and falls at the end as 1 - sqrt(fraction of the
  decay);
  Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024.

  Args:
    config: the group `schedule`.
    steps: of the whole run.
    peak: the learning rate at its peak.

  Raises:
    UserError: an unknown name, or a warm-up longer than the run.
  """
  warmup = config.warmup_steps
  if not 0 <= warmup <= steps:
    raise UserError(
      f"schedule.warmup_steps is {warmup}, must be between 0 and train.steps = {steps}"
    )
  rest = max(steps - warmup, 1)
  final = config.final_fraction

  def stay_then_decay(step):
    decay = min(max(config.decay_fraction * steps, 1.0), rest)
    t = jnp.clip((step - (rest - decay)) / decay, 0.0, 1.0)
    return peak * (1 - (1 - final) * jnp.sqrt(t))

  after = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, final),
    "wsd": lambda: stay_then_decay,
    "constant": lambda: optax.constant_schedule(peak),
  }
  if config.name not in after:
    raise UserError(f"schedule.name is {config.name!r}, must be one of {sorted(after)}")
  # Step 0 already learns: the rise starts at 1 / warmup rather than at nothing.
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, after[config.name]()], [warmup])


def make_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Clipping, then AdamW or Muon, then weight decay and learning rate by the config's rules.

  Args:
    config: the group `optim`.
    schedule: from `make_schedule`.

  Raises:
    UserError: an unknown name, or, at `init`, a parameter that no rule covers.
  """
  directions = {
    "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.epsilon),
    "muon": lambda: _muon(config),
  }
  if config.name not in directions:
    raise UserError(f"optim.name is {config.name!r}, must be one of {sorted(directions)}")
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    directions[config.name](),
    _decay_weights(config.weight_decay, config.weight_decay_rules),
    optax.scale_by_learning_rate(schedule),
    _multiply(config.learning_rate_rules),
  )


def _muon(config):
  """Ascent directions: Muon for the matrices that `optim.muon_rules` names, Adam for the rest."""

  def labels(params):
    taken = map_rules(config.muon_rules, params, "optim.muon_rules")
    return jax.tree.map(lambda is_muon: "muon" if is_muon else "adam", taken)

  def dimension_numbers(params):
    def numbers(path, leaf):
      name = path_name(path)
      first = 1 if name.startswith("blocks/") else 0
      first += first_match(STACK_AXES, name, "optimizers.STACK_AXES")
      inputs = first + first_match(INPUT_AXES, name, "optimizers.INPUT_AXES")
      return contrib.MuonDimensionNumbers(
        tuple(range(first, inputs)), tuple(range(inputs, leaf.ndim))
      )

    return jax.tree_util.tree_map_with_path(numbers, params)

  descent = contrib.muon(
    1.0,
    beta=config.momentum,
    eps=config.epsilon,
    muon_weight_dimension_numbers=dimension_numbers,
    consistent_rms=MUON_RMS,
  )
  # Its own Adam for the rest would have Nesterov's momentum, which AdamW has not.
  adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
  muon = optax.chain(descent, optax.scale(-1.0))
  return optax.partition({"muon": muon, "adam": adam}, labels)


def _decay_weights(weight_decay: float, rules: Any) -> optax.GradientTransformation:
  return _by_rule(rules, "optim.weight_decay_rules", lambda u, p, f: u + weight_decay * f * p)


def _multiply(rules: Any) -> optax.GradientTransformation:
  return _by_rule(rules, "optim.learning_rate_rules", lambda u, p, f: f * u)


def _by_rule(rules: Any, field: str, combine: Callable) -> optax.GradientTransformation:
  """`combine(update, parameter, factor)` for each leaf, the factor by rules that cover all."""

  def init(params):
    map_rules(rules, params, field)
    return optax.EmptyState()

  def update(updates, state, params):
    factors = map_rules(rules, params, field)
    return jax.tree.map(combine, updates, params, factors), state

  return optax.GradientTransformation(init, update)
