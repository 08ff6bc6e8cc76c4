"""Several processes: how they meet and part, and that their number changes nothing of a run."""

import concurrent.futures
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from experiments import metrics, processes
from experiments.errors import UserError
from tests.processes import (
  ROOT,
  Outcome,
  Program,
  end,
  free_port,
  kill,
  logged_step,
  wait_until,
)

STEPS = 40
FIELDS = {
  "model__mamba__implementation": "recurrent",
  "optim__name": "adamw",
  "optim__learning_rate": 1e-3,
  "model__D": 16,
  "data__T": 16,
  "data__mode": "streaming",
  "train__steps": STEPS,
  "eval__every_steps": 0,
  "eval__max_tokens": 256,
  "eval__final_max_tokens": 256,
  "eval__T": 16,
  "checkpoint__every_steps": 8,
  "sample__tokens": 1,
}


def start(scratch, workdir, count: int, others=None, **fields) -> list[subprocess.Popen]:
  """Starts run.py in so many processes, which have four devices together.

  `others` are the config fields of all but the first.
  """
  program, port = (
    Program(scratch, devices=4 // count, JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
    free_port(),
  )
  flags = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
  started = []
  for n in range(count):
    own = {**FIELDS, **fields, **((others or {}) if n else {})}
    given = [*flags, f"--process={n}"] if flags else []
    started.append(program.start(f"--workdir={workdir}", *given, **own))
  return started


def end_all(group: list[subprocess.Popen]) -> list[Outcome]:
  """Waits for the ends."""
  with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
    return list(pool.map(end, group))


def words(outcome: Outcome) -> str:
  """What a process has printed, and of what Gloo prints when processes connect only the numbers.

  Nothing silences Gloo, and it prints in pieces.
  """
  return re.sub(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected.*? is :", "", outcome.out)


def run(scratch, workdir, count: int, stop_after: int | None = None, **fields) -> list[Outcome]:
  """Runs processes to their good end, or until the last of them is asked to stop after a step."""
  group = start(scratch, workdir, count, **fields)
  if stop_after is not None:
    wait_until(group[-1], lambda: logged_step(workdir) >= stop_after)
    group[-1].send_signal(signal.SIGTERM)
  outcomes = end_all(group)
  assert [(outcome.status, outcome.err) for outcome in outcomes] == [(0, "")] * count, outcomes
  # One of them speaks for all.
  assert not any(re.search("[a-z]", words(outcome)) for outcome in outcomes[1:]), outcomes
  return outcomes


def losses(workdir: pathlib.Path) -> dict[int, float]:
  return {row["step"]: row["train/loss"] for row in metrics.read(workdir)}


@pytest.fixture(scope="module")
def reference(scratch):
  """What one process that nothing interrupted has measured."""
  run(scratch, scratch / "one-process", 1)
  return losses(scratch / "one-process")


@pytest.mark.slow
def test_killed_as_two_resumed_as_one_and_as_four(scratch, reference, tmp_path):
  group = start(scratch, tmp_path, 2)
  # A checkpoint has its name, a number, when all of it is there.
  saved = lambda: any(path.name.isdecimal() for path in (tmp_path / "checkpoints").glob("*"))
  wait_until(group[0], lambda: logged_step(tmp_path) >= 10 and saved())
  for process in group:
    kill(process)
  killed = logged_step(tmp_path)
  assert 10 <= killed < STEPS

  (alone,) = run(scratch, tmp_path, 1, stop_after=killed + 4)
  first = int(re.search(r"going on from the checkpoint at step (\d+)", alone.out)[1])
  stopped = int(re.search(r"stopped and saved at step (\d+)", alone.out)[1])
  assert 8 <= first <= killed < stopped < STEPS

  # Each of the four holds a quarter of the parameters.
  said = run(scratch, tmp_path, 4, mesh__data=1, mesh__fsdp=4)[0].out
  assert "4 x cpu (cpu) of 4 processes" in said
  assert f"going on from the checkpoint at step {stopped}" in said
  assert (tmp_path / "sample.txt").exists() and (tmp_path / "loss.png").exists()
  assert losses(tmp_path).keys() == reference.keys() == set(range(1, STEPS + 1))
  assert losses(tmp_path) == pytest.approx(reference, rel=0, abs=1e-6)


def test_a_signal_to_one_stops_all_at_the_same_step(scratch, reference, tmp_path):
  """Devices of both processes share rows here, and parameters."""
  mesh = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 4}
  said = run(scratch, tmp_path, 2, stop_after=5, **mesh)[0].out
  step = int(re.search(r"stopped and saved at step (\d+)", said)[1])
  assert 5 <= step < STEPS and logged_step(tmp_path) == step
  assert (tmp_path / "checkpoints" / str(step)).is_dir()
  found = losses(tmp_path)
  expected = {n: reference[n] for n in found}
  # The mesh changes the order of sums; other batches would change the first digits.
  assert found == pytest.approx(expected, rel=1e-4)


def test_the_failure_of_one_ends_all_with_a_line(scratch, tmp_path):
  program, port = Program(scratch, devices=2), free_port()
  flags = [f"--coordinator=localhost:{port}", "--processes=2"]
  group = [
    program.start(f"--workdir={workdir}", *flags, f"--process={n}", **FIELDS)
    for n, workdir in enumerate((tmp_path, "/proc/nowhere"))
  ]
  first, second = end_all(group)
  problem = "--workdir /proc/nowhere cannot be made: No such file or directory"
  assert (first.status, first.err) == (1, f"error: process 1 has failed: {problem}\n")
  assert (second.status, second.err) == (2, f"error: {problem}\n")


def test_processes_that_were_started_apart_end_with_a_line(scratch, tmp_path):
  problem = "model.vocab_size is 264 for process 0, 100 for process 1: start all processes with"
  for ended in end_all(start(scratch, tmp_path, 2, others={"model__vocab_size": 100})):
    # Whoever is first says it for itself, and to the other.
    assert ended.status in (1, 2) and problem in ended.err and ended.err.count("\n") == 1


def test_two_processes_in_one_program(tmp_path):
  """What tests/experiments/process_worker.py checks from within."""
  port = free_port()
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  command = [sys.executable, "-m", "tests.experiments.process_worker", f"localhost:{port}"]
  group = [
    subprocess.Popen(
      [*command, str(n), str(tmp_path)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for n in range(2)
  ]
  first, second = end_all(group)
  assert (first.status, second.status) == (0, 0), (first, second)
  assert "all is well\n" in first.out and "all is well\n" in second.out
  assert "checkpoint 3" in first.err and "is damaged" in first.err and second.err == ""


def test_one_process_is_nothing_to_set_up(monkeypatch):
  monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: pytest.fail())
  for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
    monkeypatch.setenv(name, "0")
  monkeypatch.setenv("SLURM_NTASKS", "1")
  processes.initialise({})
  monkeypatch.setenv("SLURM_NTASKS", "8")
  processes.initialise({"processes": "1"})


def test_a_cluster_is_joined_or_named(monkeypatch):
  for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
    monkeypatch.setenv(name, "0")
  monkeypatch.setenv("SLURM_NTASKS", "8")
  seen = []
  monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
  monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **given: seen.append(given))
  processes.initialise({})
  assert len(seen) == 1 and "coordinator_address" not in seen[0]

  def fail(**_):
    raise RuntimeError("no way\nto the coordinator")

  monkeypatch.setattr(processes.jax.distributed, "initialize", fail)
  with pytest.raises(
    UserError, match=r"SLURM speaks of .* \(no way to the coordinator\): give --c"
  ):
    processes.initialise({})
