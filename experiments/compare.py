"""Trains several experiments with several seeds and prints one table of bits per byte.

python -m experiments.compare --arg=small --seeds=0,1,2
python -m experiments.compare --configs=austen_gla,austen_mamba2 -- --config.train.steps=500

Each run is `python run.py` with a directory of its own: what has ended is not run again, and what
was interrupted goes on where it was. What stands behind `--` is given to every run.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

from experiments.errors import UserError
from experiments.models import language_model
from lm_models import lm

ROOT = pathlib.Path(__file__).resolve().parent.parent


def names() -> list[str]:
  """The experiments that are made for comparison: equal sizes, data and steps."""
  return sorted(path.stem for path in (ROOT / "configs").glob("austen_*.py"))


def train(
  name: str, arg: str, seed: int, directory: pathlib.Path, options: Sequence[str]
) -> dict[str, float]:
  """Runs one experiment to its end, unless it is there, and returns its evaluation.

  Raises:
    UserError: the run failed; its output is in output.txt of its directory.
  """
  workdir = directory / f"{name}-{arg or 'full'}-{seed}"
  evaluation = workdir / "evaluation.json"
  if not evaluation.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    config = f"configs/{name}.py" + (f":{arg}" if arg else "")
    command = [sys.executable, "run.py", f"--config={config}", f"--workdir={workdir}"]
    # Several runs share a GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    with (workdir / "output.txt").open("a") as output:
      status = subprocess.run(
        [*command, f"--config.train.seed={seed}", *options],
        cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment,
      ).returncode  # fmt: skip
    if status or not evaluation.exists():
      path = workdir / "output.txt"
      said = " ".join(path.read_text().strip().splitlines()[-1:])
      raise UserError(f"{name} with seed {seed} ended with {status}, see {path}: {said}")
  return json.loads(evaluation.read_text())


def table(results: dict[str, list[dict[str, float]]], arg: str) -> str:
  """Markdown: each experiment's parameters, and mean and standard deviation over the seeds."""
  splits = [key for key in next(iter(results.values()))[0] if key.endswith("/bits_per_byte")]
  titles = [key.split("/")[0] for key in splits]
  lines = [
    f"| model | parameters | {' | '.join(f'{title}, bits per byte' for title in titles)} |",
    "| --- " * (2 + len(splits)) + "|",
  ]
  mean = lambda name, key: np.mean([run[key] for run in results[name]])
  for name in sorted(results, key=lambda name: mean(name, splits[0])):
    config = importlib.import_module(f"configs.{name}").get_config(arg or None)
    parameters = lm.parameter_count(language_model(config))
    cells = [
      f"{mean(name, key):.3f} ± {np.std([run[key] for run in results[name]], ddof=1):.3f}"
      if len(results[name]) > 1
      else f"{mean(name, key):.3f}"
      for key in splits
    ]
    lines.append(f"| `{name}` | {parameters:,} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _full_name(name: str) -> str:
  full = name if name.startswith("austen_") else f"austen_{name}"
  if full not in names():
    raise UserError(f"--configs has {name!r}, must be among {', '.join(names())}")
  return full


def main(argv: Sequence[str] | None = None) -> int:
  """The command line of this module; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.compare", description="Trains experiments and tabulates them."
  )
  parser.add_argument(
    "--configs", default=",".join(names()), help="such as gla,mamba2; default: every austen_*.py"
  )
  parser.add_argument("--arg", default="", help="of each config, such as small")
  parser.add_argument("--seeds", default="0", help="such as 0,1,2")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument("--directory", type=pathlib.Path, default=ROOT / "runs" / "compare")
  parser.add_argument("options", nargs="*", help="of run.py, behind --")
  arguments = parser.parse_args(argv)
  try:
    chosen = [_full_name(name) for name in arguments.configs.split(",")]
    seeds = arguments.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
      raise UserError(f"--seeds is {arguments.seeds!r}, must be numbers such as 0,1,2")
    if arguments.jobs < 1:
      raise UserError(f"--jobs is {arguments.jobs}, must be at least 1")
    directory = arguments.directory.resolve()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    wanted = [(int(seed), name) for seed in seeds for name in chosen]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
      one = lambda item: train(item[1], arguments.arg, item[0], directory, arguments.options)
      for (seed, name), result in zip(wanted, pool.map(one, wanted)):
        print(f"{name} {seed}: {result['validation/bits_per_byte']:.4f} bits/byte", flush=True)
        results[name].append(result)
  except UserError as error:
    parser.exit(error.status, f"error: {error}\n")
  print(
    f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n{table(results, arguments.arg)}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
