"""The one exception that ends a run with a message instead of a traceback."""


class UserError(RuntimeError):
  """A problem that the person at the keyboard can solve.

  `run.py` prints the message as one line and exits with status 2 (1 where a run went wrong that had
  begun well), so the message names the field or file, what it holds, and what would be right.
  """

  def __init__(self, message: str, status: int = 2):
    super().__init__(message)
    self.status = status
