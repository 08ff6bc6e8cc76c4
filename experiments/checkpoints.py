"""Checkpoints that survive crashes, full disks and flipped bits. The one file that knows of orbax.

A checkpoint `<directory>/<step>` holds the train state, and a record: what each array is and its
checksum, the state of the data pipeline, metrics, and times. The record has a checksum of its own.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import io
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import processes
from experiments.checksums import checksums
from experiments.errors import UserError
from experiments.rules import path_name

# Orbax logs a traceback of each save that fails; this file says the same in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
# So does the event loop of its readers, which knows them by these names only.
logging.getLogger("asyncio").addFilter(
  lambda record: not re.search("orbax|tensorstore|OCDBT", record.getMessage())
)
_unraisable = sys.unraisablehook


def _without_orbax(unraisable):
  """What Python prints of exceptions that nobody waits for, but for reads that orbax left behind
  when another had failed: they are found as garbage, whenever that is collected."""
  code = getattr(unraisable.object, "cr_code", None)
  if code is None or "orbax" not in code.co_filename:
    _unraisable(unraisable)


sys.unraisablehook = _without_orbax

# What orbax, tensorstore and JSON raise for files that are missing, cut short or scrambled. A
# device out of memory (JaxRuntimeError) is not among them: it says nothing about the checkpoint.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
UNWRITABLE = (OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read back.

  Attributes:
    step: Its step.
    state: The train state, with the shardings that were asked for.
    data_state: What process 0 saved of the data pipeline.
  """

  step: int
  state: Any
  data_state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Fact:
  """What retention needs to know of a checkpoint: `hour` counts in units of keep_every_hours."""

  score: float | None
  hour: int


class Checkpoints:
  """The checkpoints of one run.

  Saving is asynchronous: `save` returns when the state is copied to the host, so that its buffers
  may be donated, and a thread writes the files.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep_last: int,
    keep_best: int,
    keep_every_hours: float,
    best_metric: str = "validation/bits_per_byte",
    read_only: bool = False,
  ):
    """Opens a directory, and removes what interrupted saves left there.

    Args:
      directory: Where the checkpoints lie; made if need be.
      keep_last: Newest checkpoints kept, at least 1.
      keep_best: Best checkpoints kept, by the lowest `best_metric`; others do not compete.
      keep_every_hours: The first checkpoint of each such span after the run's beginning is kept for
        ever; 0 keeps none so.
      best_metric: Key of the metrics given to `save`.
      read_only: Touch nothing: for programs that read a run which may still be training.

    Raises:
      ValueError: A number is out of its range.
    """
    for name, value, least in (
      ("keep_last", keep_last, 1),
      ("keep_best", keep_best, 0),
      ("keep_every_hours", keep_every_hours, 0),
    ):
      if value < least:
        raise ValueError(f"checkpoint.{name} is {value}; it must be at least {least}")
    self.directory = pathlib.Path(directory).absolute()
    self._keep_last = keep_last
    self._keep_best = keep_best
    self._keep_every_hours = keep_every_hours
    self._best_metric = best_metric
    self._read_only = read_only
    self._saving: int | None = None
    _return_large_blocks()
    self._manager = self._open()
    # Where processes read together, orbax waits within for one that has met damage, and for ever.
    self._reader = self._open(alone=True) if processes.several() else self._manager
    # Times of the first process: all must find the same checkpoints worth keeping.
    self._began = processes.that_of_first(time.time())
    self._facts: dict[int, _Fact] = {}
    for step in self.steps():
      record = self._record(step)
      if isinstance(record, dict):
        self._began = min(self._began, record["began"])
        self._note(step, record)

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, the oldest first."""
    return sorted(step for step in self._manager.all_steps() if step != self._saving)

  def best(self) -> int | None:
    """The step with the lowest `best_metric`, the newest of equals; None if none has it."""
    ranked = _ranked(self._facts, self.steps())
    return ranked[0] if ranked else None

  def save(
    self,
    step: int,
    state: Any,
    data_state: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
    *,
    wait: bool = False,
  ) -> None:
    """Saves a step; one that is saved already is left as it is.

    Args:
      step: Optimizer steps done.
      state: A tree of arrays. It may be donated as soon as this returns.
      data_state: What the data pipeline needs to go on, of JSON's types: the same on every process,
        whatever their number. That of process 0 is kept.
      metrics: Measured at this step; `best_metric` among them lets the checkpoint compete.
      wait: Return when the files are written.

    Raises:
      UserError: This save, or the one before it, could not be written. Older ones are intact.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    state = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), state)
    self._require_space(step, state)
    record = {
      "arrays": {
        name: {**description, "checksum": checksum}
        for (name, description), checksum in zip(
          _describe(state).items(), checksums(state).values(), strict=True
        )
      },
      # A list because checkpoints once held the state of each process.
      "data": [data_state],
      "metrics": {key: float(value) for key, value in (metrics or {}).items()},
      "saved": processes.that_of_first(time.time()),
      "began": self._began,
    }
    self._note(step, record)
    self._saving = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(_sealed(record))
        ),
      )
    except UNWRITABLE as error:
      raise self._failure(error) from None
    if wait:
      self.wait()

  def wait(self) -> None:
    """Returns when the files of the last save are written.

    Raises:
      UserError: They could not be.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except UNWRITABLE as error:
      raise self._failure(error) from None
    self._saving = None

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
    """Reads the newest checkpoint that is sound, or the one of `step`.

    A checkpoint that cannot be read, or whose checksums are wrong, is named on stderr and the one
    before it is tried. When a sound one is found, the newer ones are moved aside, to
    `<step>.corrupt`, so that their steps can be saved again; nothing is ever deleted here.

    Args:
      abstract_state: A tree of jax.ShapeDtypeStruct with the shardings to restore to.
      step: The one checkpoint to read; None takes the newest.

    Returns:
      The checkpoint, or None where there is none.

    Raises:
      UserError: There are checkpoints, but none is sound; or there is none of `step`; or the
        checkpoint is of another model than `abstract_state`.
    """
    self.wait()
    steps = self.steps()
    if step is not None and step not in steps:
      there = ", ".join(map(str, steps)) or "none"
      raise UserError(f"{self.directory} has no checkpoint of step {step}; there are {there}")
    if not steps:
      return None
    damaged = []
    for candidate in reversed(steps) if step is None else [step]:
      found = self._read(candidate, abstract_state)
      if isinstance(found, Restored):
        self._set_aside(damaged)
        return found
      _warn(f"checkpoint {candidate} in {self.directory} is damaged: {found}")
      damaged.append(candidate)
    tried = ", ".join(map(str, sorted(damaged)))
    raise UserError(f"no checkpoint in {self.directory} can be read (tried {tried})")

  def close(self) -> None:
    """Finishes the last save and lets go of the directory.

    Raises:
      UserError: The save could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()
      if self._reader is not self._manager:
        self._reader.close()

  def _open(self, alone: bool = False) -> ocp.CheckpointManager:
    """Opens the directory for all processes together, or for this one, which then only reads."""
    index = jax.process_index()
    mine = ocp.options.MultiprocessingOptions(
      primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process-{index}"
    )
    read_only = self._read_only or alone
    return ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Retention(self._kept),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not alone,
        multiprocessing_options=mine if alone else ocp.options.MultiprocessingOptions(),
      ),
    )

  def _kept(self, steps: Sequence[int]) -> set[int]:
    kept = set(steps[-self._keep_last :])
    kept.update(_ranked(self._facts, steps)[: self._keep_best])
    hours = set()
    for step in steps:
      hour = self._facts[step].hour if step in self._facts else 0
      if hour and hour not in hours:
        hours.add(hour)
        kept.add(step)
    return kept

  def _note(self, step: int, record: dict) -> None:
    score = record["metrics"].get(self._best_metric)
    hour = 0
    if self._keep_every_hours:
      hour = int((record["saved"] - record["began"]) / 3600 / self._keep_every_hours)
    self._facts[step] = _Fact(score if score is None or np.isfinite(score) else None, hour)

  def _record(self, step: int) -> dict | str:
    """The record of a checkpoint, or why there is none."""
    try:
      sealed = self._reader.restore(
        step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
      ).record
      record = sealed["record"]
      if sealed != _sealed(record):
        return "its record has been altered"
    except UNREADABLE as error:
      return _brief(error)
    return record

  def _read(self, step: int, abstract_state: Any) -> Restored | str:
    """A checkpoint, or what is wrong with its files. Another model's checkpoint is a UserError."""
    record = self._record(step)
    if not processes.all_agree(isinstance(record, dict)):
      return record if isinstance(record, str) else "another process cannot read it"
    difference = _first_difference(record["arrays"], _describe(abstract_state))
    if difference:
      raise UserError(f"checkpoint {step} in {self.directory} is of another model: {difference}")
    state, problem = None, None
    wanted = ocp.args.StandardRestore(_placed(abstract_state))
    # When an array is damaged, orbax leaves its other reads behind, and each prints a traceback of
    # its own: in a thread of tensorstore, a moment later, or as garbage when the error is gone.
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
      try:
        state = self._reader.restore(step, args=ocp.args.Composite(state=wanted)).state
      except Exception as error:
        # An array that cannot be read is a bare Exception in orbax, and only that class means it.
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
          raise
        problem = _brief(error)
      if problem:
        gc.collect()
        time.sleep(1)
    if not problem:
      sys.stderr.write(printed.getvalue())
    if not processes.all_agree(problem is None):
      return problem or "another process cannot read it"
    misread = _first_difference(_describe(state), _describe(abstract_state))
    if misread:
      return f"its description of the arrays is damaged: {misread}"
    for name, checksum in checksums(state).items():
      if checksum != record["arrays"][name]["checksum"]:
        return f"the checksum of {name} is wrong"
    return Restored(step, state, record["data"][0])

  def _set_aside(self, steps: Sequence[int]) -> None:
    if not steps or self._read_only:
      return
    if processes.is_first():
      for step in steps:
        aside, number = self.directory / f"{step}.corrupt", 1
        while aside.exists():
          number += 1
          aside = self.directory / f"{step}.corrupt-{number}"
        (self.directory / str(step)).rename(aside)
        _warn(f"checkpoint {step} is kept as {aside}")
    processes.all_agree(True)  # once they are set aside
    self._manager.reload()

  def _require_space(self, step: int, state: Any) -> None:
    """Raises UserError where the disk cannot hold the step: orbax takes a full disk hard."""
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) // jax.process_count()
    free = shutil.disk_usage(self.directory).free
    if not processes.all_agree(free >= needed):
      raise UserError(
        f"checkpoint {step} needs {needed / 2**20:.1f} MiB in {self.directory}, which has"
        f" {free / 2**20:.1f} MiB left: no space left on device; older checkpoints are intact",
        status=1,
      )

  def _failure(self, error: Exception) -> UserError:
    step, self._saving = self._saving, None
    self._facts.pop(step, None)
    return UserError(
      f"checkpoint {step} cannot be written to {self.directory}: {_brief(error)}; "
      "older checkpoints are intact",
      status=1,
    )


class _Retention:
  """Tells orbax which checkpoints to keep, by a function of their steps."""

  def __init__(self, kept):
    self._kept = kept

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    kept = self._kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]


def _ranked(facts: Mapping[int, _Fact], steps: Sequence[int]) -> list[int]:
  """The steps that have a score, the best first, the newest first among equals."""
  scored = [step for step in steps if step in facts and facts[step].score is not None]
  return sorted(scored, key=lambda step: (facts[step].score, -step))


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
  """Path -> shape and dtype of each array, in JSON's types."""
  return {
    path_name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _first_difference(saved: Mapping[str, dict], wanted: Mapping[str, dict]) -> str | None:
  """In what the two trees differ first, in words."""

  def words(array: Mapping[str, Any] | None) -> str:
    return f"{array['dtype']}{array['shape']}" if array else "absent"

  for name in [*wanted, *(name for name in saved if name not in wanted)]:
    there, here = words(saved.get(name)), words(wanted.get(name))
    if there != here:
      return f"{name} is {there} there, {here} here"
  return None


def _placed(abstract_state: Any) -> Any:
  """The abstract state, with arrays that have no sharding put on the first device."""
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract_state
  )


def _sealed(record: dict) -> dict:
  text = json.dumps(record, sort_keys=True)
  return {"record": json.loads(text), "crc32": zlib.crc32(text.encode())}


def _brief(error: Exception) -> str:
  """An exception in a few words, those of its first cause."""
  while error.__cause__ is not None:
    error = error.__cause__
  # Tensorstore appends long details in brackets.
  message = re.sub(r" \[(tensorstore_spec|source locations)=.*", "", " ".join(str(error).split()))
  if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in message:
    return "no space left on device"
  if not isinstance(error, OSError | ValueError):
    message = f"{type(error).__name__} {message}"
  return message if len(message) <= 160 else f"{message[:50]} ... {message[-105:]}"


@functools.cache
def _return_large_blocks() -> None:
  """Lets glibc give freed blocks of a mebibyte and more back to the system at once.

  Left to itself it raises that bound to 32 MiB, and since each save writes from new threads, all of
  its arenas come to hoard buffers of a checkpoint: a slow growth that looks like a leak.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    M_MMAP_THRESHOLD = -3
    mallopt(M_MMAP_THRESHOLD, 2**20)


def _warn(message: str) -> None:
  if processes.is_first():
    print(message, file=sys.stderr, flush=True)
