"""The program as a user runs it: killed, stopped, damaged, finished, and started again."""

import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from experiments import configuration, metrics, models
from lm_models import lm
from tests.processes import (
  LONG,
  SHORT,
  STEPS,
  assert_same_run,
  end,
  kill,
  logged_step,
  reproducible_rows,
  saved_arrays,
  wait_until,
)

pytestmark = pytest.mark.slow  # each starts whole programs


@pytest.mark.parametrize("mode", ["packed", "streaming"])
def test_a_run_killed_three_times_is_the_run_never_killed(program, references, tmp_path, mode):
  reference = references(mode)
  rng = np.random.default_rng(["packed", "streaming"].index(mode))
  start = lambda: program.start(f"--workdir={tmp_path}", data__mode=mode, **LONG)

  # Anywhere between the first import and the first steps.
  process = start()
  time.sleep(rng.uniform(0.5, 5.0))
  kill(process)
  # Anywhere in the steps, of which one in twenty saves and one in thirty evaluates.
  for first in (20, 110):
    step, delay = logged_step(tmp_path) + rng.integers(first, first + 60), rng.uniform(0, 0.1)
    process = start()
    wait_until(process, lambda step=step: logged_step(tmp_path) >= min(step, STEPS - 20))
    time.sleep(delay)
    kill(process)

  program.train(tmp_path, data__mode=mode, **LONG)
  assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, STEPS + 1))
  assert_same_run(tmp_path, reference)
  assert (tmp_path / "sample.txt").read_bytes() == (reference / "sample.txt").read_bytes()


def test_the_comparison_of_runs_sees_one_bit(references, packed):
  """What the test above relies on."""
  lines = (packed / "metrics.jsonl").read_text().splitlines()
  row = json.loads(lines[50])
  row["train/loss"] = float(np.nextafter(np.float32(row["train/loss"]), np.float32(9)))
  (packed / "metrics.jsonl").write_text("\n".join([*lines[:50], json.dumps(row), *lines[51:], ""]))
  assert reproducible_rows(packed) != reproducible_rows(references("packed"))
  step, arrays = saved_arrays(packed)
  assert step == STEPS and len(arrays) > 10
  rows = reproducible_rows(references("packed"))
  assert {"train/loss", "train/bits_per_byte", "train/gradient_norm", "train/learning_rate"} <= set(
    rows[0]
  )
  assert sum("validation/bits_per_byte" in row for row in rows) == STEPS // 30 + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(program, references, tmp_path, number):
  process = program.start(f"--workdir={tmp_path}", data__mode="packed", **LONG)
  wait_until(process, lambda: logged_step(tmp_path) >= 33)
  process.send_signal(number)
  outcome = end(process)
  step, _ = saved_arrays(tmp_path)
  assert (outcome.status, outcome.err) == (0, "")
  assert 33 <= step < STEPS
  said = f"stopped and saved at step {step}; the same command goes on from there"
  assert outcome.out.splitlines()[-1] == said
  assert logged_step(tmp_path) == step
  out = program.train(tmp_path, data__mode="packed", **LONG)
  assert f"going on from the checkpoint at step {step}" in out
  assert_same_run(tmp_path, references("packed"))


def test_a_signal_while_the_first_step_compiles_is_heeded(program, references, tmp_path):
  process = program.start(f"--workdir={tmp_path}", data__mode="packed", **LONG)
  for line in process.stdout:
    if "the first step compiles" in line:
      break
  process.send_signal(signal.SIGTERM)
  outcome = end(process)
  assert (outcome.status, outcome.err) == (0, "")
  assert "stopped" in outcome.out and "the same command goes on" in outcome.out
  assert logged_step(tmp_path) <= 2
  program.train(tmp_path, data__mode="packed", **LONG)
  assert_same_run(tmp_path, references("packed"))


def test_a_signal_during_a_validation_saves_first(program, tmp_path):
  """No save is due at that step, and none after it."""
  fields = {
    "train__steps": 1000,
    "eval__every_steps": 10,
    "eval__max_tokens": 100_000,
    "eval__T": 16,
    "checkpoint__every_steps": 0,
  }
  process = program.start(f"--workdir={tmp_path}", **fields)
  wait_until(process, lambda: logged_step(tmp_path) >= 9)
  time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  outcome = end(process)
  assert (outcome.status, outcome.err) == (0, "")
  step, _ = saved_arrays(tmp_path)
  assert f"stopped and saved at step {step}" in outcome.out
  assert step in (10, 11)


def test_a_signal_during_the_last_evaluation_leaves_the_run_complete(program, tmp_path):
  fields = {**SHORT, "eval__final_max_tokens": 200_000, "eval__T": 16}
  process = program.start(f"--workdir={tmp_path}", **fields)
  for line in process.stdout:
    if line.startswith("step 20: validation"):
      break
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  outcome = end(process)
  assert (outcome.status, outcome.err) == (0, "")
  assert outcome.out.splitlines()[-1].startswith("stopped and saved at step 20")
  assert saved_arrays(tmp_path)[0] == 20
  assert not (tmp_path / "sample.txt").exists()
  program.train(tmp_path, **SHORT)
  assert (tmp_path / "sample.txt").exists()


def _largest_file(directory: pathlib.Path) -> pathlib.Path:
  return max((path for path in directory.rglob("*") if path.is_file()), key=os.path.getsize)


def _truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
  program, references, packed, damage
):
  newest = packed / "checkpoints" / str(STEPS)
  damage(_largest_file(newest / "state" / "d"))
  outcome = program.run(f"--workdir={packed}", data__mode="packed", **LONG)
  assert outcome.status == 0, outcome
  damaged, kept = outcome.err.splitlines()
  assert f"checkpoint {STEPS} in {newest.parent} is damaged" in damaged
  assert kept.endswith(f"{STEPS}.corrupt") and (newest.parent / f"{STEPS}.corrupt").is_dir()
  before = outcome.out.split("going on from the checkpoint at step ")[1].split()[0]
  assert int(before) == STEPS - 20
  assert_same_run(packed, references("packed"))


def test_no_sound_checkpoint_ends_the_run_and_deletes_nothing(program, packed):
  for checkpoint in (packed / "checkpoints").iterdir():
    _truncate(_largest_file(checkpoint / "state" / "d"))
  before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
  outcome = program.run(f"--workdir={packed}", data__mode="packed", **LONG)
  assert outcome.status == 2
  *damaged, error = outcome.err.splitlines()
  assert all("is damaged" in line for line in damaged) and len(damaged) >= 2
  assert error.startswith(f"error: no checkpoint in {packed}/checkpoints can be read")
  after = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
  assert after == before


def test_eval_gives_the_numbers_of_the_end_of_the_run(program, references, packed):
  at_the_end = (references("packed") / "evaluation.json").read_bytes()
  (packed / "evaluation.json").unlink()
  for which in ("newest", STEPS):
    outcome = program.run(f"--workdir={packed}", "--mode=eval", eval__checkpoint=which, **LONG)
    assert (outcome.status, outcome.err) == (0, "")
    assert (packed / "evaluation.json").read_bytes() == at_the_end
  results = json.loads(at_the_end)
  for split in ("validation", "test"):
    assert f"{split}: {results[split + '/bits_per_byte']:.4f} bits/byte" in outcome.out
  rows = [row for row in metrics.read(packed) if "validation/bits_per_byte" in row]
  best = min(rows, key=lambda row: row["validation/bits_per_byte"])["step"]
  outcome = program.run(f"--workdir={packed}", "--mode=eval", eval__checkpoint="best", **LONG)
  assert outcome.out.startswith("checkpoint of step ")
  assert best % 20 or f"checkpoint of step {best}\n" in outcome.out


def test_sample_is_a_function_of_its_seed_and_prompt(program, references):
  run = references("packed")

  def sample(**fields):
    outcome = program.run(
      f"--workdir={run}", "--mode=sample", **{**LONG, "sample__tokens": 30, **fields}
    )
    assert (outcome.status, outcome.err) == (0, "")
    return outcome.out

  prompt = "Größe ☃ 🎉 "
  first = sample(sample__prompt=prompt, sample__seed=1)
  assert first.startswith(prompt) and len(first) > len(prompt) + 5
  assert first == sample(sample__prompt=prompt, sample__seed=1)
  assert first != sample(sample__prompt=prompt, sample__seed=2)
  assert len(sample(sample__prompt="")) > 5


def test_a_finished_run_only_reports_and_more_steps_go_on(program, tmp_path):
  program.train(tmp_path, **SHORT)
  log, (step, arrays) = (tmp_path / "metrics.jsonl").read_bytes(), saved_arrays(tmp_path)
  events = sorted(tmp_path.glob("events.*"))
  out = program.train(tmp_path, **SHORT)
  assert "going on from the checkpoint at step 20" in out and "note" not in out
  assert (tmp_path / "metrics.jsonl").read_bytes() == log
  assert sorted(tmp_path.glob("events.*")) == events
  again, unchanged = saved_arrays(tmp_path)
  assert (again, step) == (20, 20)
  assert all(np.array_equal(arrays[name], unchanged[name]) for name in arrays)
  out = program.train(tmp_path, train__steps=24, **SHORT)
  assert "note: train.steps is 24 here, 20 in" in out
  assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 25))
  assert (tmp_path / "metrics.jsonl").read_bytes().startswith(log)
  assert saved_arrays(tmp_path)[0] == 24


ROW = {
  "step",
  "train/loss",
  "train/bits_per_byte",
  "train/tokens_per_second",
  "train/gradient_norm",
  "train/learning_rate",
  "train/tokens",
  "host/resident_gib",
}


def test_a_run_directory_holds_what_it_should(references):
  run = references("packed")
  config = configuration.load(run / "config.json")
  assert (config.train.steps, config.data.mode) == (STEPS, "packed")
  rows = metrics.read(run)
  # Speed is measured from the second step on.
  assert all(row.keys() >= ROW for row in rows[1:])
  assert "validation/bits_per_byte" in rows[-1]
  bits = [row["train/loss"] / np.log(2) for row in rows]
  assert [row["train/bits_per_byte"] for row in rows] == pytest.approx(bits, rel=2e-2)
  assert rows[-1]["train/bits_per_byte"] < rows[0]["train/bits_per_byte"] - 2
  assert rows[-1]["train/tokens"] == STEPS * 8 * 32
  versions = json.loads((run / "versions.json").read_text())
  assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= versions.keys()
  assert list(run.glob("events.out.tfevents.*"))
  assert str(STEPS) in [path.name for path in (run / "checkpoints").iterdir()]
  figures = list(run.glob("*.png"))
  assert len(figures) == 2
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
  by_position = json.loads((run / "evaluation.json").read_text())["by_position"]
  for split in ("validation", "test"):
    tokens = [row["tokens"] for row in by_position if row["split"] == split]
    assert sum(tokens) == LONG["eval__final_max_tokens"]


@pytest.fixture(scope="session")
def texts(scratch):
  """A folder of someone's own texts."""
  folder = scratch / "texts"
  (folder / "letters").mkdir(parents=True)
  for number in range(8):
    lines = [
      f"Dear {name}, the {number}th day at sea was très calm." for name in ("Anne", "Édouard")
    ]
    (folder / "letters" / f"{number}.txt").write_text("\n".join(lines * 40))
  return folder


@pytest.fixture(scope="session")
def pieces(scratch, texts):
  """A sentencepiece model of these texts, and the size of its vocabulary."""
  sentencepiece = pytest.importorskip("sentencepiece")
  prefix = scratch / "pieces"
  sentencepiece.SentencePieceTrainer.train(
    input=",".join(str(path) for path in sorted(texts.rglob("*.txt"))),
    model_prefix=str(prefix),
    vocab_size=340,
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return prefix.with_suffix(".model")


@pytest.mark.parametrize(
  "variant", ["own texts, averaged weights", "sentencepiece, muon", "streamed hybrid"]
)
def test_other_experiments_run_end_to_end(program, texts, tmp_path, request, variant):
  own = {"data__name": "folder", "data__directory": texts}
  fields = {
    "own texts, averaged weights": {**own, "train__ema_decay": 0.9},
    "sentencepiece, muon": {**own, "optim__name": "muon", "model__vocab_size": 360},
    "streamed hybrid": {
      "data__mode": "streaming",
      "model__pattern": "mamba,mamba,sliding_attention",
      "model__L": 3,
      "train__accumulate": 2,
    },
  }[variant]
  if "sentencepiece" in variant:
    fields["data__tokenizer"] = request.getfixturevalue("pieces")
  fields = {**SHORT, "train__steps": 40, **fields}
  program.train(tmp_path, **fields)
  rows = metrics.read(tmp_path)
  assert len(rows) == 40
  first, last = rows[0]["train/bits_per_byte"], rows[-1]["validation/bits_per_byte"]
  if "sentencepiece" in variant:
    # A fresh model's guess is uniform over the vocabulary; pieces are longer than a byte.
    tokens_per_byte = first * np.log(2) / rows[0]["train/loss"]
    assert 0.05 < tokens_per_byte < 0.9
    assert first == pytest.approx(np.log2(360) * tokens_per_byte, rel=0.1)
  else:
    assert first == pytest.approx(8.0, abs=0.3)
  assert 0 < last < first - 0.3
  ended = (tmp_path / "evaluation.json").read_bytes()
  if "averaged" in variant:
    _, arrays = saved_arrays(tmp_path)
    averages = [name for name in arrays if name.startswith(".average")]
    assert averages
    pairs = [(arrays[name], arrays[name.replace(".average", ".params")]) for name in averages]
    assert not any(np.array_equal(average, current) for average, current in pairs)
  outcome = program.run(f"--workdir={tmp_path}", "--mode=eval", **fields)
  assert (outcome.status, outcome.err) == (0, "")
  assert (tmp_path / "evaluation.json").read_bytes() == ended
  outcome = program.run(f"--workdir={tmp_path}", "--mode=sample", **fields)
  assert (outcome.status, outcome.err) == (0, "")


def test_a_closed_pipe_ends_a_sample_quietly(program, references):
  process = program.start(
    f"--workdir={references('packed')}", "--mode=sample", **{**LONG, "sample__tokens": 100_000}
  )
  process.stdout.read(60)
  process.stdout.close()
  assert process.wait(timeout=120) == 1
  assert process.stderr.read() == ""


def test_generating_takes_no_more_memory_as_it_goes_on(program, references):
  # The likeliest token is never the end of a document here, so that the sample is as long as asked.
  fields = {**LONG, "sample__tokens": 6000, "sample__temperature": 0.0}
  process = program.start(f"--workdir={references('packed')}", "--mode=sample", **fields)
  resident = lambda: int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
  process.stdout.read(1500)
  early = resident()
  process.stdout.read(4000)
  late = resident()
  outcome = end(process)
  assert (outcome.status, outcome.err) == (0, "")
  assert late < 1.05 * early

  model = models.language_model(configuration.load(references("packed") / "config.json"))
  params = jax.eval_shape(lambda: lm.init(model, jax.random.key(0)))
  before = jax.eval_shape(lambda: lm.init_state(model, 1))
  token = jax.ShapeDtypeStruct((1,), np.int32)
  _, after = jax.eval_shape(lambda *a: lm.decode_step(model, *a), params, token, before)
  assert after == before
