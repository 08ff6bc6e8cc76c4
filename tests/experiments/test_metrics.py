"""The log survives kills and restarts, the clock counts training only, progress is readable."""

import io
import types

import jax.numpy as jnp
import pytest

from experiments import metrics
from experiments.errors import UserError
from experiments.metrics import Clock, Metrics, Progress, peak_flops, progress_line


def test_writes_rows_that_are_there_at_once(tmp_path):
  log = Metrics(tmp_path / "new" / "run", tensorboard=False)
  log.write(1, {"train/loss": 2.5, "train/skipped": 0})
  log.write(2, {"train/loss": jnp.float32(0.5), "note": "a\nb", "nothing": None})
  # The log is still open: what is read here was flushed.
  assert (tmp_path / "new/run/metrics.jsonl").read_text() == (
    '{"step": 1, "train/loss": 2.5, "train/skipped": 0}\n'
    '{"step": 2, "train/loss": 0.5, "note": "a\\nb", "nothing": null}\n'
  )
  assert metrics.read(tmp_path / "new/run") == metrics.read(tmp_path / "new/run/metrics.jsonl")
  assert metrics.read(log.path)[1]["note"] == "a\nb"
  log.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), jnp.float32(jnp.nan)])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
  log = Metrics(tmp_path, tensorboard=False)
  log.write(1, {"x": value})
  assert log.path.read_text() == '{"step": 1, "x": null}\n'


def test_rewind_and_half_written_lines(tmp_path):
  log = Metrics(tmp_path, tensorboard=False)
  for step in (5, 10, 15, 20):
    log.write(step, {"x": step / 3})
  log.close()
  with log.path.open("a") as file:
    file.write('{"step": 25, "x": 8.3')
  assert [row["step"] for row in metrics.read(tmp_path)] == [5, 10, 15, 20]
  log = Metrics(tmp_path, tensorboard=False)
  log.rewind(10)
  log.write(12, {"x": 1})
  assert metrics.read(tmp_path) == [
    {"step": 5, "x": 5 / 3},
    {"step": 10, "x": 10 / 3},
    {"step": 12, "x": 1},
  ]
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_opening_again_repairs_a_half_written_line(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
  Metrics(tmp_path, tensorboard=False).write(2, {})
  assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]


def test_a_rewind_that_is_killed_loses_nothing(tmp_path, monkeypatch):
  log = Metrics(tmp_path, tensorboard=False)
  for step in (1, 2, 3):
    log.write(step, {})

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    log.rewind(1)
  assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_unreadable_logs_are_named(tmp_path):
  with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
    metrics.read(tmp_path)
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\noops\n{"step": 2}\n')
  with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not JSON: 'oops'"):
    metrics.read(path)
  path.write_text('{"loss": 1}\n')
  with pytest.raises(UserError, match=r"line 1 has no step"):
    metrics.read(path)


def test_other_processes_do_not_write(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  log = Metrics(tmp_path / "run")
  log.write(1, {"x": 1.0})
  log.rewind(0)
  log.close()
  assert not (tmp_path / "run").exists()


def test_tensorboard_events_are_purged_on_rewind(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  log = Metrics(tmp_path)
  for step in (1, 2, 3):
    log.write(step, {"train/loss": float(step), "note": "words", "bad": float("nan")})
  log.rewind(1)
  log.write(2, {"train/loss": 20.0})
  log.close()

  def events(path):
    # A record is a length of 8 bytes, its checksum of 4, the event, and the event's checksum of 4.
    content, place = path.read_bytes(), 0
    while place < len(content):
      size = int.from_bytes(content[place : place + 8], "little")
      yield Event.FromString(content[place + 12 : place + 12 + size])
      place += size + 16

  files = sorted(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
  assert len(files) == 2
  first, second = ([event for event in events(path)] for path in files)
  scalars = [
    (event.step, value.tag, value.simple_value) for event in first for value in event.summary.value
  ]
  assert scalars == [(1, "train/loss", 1.0), (2, "train/loss", 2.0), (3, "train/loss", 3.0)]
  starts = [event.step for event in second if event.session_log.status == SessionLog.START]
  assert starts == [2]


class Time:
  """A clock that is set by hand."""

  def __init__(self):
    self.seconds = 100.0

  def __call__(self):
    return self.seconds


def test_clock_counts_training_only():
  now = Time()
  clock = Clock(now)
  assert clock.lap() is None and clock.eta(5) is None
  now.seconds += 60  # compiles
  with clock.pause():
    now.seconds += 1000  # an evaluation before the first step
  clock.tick(10)
  assert clock.seconds == 0 and clock.lap() is None and clock.eta(5) is None
  for _ in range(4):
    now.seconds += 2
    clock.tick(10)
  with clock.pause(jnp.ones(3)):
    now.seconds += 1000
    assert clock.seconds == 8
  assert clock.seconds == 8 and clock.tokens == 40 and clock.steps == 4
  assert clock.lap() == 5.0
  assert clock.lap() is None
  for _ in range(2):
    now.seconds += 1
    clock.tick(10)
  assert clock.lap() == 10.0
  assert clock.eta(12) == pytest.approx(12 * 10 / 6)


def test_clock_goes_on_after_a_pause_that_fails():
  now = Time()
  clock = Clock(now)
  clock.tick(1)
  with pytest.raises(ZeroDivisionError), clock.pause():
    now.seconds += 5
    raise ZeroDivisionError
  now.seconds += 3
  assert clock.seconds == 3


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", None),
    ("Tesla V100-SXM2-16GB", None),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
  ],
)
def test_peak_flops(kind, peak):
  assert peak_flops(types.SimpleNamespace(platform="gpu", device_kind=kind)) == peak


def test_peak_flops_of_a_cpu_is_unknown():
  assert peak_flops(metrics.jax.devices("cpu")[0]) is None


def test_progress_line():
  assert progress_line(1200, 3000) == "step 1200/3000"
  line = progress_line(
    70,
    3000,
    said="1.983 bits/byte",
    speed=153_600.0,
    mfu=0.314,
    eta=3725.4,
    learning_rate=1.2e-3,
  )
  assert line == (
    "step   70/3000   1.983 bits/byte   154k tokens/s   MFU 31%   lr 1.2e-03   1:02:05 left"
  )
  rates = {12.4: "12", 999.4: "999", 1000: "1.00k", 9996: "10.0k", 99_960: "100k", 999_600: "1.00M"}
  for rate, words in rates.items():
    assert progress_line(1, 2, speed=rate, unit="cells").endswith(f" {words} cells/s")
  assert progress_line(1, 2, mfu=0.031).endswith("MFU 3.1%")
  assert progress_line(1, 2, eta=59.7).endswith(" 1:00 left")


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_rewrites_one_line_of_a_terminal():
  stream = Terminal()
  progress = Progress(stream)
  progress.show("a long line")
  progress.show("short")
  progress.say("saved")
  progress.show("done", last=True)
  progress.say("bye")
  assert stream.getvalue() == ("\ra long line\rshort      \r     \rsaved\n\rdone\nbye\n")


def test_progress_prints_a_line_now_and_then_elsewhere():
  now, stream = Time(), io.StringIO()
  progress = Progress(stream, every_seconds=10, now=now)
  for step in range(25):
    progress.show(f"step {step}", last=step == 24)
    now.seconds += 1
  progress.say("done")
  assert stream.getvalue() == "step 0\nstep 10\nstep 20\nstep 24\ndone\n"


def test_resident_memory_follows_what_is_held():
  before = metrics.resident_gib()
  held = b"x" * 2**28
  assert 0.2 < metrics.resident_gib() - before < 0.3
  assert len(held) == 2**28
