"""A run's directory: its config, its versions, and whether a command fits what lies there."""

import importlib.metadata
import json
import pathlib
import platform
import time

import jax

from experiments import configuration, processes
from experiments.errors import UserError

# A checkpoint may be used with other values of these: they change how, not what, a model computes.
FREE_FIELDS = ("remat", "unroll", "dtype", "implementation", "context", "loss_chunk")
# The optimizer's moments, the recent losses and the carried state are as these say.
STATE_FIELDS = ("optim.name", "optim.muon_rules", "train.spike_window", "data.mode")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recurrax")


def open_run(config, workdir: str) -> list[str]:
  """Makes the directory, or checks that a run with this config can go on from what lies there.

  Args:
    config: of this command.
    workdir: the run's directory.

  Returns:
    Lines on the other fields in which the config differs from that of an earlier start.

  Raises:
    UserError: another model or tokenizer was trained there, or in such a way that its state does
      not fit; or the directory cannot be made, or is not the same one for all processes.
  """
  directory = pathlib.Path(workdir)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir {workdir} cannot be made: {error.strerror}") from None
  _require_shared(directory)
  if not (directory / "config.json").exists():
    return []
  differences = check_same_model(config, workdir)
  stored = configuration.load(directory / "config.json")
  if _what_state_holds(config) != _what_state_holds(stored):
    fields = (*STATE_FIELDS, "train.ema_decay", "train.batch_size")
    lines = configuration.difference(config, stored, fields, workdir)
    raise UserError(f"{'; '.join(lines)}: a run cannot change that, use another --workdir")
  return differences


def note_run(config, workdir: str) -> None:
  """Writes the config and the versions, once a run with this config has found what it needs.

  Not before: what lies there must go on describing the checkpoints that lie there.
  """
  if not processes.is_first():
    return
  directory = pathlib.Path(workdir)
  configuration.save(config, directory / "config.json")
  (directory / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def _require_shared(directory: pathlib.Path) -> None:
  """Raises UserError where processes on several hosts have a directory each."""
  if not processes.several():
    return
  # A new name each time: network file systems remember for a while which files there are not.
  mark = directory / f".shared-{processes.that_of_first(time.time())}"
  if processes.is_first():
    mark.touch()
  processes.all_agree(True)  # once it is there
  shared = processes.all_agree(mark.exists())
  if processes.is_first():
    mark.unlink()
  if not shared:
    raise UserError(
      f"--workdir {directory} is not the same directory for all processes:"
      " it must be on a disk that their hosts share"
    )


def _what_state_holds(config) -> tuple:
  """What decides which arrays, of which shapes, a run saves beside the model's."""
  values = dict(configuration.fields_of(config))
  averages = values["train.ema_decay"] > 0
  rows = values["train.batch_size"] if values["data.mode"] == "streaming" else None
  return *(values[field] for field in STATE_FIELDS), averages, rows


def check_same_model(config, workdir: str) -> list[str]:
  """Compares with the config that lies in `workdir`.

  Returns:
    Lines on fields that differ and may.

  Raises:
    UserError: the model or the tokenizer differs, in one line with every difference.
  """
  stored = configuration.load(pathlib.Path(workdir) / "config.json")
  lines = configuration.difference(config, stored, ("model", "data.tokenizer"), workdir)
  used = {"model." + name for name in (*config.model.pattern, *stored.model.pattern)}
  fatal = []
  for line in lines:
    field = line.split(" ")[0]
    group, name = field.rsplit(".", 1)
    architecture = group.count(".") == 1
    if name not in FREE_FIELDS and (not architecture or group in used):
      fatal.append(line)
  if fatal:
    raise UserError(f"{'; '.join(fatal)}: give the same, or another --workdir")
  groups = ("data", "optim", "schedule", "train")
  return configuration.difference(config, stored, groups, workdir)


def versions() -> dict[str, str]:
  """Versions of what a result depends on."""
  found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found
