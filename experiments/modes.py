"""What each --mode does with a config and a run's directory."""

import io
import json
import pathlib
import sys

import jax

from experiments import (
  aot,
  configuration,
  doctor,
  limits,
  metrics,
  processes,
  sharding,
  train_step,
  workspace,
)
from experiments.benchmark_config import benchmark_config
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
from experiments.tasks import make_task
from experiments.train import evaluation_params, train


def run(invocation: configuration.Invocation) -> None:
  """Does what the command line asks for.

  Raises:
    UserError: in one line, what the person at the keyboard can mend.
  """
  limits.check(invocation.config)
  if invocation.mode in configuration.JOINT_MODES and processes.several():
    _check_alike(invocation)
  MODES[invocation.mode](invocation.config, invocation.workdir, **invocation.options)


def _check_alike(invocation: configuration.Invocation) -> None:
  """Raises UserError where processes were started with different configs: each would compute its
  own part of another step."""
  mine = {f"config.{name}": repr(x) for name, x in configuration.fields_of(invocation.config)}
  mine |= {"--mode": invocation.mode, "the version of JAX": jax.__version__}
  said = processes.what_each_says(json.dumps(mine))
  first = json.loads(said["0"])
  for number in sorted(map(int, said)):
    theirs = json.loads(said[str(number)])
    names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
    if names:
      other = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
      raise UserError(
        f"{names[0]} is {first.get(names[0])} for process 0, {theirs.get(names[0])} for process"
        f" {number}{other}: start all processes with the same command line"
      )


def _eval(config, workdir: str) -> None:
  """What the task measures on the validation and test splits."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    task = make_task(config)
    evaluator = task.evaluator(mesh)
    params, step = _trained(config, workdir, mesh)
    progress = metrics.Progress()
    progress.say(f"checkpoint of step {step}")
    for path in task.evaluate(evaluator, params, pathlib.Path(workdir), progress):
      progress.say(f"wrote {path}")


def _sample(config, workdir: str) -> None:
  """Streams text to the terminal."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    params, _ = _trained(config, workdir, mesh)
    pieces = make_task(config).sample(params)
    # All processes compute the sample; the first one shows it.
    out = sys.stdout if processes.is_first() else io.StringIO()
    print(config.sample.prompt, end="", flush=True, file=out)
    for piece in pieces:
      print(piece, end="", flush=True, file=out)
    print(file=out)


def _doctor(config, workdir: str, op: str = "", json: str = "") -> None:
  """Checks every op on this device; the same for all configs."""
  doctor.run(op=op, json=json)


def _trained(config, workdir: str, mesh):
  """Parameters, the averaged ones where there are, of the checkpoint asked for, and its step."""
  if not (pathlib.Path(workdir) / "config.json").exists():
    raise UserError(f"--workdir {workdir} holds no run: train one there first, with --mode=train")
  workspace.check_same_model(config, workdir)
  # What a checkpoint holds (moments, averages, carried state) is as the run's own config says.
  stored = configuration.load(pathlib.Path(workdir) / "config.json")
  directory = pathlib.Path(workdir) / "checkpoints"
  checkpoints = Checkpoints(directory, keep_last=1, keep_best=1, keep_every_hours=0, read_only=True)
  step = _chosen(config.eval.checkpoint, checkpoints)
  restored = checkpoints.restore(train_step.abstract_state(stored, mesh), step)
  checkpoints.close()
  if restored is None:
    raise UserError(
      f"{workdir}/checkpoints holds no checkpoint: go on training first, with --mode=train"
    )
  return evaluation_params(restored.state), restored.step


def _chosen(which: str, checkpoints: Checkpoints) -> int | None:
  """The step that `eval.checkpoint` means; None is the newest."""
  if which == "newest":
    return None
  if which == "best":
    best = checkpoints.best()
    if best is None and checkpoints.steps():
      raise UserError("eval.checkpoint is 'best', but no checkpoint has been validated: use newest")
    return best
  if not which.isdecimal():
    raise UserError(f"eval.checkpoint is {which!r}, must be newest, best or the number of a step")
  return int(which)


MODES = {
  "train": train,
  "eval": _eval,
  "sample": _sample,
  "aot": aot.report,
  "bench": benchmark_config,
  "doctor": _doctor,
}
