"""What a run can train: see `task.Task`."""

from experiments.errors import UserError
from experiments.tasks.supervised import Arrow, ArrowTokens, Parity, Rays
from experiments.tasks.task import Task
from experiments.tasks.text import Text

SUPERVISED = {"parity": Parity, "rays": Rays, "arrow": Arrow, "arrow_tokens": ArrowTokens}


def make_task(config) -> Task:
  """The task of an experiment: `data.name` is that of a synthetic one, or a body of text.

  Raises:
    UserError: the groups `data` and `model` do not describe one.
  """
  name = config.data.name
  if name not in SUPERVISED:
    return Text(config)
  if config.data.mode != "packed":
    raise UserError(f"data.mode is {config.data.mode!r}, must be 'packed' with data.name={name!r}")
  return SUPERVISED[name](config)
