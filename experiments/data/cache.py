"""What is computed once and kept on disk: one writer at a time, and a full disk in one line."""

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.errors import UserError


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
def full_disk_reported(directory: Path, bytes_needed: Callable[[], int]) -> Iterator[None]:
  """Turns "no space left" and "not allowed here" into a message that names the directory.

  Raises:
    UserError: the directory cannot be written to.
  """
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"data.cache_directory: the disk is full at {directory}: about {bytes_needed():,} bytes "
        f"needed, {_free_bytes(directory):,} free"
      ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
      raise UserError(
        f"data.cache_directory: cannot write to {directory}: {error.strerror}"
      ) from error
    raise


def require_space(directory: Path, bytes_needed: int) -> None:
  """Raises UserError where `directory`'s disk has less than `bytes_needed` left."""
  free = _free_bytes(directory)
  if free < bytes_needed:
    raise UserError(
      f"data.cache_directory: the disk is full at {directory}: about {bytes_needed:,} bytes "
      f"needed, {free:,} free"
    )


def _free_bytes(directory: Path) -> int:
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  return shutil.disk_usage(existing).free
