"""The model that a config's group `model` describes."""

from collections.abc import Callable

from experiments.errors import UserError
from lm_models import lm, vision


def language_model(config) -> lm.Config:
  """The language model of an experiment.

  Raises:
    UserError: the group `model` does not describe one.
  """
  return _made(lm.make_config, config)


def vision_model(config) -> vision.Config:
  """The vision model of an experiment.

  Raises:
    UserError: the group `model` does not describe one.
  """
  return _made(vision.make_config, config)


def _made(make: Callable, config):
  try:
    return make(**config.model.to_dict())
  except ValueError as error:
    raise UserError(str(error)) from None
