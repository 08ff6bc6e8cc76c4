"""The one exception that ends a run with a message instead of a traceback."""

import pathlib


class UserError(RuntimeError):
  """A problem that the person at the keyboard can solve.

  `run.py` prints the message as one line and exits with status 2 (1 where a run went wrong that had
  begun well), so the message names the field or file, what it holds, and what would be right.
  """

  def __init__(self, message: str, status: int = 2):
    super().__init__(message)
    self.status = status


def check_writable(flag: str, path: str | pathlib.Path | None) -> None:
  """Raises UserError unless `path`, given as `flag`, is empty or a file in a directory that exists:
  said before the work whose result it is to hold."""
  if path and (not pathlib.Path(path).resolve().parent.is_dir() or pathlib.Path(path).is_dir()):
    raise UserError(f"{flag} is {str(path)!r}, must be a file in a directory that exists")
