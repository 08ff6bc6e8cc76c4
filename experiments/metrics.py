"""What a run says about itself: metrics.jsonl, TensorBoard events, a progress line, a clock."""

import collections.abc
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

from experiments import processes
from experiments.errors import UserError

FILE_NAME = "metrics.jsonl"

# Dense bfloat16 peak of one JAX device, FLOP/s, from data sheets, by words of the device
# kind; the first that fits counts. A TPU7x chip has 2307e12 and shows up as two devices.
PEAK_FLOPS = {
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H100": 989.4e12,
  "H200 NVL": 835e12,
  "GH200": 989.4e12,
  "H200": 989.4e12,
  "GB200": 2500e12,
  "B200": 2250e12,
  "A100": 312e12,
  "L40S": 362e12,
  "L4": 121e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
}


class Metrics:
  """The run's log: one JSON object per logged step in metrics.jsonl, and TensorBoard events.

  Each line has left the program when `write` returns. In a run of several processes only the first
  one writes. A line that a killed run left half-written is dropped when the log is opened again.
  """

  def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = True):
    """Opens the log of `workdir`, which is made if need be.

    Args:
      workdir: The run's directory.
      tensorboard: Also write events, if tensorboardX is installed.
    """
    self.path = pathlib.Path(workdir) / FILE_NAME
    self._writes = processes.is_first()
    self._tensorboard = tensorboard and importlib.util.find_spec("tensorboardX") is not None
    self._events = None
    self._purge_step: int | None = None
    self._file = None
    if self._writes:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._rewrite(lambda row: True)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Logs one step.

    Args:
      step: Optimizer steps done.
      values: Key -> number (or a scalar array), string, or None. A number that is not finite
        becomes null, for JSON knows no NaN.
    """
    if not self._writes:
      return
    row = {"step": int(step), **{key: _plain(value) for key, value in values.items()}}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    if self._tensorboard:
      self._to_tensorboard(row)

  def rewind(self, step: int) -> None:
    """Forgets what was logged after `step`, as a run does that goes on from an older checkpoint."""
    if self._writes:
      self._rewrite(lambda row: row["step"] <= step)
      self._close_events()
      self._purge_step = step + 1

  def close(self) -> None:
    """Closes the files; nothing can be written afterwards."""
    try:
      if self._file is not None:
        self._file.close()
    finally:
      self._close_events()

  def _rewrite(self, keep: collections.abc.Callable[[dict], bool]) -> None:
    """Leaves the kept lines, in one step, and goes on behind them."""
    if self._file is not None:
      self._file.close()
    if self.path.exists():
      text = self.path.read_text()
      kept = "".join(json.dumps(row) + "\n" for row in read(self.path) if keep(row))
      if kept != text:
        scratch = self.path.with_name(FILE_NAME + ".tmp")
        with scratch.open("w") as file:
          file.write(kept)
          file.flush()
          os.fsync(file.fileno())
        os.replace(scratch, self.path)
    self._file = self.path.open("a")

  def _to_tensorboard(self, row: Mapping[str, Any]) -> None:
    if self._events is None:
      from tensorboardX.event_file_writer import EventsWriter

      # Not SummaryWriter: its thread dies of a full disk, and the program then waits for ever.
      # File names count seconds: without a suffix, two sessions within one second would share one.
      self._events = EventsWriter(str(self.path.parent / "events"), f".{time.time_ns()}")
      if self._purge_step is not None:
        # Readers drop what earlier files hold from this step on.
        self._write_event(self._purge_step, session_log={"status": "START"})
    scalars = [
      {"tag": key, "simple_value": value}
      for key, value in row.items()
      if key != "step" and isinstance(value, int | float)
    ]
    self._write_event(row["step"], summary={"value": scalars})
    self._events.flush()

  def _write_event(self, step: int, **content: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._events.write_event(Event(wall_time=time.time(), step=step, **content))

  def _close_events(self) -> None:
    events, self._events = self._events, None
    if events is not None:
      events.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl (or of the run directory that holds one), the oldest first.

  A half-written last line is left out.

  Raises:
    UserError: There is no such file, or a line other than the last is no JSON object with a step.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  if not path.exists():
    raise UserError(f"{path} does not exist")
  # What follows the last newline is nothing, unless a write was cut short.
  *lines, _ = path.read_text().split("\n")
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      raise UserError(f"{path} line {number} is not JSON: {line[:80]!r}") from None
    if not isinstance(row, dict) or "step" not in row:
      raise UserError(f"{path} line {number} has no step: {line[:80]!r}")
    rows.append(row)
  return rows


def _plain(value: Any) -> Any:
  """A JSON value of a number, a scalar array, a string or None."""
  if value is None or isinstance(value, str | bool | int):
    return value
  number = value.item() if hasattr(value, "item") else value
  if isinstance(number, float) and not math.isfinite(number):
    return None
  return number


class Clock:
  """Time spent training, and nothing else.

  The clock starts at the end of the first step, which compiles, and stands still in `pause`.

      clock.tick(tokens)                # after every step
      with clock.pause(loss): ...       # around evaluations and checkpoints
      clock.lap()                       # tokens/s since the last lap, for the log
  """

  def __init__(self, now: collections.abc.Callable[[], float] = time.perf_counter):
    """`now` returns seconds."""
    self._now = now
    self._running_since: float | None = None
    self._seconds = 0.0
    self._lap_seconds = 0.0
    self._lap_tokens = 0
    self.tokens = 0
    self.steps = 0

  @property
  def seconds(self) -> float:
    """Seconds of training so far, the first step excluded."""
    running = 0.0 if self._running_since is None else self._now() - self._running_since
    return self._seconds + running

  def tick(self, tokens: int) -> None:
    """Notes that one more step, of so many tokens over all devices, is done."""
    if self._running_since is None:
      self._running_since = self._now()
      return
    self.tokens += tokens
    self.steps += 1

  @contextlib.contextmanager
  def pause(self, pending: Any = ()) -> Iterator[None]:
    """Stops the clock.

    Args:
      pending: Arrays of the last step. JAX computes behind the program's back, so the clock stops
        when they are there, or the pause would swallow training time.
    """
    jax.block_until_ready(pending)
    if self._running_since is None:
      yield
      return
    self._seconds = self.seconds
    self._running_since = None
    try:
      yield
    finally:
      self._running_since = self._now()

  def lap(self) -> float | None:
    """Tokens per second since the last call, or since the start; None before the second step."""
    seconds, tokens = self.seconds - self._lap_seconds, self.tokens - self._lap_tokens
    if not tokens or seconds <= 0:
      return None
    self._lap_seconds, self._lap_tokens = self.seconds, self.tokens
    return tokens / seconds

  def eta(self, steps_left: int) -> float | None:
    """Seconds of training still to come, at the mean pace so far; None before the second step."""
    return self.seconds / self.steps * steps_left if self.steps else None


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 peak of one device in FLOP/s; None where it is not known, as for a CPU."""
  if device.platform == "cpu":
    return None
  kind = device.device_kind
  fits = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind))
  return next(fits, None)


def resident_gib() -> float:
  """Memory of this process that lies in RAM, GiB; its peak where the system does not say."""
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
  # ru_maxrss is in bytes on macOS, the one system without /proc that JAX runs on.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def progress_line(
  step: int,
  total: int,
  *,
  said: str | None = None,
  speed: float | None = None,
  unit: str = "tokens",
  mfu: float | None = None,
  eta: float | None = None,
  learning_rate: float | None = None,
) -> str:
  """One line on where a run stands; what is None is left out.

  Args:
    step: Steps done.
    total: Steps in all.
    said: On the training loss, such as "1.983 bits/byte".
    speed: In units per second, over all devices.
    unit: What is counted.
    mfu: Model FLOP/s over peak FLOP/s, 0 to 1.
    eta: Seconds to go.
    learning_rate: Of the last step.

  Returns:
    Such as "step  1200/3000   1.983 bits/byte   154k tokens/s   MFU 31%   lr 1.2e-03   4:10 left".
  """
  parts = [f"step {step:>{len(str(total))}}/{total}"]
  if said is not None:
    parts.append(said)
  if speed is not None:
    parts.append(f"{_short(speed)} {unit}/s")
  if mfu is not None:
    parts.append(f"MFU {100 * mfu:.0f}%" if mfu >= 0.0995 else f"MFU {100 * mfu:.1f}%")
  if learning_rate is not None:
    parts.append(f"lr {learning_rate:.1e}")
  if eta is not None:
    parts.append(f"{_duration(eta)} left")
  return "   ".join(parts)


class Progress:
  """Shows progress lines: on a terminal one line that is rewritten, elsewhere a line now and then.

  `say` prints what should stay, without tearing the line that is being rewritten. In a run of
  several processes only the first one prints.
  """

  def __init__(
    self,
    stream: TextIO | None = None,
    *,
    every_seconds: float = 10.0,
    now: collections.abc.Callable[[], float] = time.monotonic,
  ):
    """Shows progress on `stream`, standard output by default.

    Args:
      stream: Where to print.
      every_seconds: The least time between lines where the stream is not a terminal.
      now: Seconds.
    """
    self._stream = stream or sys.stdout
    self._every = every_seconds
    self._now = now
    self._last: float | None = None
    self._width = 0
    self._terminal = self._stream.isatty()
    self._prints = processes.is_first()

  def show(self, line: str, *, last: bool = False) -> None:
    """Shows a progress line; the `last` one is always shown, and stays."""
    if not self._prints:
      return
    if self._terminal:
      # Blanks cover what is left of a longer line before.
      print("\r" + line.ljust(self._width), end="\n" if last else "", file=self._stream, flush=True)
      self._width = 0 if last else len(line)
    elif last or self._last is None or self._now() - self._last >= self._every:
      print(line, file=self._stream, flush=True)
      self._last = self._now()

  def say(self, message: str) -> None:
    """Prints a line that stays."""
    if not self._prints:
      return
    if self._width:
      print("\r" + " " * self._width + "\r", end="", file=self._stream)
      self._width = 0
    print(message, file=self._stream, flush=True)


def _short(number: float) -> str:
  """Three significant digits: 154k, 1.54M."""
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    # 999.6k would otherwise be written 1000k.
    if number >= 0.9995 * size:
      scaled = number / size
      return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
  return f"{number:.0f}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
