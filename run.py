"""The one program: python run.py --config=configs/quickstart.py [--mode=train|eval|sample|bench]
..."""

import errno
import os
import sys

from experiments.errors import UserError


def main(argv: list[str]) -> int:
  """Runs one command line; returns the exit status. Every mistake of the user's is one line."""
  try:
    # Imported here, so that a mistake while importing a missing extra is told like any other.
    from experiments import configuration, modes

    invocation = configuration.parse(argv)
    modes.run(invocation)
  except UserError as error:
    return _fail(str(error), error.status)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    return _fail(f"the disk is full: {error.filename or os.getcwd()}", 1)
  except KeyboardInterrupt:
    return _fail("interrupted; the last checkpoint stands", 130)
  except BrokenPipeError:
    # The reader of our output has gone, as `| head` does; Python would complain while closing it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  return 0


def _fail(message: str, status: int) -> int:
  print(f"error: {message}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
