"""What is computed once and kept on disk: one writer at a time, and a full disk in one line."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.errors import UserError

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
  """Holds the right to write `path` (by a lock on a file beside it, which dies with its process).

  Whoever holds it may delete what an earlier writer of `path` left half done: that one is dead.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.with_name(f"{path.name}.lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def disk_errors_reported(directory: Path, bytes_needed: Callable[[], int]) -> Iterator[None]:
  """Turns the errors of a disk that is full or not ours to write on into one line.

  Raises:
    UserError: names the directory, and for a full disk the bytes needed and those free.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:
    number = getattr(error, "errno", None)
    # ArrayRecord's writer raises a RuntimeError with the system's words in it.
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
      raise UserError(
        f"the disk of {directory} is full (data.cache_directory sets another): "
        f"about {bytes_needed():,} bytes needed, {_free_bytes(directory):,} free"
      ) from error
    if number in _REFUSALS:
      raise UserError(
        f"{directory} cannot be written (data.cache_directory sets another): {error.strerror}"
      ) from error
    raise


def _free_bytes(directory: Path) -> int:
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  return shutil.disk_usage(existing).free
