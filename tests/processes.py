"""The program as a user starts it: real processes, what they say, how they end, what they leave."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from experiments import configuration, metrics, sharding, train_step
from experiments.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 120  # longer than any of these processes takes

STEPS = 200
LONG = {
  "train__steps": STEPS,
  "eval__every_steps": 30,
  "eval__max_tokens": 1024,
  "eval__final_max_tokens": 2048,
  "checkpoint__every_steps": 20,
  "sample__tokens": 8,
}
SHORT = {"eval__max_tokens": 512, "eval__final_max_tokens": 512, "sample__tokens": 8}

# These say how fast a machine was, and differ from run to run.
MEASURED = ("train/tokens_per_second", "train/mfu", "host/resident_gib")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a process ended, and what it said."""

  status: int
  out: str
  err: str


class Program:
  """run.py on CPU devices, with caches of compiled programs and data that processes share."""

  def __init__(
    self,
    scratch: pathlib.Path,
    config: str = "configs/quickstart.py:tiny",
    devices: int = 2,
    **environment: str,
  ):
    self.cache = scratch / "data"
    self._config = config
    self._environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      **environment,
    }

  def start(self, *arguments: str, **fields) -> subprocess.Popen:
    """Starts a process; `fields` are config fields, with __ for the dots."""
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    if not any(argument.startswith("--config") for argument in arguments):
      arguments = (f"--config={self._config}", *arguments)
    if "data__cache_directory" not in fields:
      given.append(f"--config.data.cache_directory={self.cache}")
    return subprocess.Popen(
      [sys.executable, "run.py", *arguments, *given],
      cwd=ROOT,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
    )

  def run(self, *arguments: str, **fields) -> Outcome:
    """Runs a process to its end."""
    return end(self.start(*arguments, **fields))

  def train(self, workdir: pathlib.Path, **fields) -> str:
    """Trains to the end, which must be a good one without a word on stderr; returns the output."""
    outcome = self.run(f"--workdir={workdir}", **fields)
    assert (outcome.status, outcome.err) == (0, ""), outcome
    return outcome.out


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def end(process: subprocess.Popen) -> Outcome:
  """Waits for the end of a process."""
  try:
    out, err = process.communicate(timeout=SECONDS)
  finally:
    process.kill()
  return Outcome(process.returncode, out, err)


def wait_until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
  """Waits for something that a living process does."""
  deadline = time.monotonic() + SECONDS
  while not holds():
    assert process.poll() is None, f"ended too early: {end(process)}"
    assert time.monotonic() < deadline
    time.sleep(0.001)


def logged_step(workdir: pathlib.Path) -> int:
  """The last step in metrics.jsonl, 0 where there is none."""
  path = workdir / "metrics.jsonl"
  rows = metrics.read(path) if path.exists() else []
  return rows[-1]["step"] if rows else 0


def kill(process: subprocess.Popen) -> None:
  """kill -9; the process must have been alive, or nothing is proven."""
  process.send_signal(signal.SIGKILL)
  assert end(process).status == -signal.SIGKILL


def reproducible_rows(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what depends on the machine's mood."""
  rows = metrics.read(workdir)
  return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def saved_arrays(workdir: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
  """The newest checkpoint's step, and every array in it."""
  config = configuration.load(workdir / "config.json")
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=1, keep_every_hours=0, read_only=True
  )
  restored = checkpoints.restore(train_step.abstract_state(config, mesh))
  checkpoints.close()
  leaves = jax.tree_util.tree_leaves_with_path(restored.state)
  return restored.step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
  """The same metrics, step for step, and the same last checkpoint, bit for bit."""
  assert reproducible_rows(one) == reproducible_rows(other)
  step, arrays = saved_arrays(one)
  other_step, others = saved_arrays(other)
  assert step == other_step and arrays.keys() == others.keys()
  for name, array in arrays.items():
    assert array.dtype == others[name].dtype and array.tobytes() == others[name].tobytes(), name
