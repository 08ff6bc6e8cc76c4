"""Every mistake of the user's, and every full disk, ends in one line and loses nothing."""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess

import pytest

from tests.processes import LONG, SHORT, assert_same_run, logged_step

pytestmark = pytest.mark.slow  # each starts whole programs

# Arguments, and what the one line must say. RUN is the finished packed run, NEW a fresh directory.
MISTAKES = {
  "unknown field": ("NEW", {"train__stepz": 3}, "did you mean config.train.steps"),
  "ill-typed field": ("NEW", {"model__D": "wide"}, "config.model.D"),
  "missing folder": ("NEW", {"data__name": "folder", "data__directory": "/nowhere"}, "/nowhere"),
  "no folder": ("NEW", {"data__name": "folder"}, "data.directory"),
  "empty corpus": ("NEW", {"data__name": "folder", "data__directory": "EMPTY"}, "no text"),
  "not UTF-8": ("NEW", {"data__name": "folder", "data__directory": "LATIN"}, "not UTF-8 at byte 3"),
  "unknown data": ("NEW", {"data__name": "nonesuch"}, "nonesuch"),
  "unknown data mode": ("NEW", {"data__mode": "shuffled"}, "packed, streaming"),
  "missing tokenizer": ("NEW", {"data__tokenizer": "no.model"}, "no.model"),
  "vocabulary too small": ("NEW", {"model__vocab_size": 100}, "model.vocab_size is 100"),
  "another vocabulary": ("RUN", {"model__vocab_size": 300}, "model.vocab_size is 300 here, 264"),
  "another width": ("RUN", {"model__D": 64}, "model.D is 64 here, 32"),
  "another optimizer": ("RUN", {"optim__name": "adamw"}, "optim.name is 'adamw' here, 'muon'"),
  "another data mode": ("RUN", {"data__mode": "streaming"}, "data.mode is 'streaming' here"),
  "an average begun late": ("RUN", {"train__ema_decay": 0.9}, "train.ema_decay is 0.9 here, 0.0"),
  "rows and devices": ("NEW", {"train__batch_size": 7}, "train.batch_size is 7"),
  "rows of the evaluation": ("NEW", {"eval__batch_size": 3}, "eval.batch_size is 3"),
  "T of 0": ("NEW", {"data__T": 0}, "data.T is 0, must be at least 1"),
  "no steps": ("NEW", {"train__steps": 0}, "train.steps is 0, must be at least 1"),
  "negative steps": ("NEW", {"train__steps": -3}, "train.steps is -3"),
  "negative learning rate": ("NEW", {"optim__learning_rate": -1.0}, "optim.learning_rate is -1.0"),
  "no checkpoints kept": ("NEW", {"checkpoint__keep_last": 0}, "checkpoint.keep_last is 0"),
  "no width": ("NEW", {"model__D": 0}, "model.D is 0"),
  "temperature": ("NEW", {"sample__temperature": -1.0}, "sample.temperature is -1.0"),
  "workdir is a file": ("FILE", {}, "FILE"),
  "workdir below a file": ("FILE/x", {}, "FILE"),
}
MISTAKEN_MODES = {
  "unknown mode": ("NEW", "dance", {}, "--mode is 'dance'"),
  "eval without a run": ("NEW", "eval", {}, "holds no run"),
  "sample without a run": ("NEW", "sample", {}, "holds no run"),
  "eval of another width": ("RUN", "eval", {"model__D": 64}, "model.D is 64 here, 32"),
  "nonsense": ("RUN", "eval", {"eval__checkpoint": "nonsense"}, "newest, best or the number"),
  "no such step": ("RUN", "sample", {"eval__checkpoint": 7}, "no checkpoint of step 7"),
  "temperature": ("RUN", "sample", {"sample__temperature": -1.0}, "sample.temperature is -1.0"),
}


@pytest.fixture(scope="session")
def mistakes(program, references, tmp_path_factory):
  """What came of all mistakes, two processes at a time: name -> (workdir, outcome)."""
  root = tmp_path_factory.mktemp("mistakes")
  references("packed")
  for name, content in {"EMPTY": b"", "LATIN": b"caf\xe9"}.items():
    (root / name).mkdir()
    (root / name / "text.txt").write_bytes(content)
  (root / "FILE").write_text("in the way")
  shutil.copytree(references("packed"), root / "RUN")
  cases = [(name, where, "train", fields) for name, (where, fields, _) in MISTAKES.items()]
  cases += [("mode: " + name, *case[:3]) for name, case in MISTAKEN_MODES.items()]

  def run(number_and_case):
    number, (name, where, mode, fields) = number_and_case
    workdir = root / (f"NEW-{number}" if where == "NEW" else where)
    made = {
      field: root / value if value in ("EMPTY", "LATIN") else value
      for field, value in fields.items()
    }
    fields = {**LONG, **made}
    return name, (workdir, program.run(f"--workdir={workdir}", f"--mode={mode}", **fields))

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return dict(pool.map(run, enumerate(cases)))


@pytest.mark.parametrize("name", [*MISTAKES, *("mode: " + name for name in MISTAKEN_MODES)])
def test_a_mistake_is_one_line(mistakes, name):
  workdir, outcome = mistakes[name]
  mode = name.removeprefix("mode: ")
  said = MISTAKEN_MODES[mode][-1] if name.startswith("mode: ") else MISTAKES[name][-1]
  assert outcome.status in (1, 2), outcome
  (line,) = outcome.err.splitlines()
  assert line.startswith("error: ") and said in line
  if workdir.name.startswith("NEW"):
    assert not workdir.exists()


def test_mistakes_lose_nothing(mistakes, references, program):
  workdir, _ = mistakes["another width"]
  original = references("packed")
  content = lambda root: {
    path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()
  }
  assert content(workdir) == content(original)


def test_a_missing_config_file_is_one_line(program):
  outcome = program.run("--config=configs/quickstrat.py")
  (line,) = outcome.err.splitlines()
  assert outcome.status == 2 and line.startswith("error: configs/quickstrat.py does not exist")


def test_a_run_that_diverges_says_where_it_stopped(program, tmp_path):
  outcome = program.run(
    f"--workdir={tmp_path}", optim__learning_rate=1e30, train__max_skipped=4, **SHORT
  )
  assert outcome.status == 1
  (line,) = outcome.err.splitlines()
  assert line.startswith("error: stopped at step ") and "train.max_skipped" in line
  assert logged_step(tmp_path) <= 20


@pytest.fixture
def small_disk(tmp_path):
  """Mounts a file system of so many KiB, or changes its size."""
  place = tmp_path / "disk"
  place.mkdir()

  def mount(options: str) -> pathlib.Path:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
      pytest.skip("only root may mount a small disk")
    return place

  yield mount
  while os.path.ismount(place):
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
  program, references, small_disk
):
  disk = small_disk("size=400k")
  arguments = (f"--workdir={disk}/run",)
  outcome = program.run(*arguments, data__mode="packed", **LONG)
  assert outcome.status == 1, outcome
  (line,) = outcome.err.splitlines()
  assert line.startswith("error: ") and "space" in line and str(disk) in line
  small_disk("remount,size=50m")
  program.train(disk / "run", data__mode="packed", **LONG)
  assert_same_run(disk / "run", references("packed"))
  subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
  outcome = program.run(*arguments, data__mode="packed", **LONG)
  (line,) = outcome.err.splitlines()
  assert outcome.status in (1, 2) and line.startswith("error: ") and str(disk) in line


def test_a_full_disk_for_prepared_data_is_one_line(program, small_disk, tmp_path):
  disk = small_disk("size=200k")
  workdir = tmp_path / "workdir"
  outcome = program.run(f"--workdir={workdir}", data__cache_directory=disk)
  (line,) = outcome.err.splitlines()
  assert outcome.status in (1, 2) and "data.cache_directory" in line and str(disk) in line
  assert not workdir.exists()
