"""The one program: run.py --config=configs/X.py [--mode=train|eval|sample|aot|bench|doctor]"""

import errno
import os
import sys

from experiments.errors import UserError
from experiments.memory import keep_memory

# What is wrong with a disk or a directory, rather than with the program.
DISK_TROUBLE = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EIO,
)


def main(argv: list[str]) -> int:
  """Runs one command line; returns the exit status. Every mistake of the user's is one line."""
  invocation = None
  try:
    # Imported here, so that a mistake while importing a missing extra is told like any other.
    from experiments import configuration

    invocation = configuration.parse(argv)
    if invocation.mode not in configuration.JOINT_MODES:
      _run(invocation)
    else:
      from experiments import processes

      with processes.together(invocation.processes):
        _run(invocation)
  except UserError as error:
    return _fail(str(error), error.status)
  except KeyboardInterrupt:
    return _fail("interrupted; the last checkpoint stands", 130)
  except BrokenPipeError:
    # The reader of our output has gone, as `| head` does; Python would complain while closing it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as error:
    if error.errno not in DISK_TROUBLE:
      raise
    place = error.filename or (f"a file in {invocation.workdir}" if invocation else "a file")
    return _fail(f"{place} cannot be read or written: {error.strerror}", 1)
  return 0


def _run(invocation) -> None:
  if invocation.mode == "aot":
    from experiments import topologies

    topologies.prepare(topologies.parse(invocation.options.get("topology", "")))
  # What devices there are, and of which other processes, is settled before a module asks for them.
  from experiments import modes

  modes.run(invocation)


def _fail(message: str, status: int) -> int:
  print(f"error: {message}", file=sys.stderr)
  return status


if __name__ == "__main__":
  keep_memory()
  status = main(sys.argv)
  # Threads of libraries, those of a failed save above all, must not hold up or abort a program that
  # has ended: all that it has to write is written.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
