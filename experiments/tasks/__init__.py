"""What a run can train: see `task.Task`."""

from experiments.errors import UserError
from experiments.tasks.task import Task
from experiments.tasks.text import Text

SYNTHETIC = ("parity", "rays", "arrow")


def make_task(config) -> Task:
  """The task of an experiment: `data.name` is one of the synthetic ones, or a body of text.

  Raises:
    UserError: the groups `data` and `model` do not describe one.
  """
  name = config.data.name
  if name not in SYNTHETIC:
    return Text(config)
  if config.data.mode != "packed":
    raise UserError(f"data.mode is {config.data.mode!r}, must be 'packed' with data.name={name!r}")
  from experiments.tasks import supervised

  return getattr(supervised, name.capitalize())(config)
