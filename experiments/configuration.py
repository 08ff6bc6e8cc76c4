"""From the command line to a locked config, and from a config to a file and back.

The command line is that of `ml_collections.config_flags`, with the roughness taken off: overrides
may stand before `--config`, every mistake is one `UserError` line that says what would be right,
and `--help` lists the fields of the config with the comments of the files that define them.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from experiments import config_help
from experiments.errors import UserError

MODES = ("train", "eval", "sample", "aot", "bench", "doctor")

# The flags that take a value, each with an example of one.
FLAGS = {"config": "configs/X.py", "workdir": "runs/X", "mode": "train"}
# Those of one mode only.
OPTIONS = {
  "doctor": {"op": "gla,kda", "json": "doctor.json"},
  "aot": {"topology": "v5e:16x16", "largest_batch": "true", "json": "aot.json"},
}
SWITCHES = ("largest_batch",)  # may stand without a value
PROCESS_FLAGS = {"coordinator": "localhost:8476", "processes": "2", "process": "0"}
FLAGS |= OPTIONS["aot"] | OPTIONS["doctor"] | PROCESS_FLAGS
# What several processes do together.
JOINT_MODES = ("train", "eval", "sample")

# A config file is a program, and these are the ways in which a short program goes wrong.
CONFIG_FILE_ERRORS = (
  ArithmeticError,
  AssertionError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  OSError,
  RuntimeError,
  SyntaxError,
  TypeError,
  ValueError,
)


@dataclasses.dataclass(frozen=True)
class Invocation:
  """What one command line asks for.

  Attributes:
    config: The locked config, overrides applied.
    config_file: As it was typed, with its argument: "configs/quickstart.py:tiny".
    workdir: The run's directory.
    mode: One of `MODES`.
    overrides: Dotted field -> value, for the fields set on the command line.
    options: The flags that only this mode has, by name.
    processes: The flags that say which of several processes this is, by name.
  """

  config: ml_collections.ConfigDict
  config_file: str
  workdir: str
  mode: str
  overrides: dict[str, Any]
  options: dict[str, str]
  processes: dict[str, str]


def parse(argv: Sequence[str]) -> Invocation:
  """Reads a command line.

  Args:
    argv: As `sys.argv`: the program's name first.

  Returns:
    The config with the overrides applied, and what else was asked for.

  Raises:
    UserError: One line that names the flag or field, what it holds and what would be right.
    SystemExit: After `--help` has been printed.
  """
  plain, fields, strangers, wants_help = _split(argv[1:])
  if "config" not in plain:
    if strangers:
      raise UserError(_no_such_flag(strangers[0], {}))
    if wants_help:
      print(config_help.usage(known_configs()))
      raise SystemExit(0)
    raise UserError(f"--config is missing; give one of {_listed(known_configs())}")
  mode = plain.get("mode", "train")
  if mode not in MODES:
    raise UserError(f"--mode is {mode!r}; it must be one of {', '.join(MODES)}")
  options = {name: plain[name] for flags in OPTIONS.values() for name in flags if name in plain}
  for name in options:
    if name not in OPTIONS.get(mode, ()):
      owners = " and ".join(f"--mode={owner}" for owner in OPTIONS if name in OPTIONS[owner])
      raise UserError(f"--{name} is a flag of {owners}; --mode is {mode!r}")
  processes = {name: plain[name] for name in PROCESS_FLAGS if name in plain}
  if processes and mode not in JOINT_MODES:
    joint = ", ".join(f"--mode={name}" for name in JOINT_MODES)
    raise UserError(f"--{next(iter(processes))} is a flag of {joint}; --mode is {mode!r}")
  config_file = plain["config"]
  config, module = _load_config(config_file)
  if strangers:
    raise UserError(_no_such_flag(strangers[0], dict(fields_of(config))))
  overrides = _override(config, config_file, fields)
  config.lock()
  if wants_help:
    print(config_help.describe(config, module, config_file))
    raise SystemExit(0)
  workdir = plain.get("workdir") or default_workdir(config_file)
  return Invocation(config, config_file, workdir, mode, overrides, options, processes)


def known_configs() -> list[str]:
  """The experiments in `configs/`, as they are given to `--config`."""
  return sorted(
    path.as_posix()
    for path in pathlib.Path("configs").glob("*.py")
    if path.name not in ("__init__.py", "defaults.py", "vision_defaults.py")
  )


def default_workdir(config_file: str) -> str:
  """`runs/<config name>[-<argument>]`."""
  path, _, argument = config_file.partition(":")
  name = pathlib.Path(path).stem + ("-" + argument if argument else "")
  return "runs/" + re.sub(r"[^\w.=+-]+", "-", name)


def save(config: ml_collections.ConfigDict, path: str | os.PathLike) -> None:
  """Writes a config as JSON, in one step: the file is the old one or the new one, never half.

  Raises:
    ValueError: A field holds what JSON cannot say.
  """
  for name, value in fields_of(config):
    try:
      json.dumps(value)
    except TypeError:
      raise ValueError(
        f"config.{name} is {value!r}; a config.json holds numbers, strings, booleans and tuples"
      ) from None
  path = pathlib.Path(path)
  scratch = path.with_name(path.name + ".tmp")
  scratch.write_text(json.dumps(_as_json(config), indent=2) + "\n")
  os.replace(scratch, path)


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
  """Reads what `save` wrote. JSON's lists become tuples, so that the result equals the original.

  Raises:
    UserError: The file is missing or is not a config.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}, not a config")
  return ml_collections.ConfigDict(_with_tuples(content)).lock()


def difference(
  here: ml_collections.ConfigDict,
  there: ml_collections.ConfigDict,
  groups: Sequence[str] = ("model", "data.tokenizer"),
  where: str = "the checkpoint",
) -> list[str]:
  """Where two configs differ in the fields that a checkpoint depends on.

  Args:
    here: The config of this run.
    there: The config it is compared with.
    groups: Dotted names of groups or single fields that count.
    where: How to call `there`.

  Returns:
    Lines such as "model.D is 64 here, 128 in runs/x"; none when the two agree. Tuples and lists of
    the same elements are equal.
  """
  absent = object()
  ours, theirs = dict(fields_of(here)), dict(fields_of(there))
  lines = []
  for name in dict.fromkeys([*ours, *theirs]):
    if not any(name == group or name.startswith(group + ".") for group in groups):
      continue
    a, b = _with_tuples(ours.get(name, absent)), _with_tuples(theirs.get(name, absent))
    if a != b:
      a, b = ("absent" if value is absent else repr(value) for value in (a, b))
      lines.append(f"{name} is {a} here, {b} in {where}")
  return lines


def fields_of(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """All (dotted name, value) pairs of a config, in the order in which they were defined."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from fields_of(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _split(
  arguments: Sequence[str],
) -> tuple[dict[str, str], dict[str, str | None], list[str], bool]:
  """Sorts the arguments into flags, raw field overrides, unknown flags, and whether help is wanted.

  An override's value is None where none followed: only a boolean field may be given so.
  """
  plain: dict[str, str] = {}
  fields: dict[str, str | None] = {}
  strangers: list[str] = []
  wants_help = False
  waiting = list(arguments)
  while waiting:
    argument = waiting.pop(0)
    if argument in ("--help", "-help", "-h"):
      wants_help = True
      continue
    match = re.fullmatch(r"--?([A-Za-z][\w.]*)(?:=(.*))?", argument, re.DOTALL)
    if not match:
      raise UserError(f"{argument!r} is not understood; flags look like --config.group.field=value")
    name, value = match.groups()
    if name.startswith("noconfig.") and value is None:
      fields[name.removeprefix("noconfig.")] = "false"
      continue
    if name not in FLAGS and not name.startswith("config."):
      strangers.append(name)
      continue
    if value is None and waiting and not re.match(r"--?[A-Za-z]", waiting[0]):
      value = waiting.pop(0)
    if name.startswith("config."):
      fields[name.removeprefix("config.")] = value
    elif name in SWITCHES and value not in (None, "true", "false"):
      raise UserError(f"--{name} is {value!r}; it is true or false")
    elif not value and name not in SWITCHES:
      raise UserError(f"--{name} needs a value, as in --{name}={FLAGS[name]}")
    else:
      plain[name] = value or "true"
  return plain, fields, strangers, wants_help


def _no_such_flag(name: str, fields: dict[str, Any]) -> str:
  close = difflib.get_close_matches(name, [*FLAGS, "help"], n=1)
  close = close or [f"config.{field}" for field in fields if field.rpartition(".")[2] == name][:1]
  hint = f"did you mean --{close[0]}?" if close else f"there are --{', --'.join([*FLAGS, 'help'])}"
  return f"--{name} is no flag of this program; {hint}"


def _load_config(config_file: str) -> tuple[ml_collections.ConfigDict, types.ModuleType]:
  path, colon, argument = config_file.partition(":")
  if not os.path.isfile(path):
    raise UserError(f"{path} does not exist; the configs here are {_listed(known_configs())}")
  specification = importlib.util.spec_from_file_location("recurrax_config", path)
  if specification is None:
    raise UserError(f"{path} is not a Python file; the configs here are {_listed(known_configs())}")
  module = importlib.util.module_from_spec(specification)
  try:
    specification.loader.exec_module(module)
    config = module.get_config(*([argument] if colon else []))
  except CONFIG_FILE_ERRORS as error:
    raise UserError(_blame(path, argument, error)) from None
  if not isinstance(config, ml_collections.ConfigDict):
    found = type(config).__name__
    raise UserError(f"{path}: get_config must return an ml_collections.ConfigDict, not {found}")
  return config, module


def _blame(path: str, argument: str, error: Exception) -> str:
  """The one line of a traceback that helps: file, line in that file, and what was wrong there."""
  message = " ".join(str(error).split())
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if "configs" in pathlib.Path(frame.filename).parts
    or os.path.realpath(frame.filename) == os.path.realpath(path)
  ]
  # A config raises ValueError for an argument that it does not know, in words meant for the user.
  if argument and isinstance(error, ValueError):
    return f"{path}:{argument}: {message}"
  if isinstance(error, SyntaxError):
    return f"{error.filename} line {error.lineno}: {error.msg}"
  if isinstance(error, AttributeError) and "get_config" in message:
    return f"{path} has no function get_config"
  place = f"{frames[-1].filename} line {frames[-1].lineno}" if frames else path
  return f"{os.path.relpath(place)}: {type(error).__name__}: {message}"


def _override(
  config: ml_collections.ConfigDict, config_file: str, fields: dict[str, str | None]
) -> dict[str, Any]:
  """Sets the fields given on the command line, by way of config_flags."""
  names = dict(fields_of(config))
  arguments, emptied = [], {}
  for name, text in fields.items():
    if name not in names:
      raise UserError(_unknown(config, config_file, name))
    if text == "None" and _may_be_none(config, name):
      group, leaf = _group_of(config, name)
      group[leaf] = emptied[name] = None
      continue
    arguments.append(f"--config.{name}={_canonical(config, name, text)}")
  # Flags of their own, so that a program (or a test) can parse as many command lines as it likes.
  values = flags.FlagValues()
  program = ["run.py", *arguments]
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=program)
  mistaken = None
  try:
    values(program)
  except flags.Error as error:
    mistaken = re.search(r"--config\.([\w.]+)", str(error))[1]
  overrides = {**emptied, **values["config"].override_values}
  for name, value in overrides.items():
    like = names[name]
    if isinstance(like, tuple) and isinstance(value, tuple) and not _same_kind(value, like):
      mistaken = name
  if mistaken:
    expected = _expected(config, mistaken, names[mistaken])
    raise UserError(f"config.{mistaken} is given {fields[mistaken]!r}; it takes {expected}")
  return overrides


def _canonical(config: ml_collections.ConfigDict, name: str, text: str | None) -> str:
  """The value in the one spelling that config_flags understands for the field's type."""
  group, leaf = _group_of(config, name)
  kind = group.get_type(leaf)
  if text is None:
    if kind is bool:
      return "true"
    raise UserError(f"config.{name} needs a value: {_expected(config, name, group[leaf])}")
  if kind is type(None):
    # None says nothing about the type: anything may be given, and a bare word is a string.
    group[leaf] = config_dict.placeholder(object)
    return text if _is_literal(text) else repr(text)
  if kind is tuple and not _is_literal(text):
    return repr(tuple(part.strip() for part in text.strip("()").split(",") if part.strip()))
  if kind is int and re.fullmatch(r"[+-]?\d+(_\d+)+", text):
    return text.replace("_", "")
  return text


def _may_be_none(config: ml_collections.ConfigDict, name: str) -> bool:
  """Whether a field is None, or was made by `placeholder` and so may become None again."""
  group, leaf = _group_of(config, name)
  stored = dict(group.items(preserve_field_references=True))[leaf]
  return stored is None or isinstance(stored, config_dict.FieldReference)


def _group_of(
  config: ml_collections.ConfigDict, name: str
) -> tuple[ml_collections.ConfigDict, str]:
  *groups, leaf = name.split(".")
  for group in groups:
    config = config[group]
  return config, leaf


def _is_literal(text: str) -> bool:
  try:
    ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return False
  return True


def _same_kind(value: tuple, like: tuple) -> bool:
  """Whether a tuple's elements are of the types that the field's elements are of."""
  kinds = tuple({type(element) for element in like})
  if float in kinds:
    kinds += (int,)
  return not kinds or all(type(element) in kinds for element in value)


def _unknown(config: ml_collections.ConfigDict, config_file: str, name: str) -> str:
  names = [field for field, _ in fields_of(config)]
  members = [field for field in names if field.startswith(name + ".")]
  if members:
    return f"config.{name} is a group; set one of its fields: {_listed(members)}"
  return (
    f"config.{name} does not exist; did you mean config.{_nearest(name, names)}? "
    f"python run.py --config={config_file} --help lists all fields"
  )


def _nearest(name: str, names: Sequence[str]) -> str:
  """The field most probably meant: of this last name, of these initials, or spelt most alike."""
  leaf = name.rpartition(".")[2].lower()
  leaves = {field: field.rpartition(".")[2].lower() for field in names}
  same = [field for field in names if leaves[field] == leaf]
  initials = [
    field
    for field in names
    if "_" in leaves[field] and "".join(part[:1] for part in leaves[field].split("_")) == leaf
  ]
  return difflib.get_close_matches(name, same or initials or names, n=1, cutoff=0)[0]


def _expected(config: ml_collections.ConfigDict, name: str, value: Any) -> str:
  group, leaf = _group_of(config, name)
  kind = group.get_type(leaf)
  words = {bool: "true or false", int: "an int", float: "a float", str: "a string"}
  if kind is tuple:
    inner = sorted({type(element).__name__ for element in value or ()})
    return f"a tuple{' of ' + ' or '.join(inner) if inner else ''}, such as {value!r}"
  return f"{words.get(kind, kind.__name__)} (it is {value!r} now)"


def _listed(names: Sequence[str]) -> str:
  if not names:
    return f"none (there is no configs/*.py in {os.getcwd()})"
  more = [f"and {len(names) - 12} more"] if len(names) > 12 else []
  return ", ".join([*names[:12], *more])


def _as_json(value: Any) -> Any:
  if isinstance(value, ml_collections.ConfigDict):
    return {name: _as_json(member) for name, member in value.items()}
  return value


def _with_tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _with_tuples(member) for name, member in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_with_tuples(member) for member in value)
  return value
