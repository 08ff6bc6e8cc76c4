"""What a person reads: the greeting of a run, its figures, its sample, and where all of it lies."""

import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from experiments import generate, plots, processes
from experiments.data import pipeline
from lm_models import lm


def greet(progress, task, mesh) -> None:
  """Prints what is about to be trained, on what."""
  device, count = jax.devices()[0], jax.process_count()
  for line in task.describe():
    progress.say(line)
  shared = f" of {count} processes" if count > 1 else ""
  progress.say(
    f"{mesh.size} x {device.device_kind} ({device.platform}){shared}; the first step compiles"
  )


def evaluate_splits(config, evaluator, params, progress) -> dict:
  """Reads the validation and test splits; prints and returns bits per byte, by position too."""
  results = {}
  for split in ("validation", "test"):
    if not config.data[f"{split}_split"]:
      continue
    result = evaluator(params, split)
    state = "state carried" if config.eval.carry_state else f"state afresh every {config.eval.T}"
    progress.say(
      f"{split}: {result.bits_per_byte:.4f} bits/byte over {result.tokens:,} tokens ({state})"
    )
    results[split] = result
  return results


def write_evaluation(results: dict, directory: pathlib.Path) -> list[pathlib.Path]:
  """Writes evaluation.json and the figure by position; returns the files."""
  rows = [
    {"split": split, "first": first, "last": last, "tokens": tokens, "bits_per_byte": bits}
    for split, result in results.items()
    for first, last, tokens, bits in result.by_position
  ]
  summary = {f"{split}/bits_per_byte": result.bits_per_byte for split, result in results.items()}
  path = directory / "evaluation.json"
  figure = directory / "bits-per-byte-against-position.png"
  if processes.is_first():
    path.write_text(json.dumps({**summary, "by_position": rows}, indent=2) + "\n")
    plots.bits_per_byte_by_position(rows, figure)
  return [path, figure]


def sample_text(config, model: lm.Config, params) -> Iterator[str]:
  """The text that follows `sample.prompt`, piece by piece: all processes must read it to its end,
  for they compute it together."""
  tokenizer = pipeline.tokenizer(config.data)
  prompt = np.concatenate([[tokenizer.boundary], tokenizer.encode(config.sample.prompt)])
  tokens = generate.generate(
    model, params, prompt, vocab_size=tokenizer.vocab_size, sample=config.sample
  )
  return generate.text(tokens, tokenizer)


def finish(config, workdir: str, model: lm.Config, params, evaluator, progress) -> None:
  """Evaluates, draws, samples, and says where everything lies."""
  directory = pathlib.Path(workdir)
  files = write_evaluation(evaluate_splits(config, evaluator, params, progress), directory)
  figure = directory / "loss.png"
  written = config.sample.prompt + "".join(sample_text(config, model, params))
  if processes.is_first():
    plots.loss_curve(directory / "metrics.jsonl", figure)
    (directory / "sample.txt").write_text(written + "\n")
  progress.say(f"\n{written}\n")
  progress.say(f"in {directory}:")
  for path, what in (
    (figure, "the training and validation curves"),
    (files[1], "how the loss falls with context"),
    (files[0], "the same in numbers"),
    (directory / "sample.txt", "the sample above"),
    (directory / "metrics.jsonl", "one line for each logged step"),
    (directory / "checkpoints", "to go on from, to evaluate and to sample"),
  ):
    progress.say(f"  {path.name:<36}{what}")
