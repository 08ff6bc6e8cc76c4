"""The command line reaches the config exactly, and every mistake is one helpful line."""

import json
import pathlib
import textwrap

import ml_collections
import pytest

from experiments import config_help, configuration
from experiments.configuration import parse
from experiments.errors import UserError

CONFIG = '''
"""A small experiment.

python run.py --config=configs/small.py
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
  config = ConfigDict()
  config.model = model = ConfigDict()
  model.D = 64  # model width
  model.inner = model.get_ref("D") * 2  # inner width
  model.tied = True  # the head is the embedding,
                     # transposed
  model.pattern = ("mamba", "attention")  # kinds of block
  model.window = config_dict.placeholder(int)  # tokens; None is all
  # Not a comment of the next field, for a blank line follows.

  config.optim = ConfigDict(dict(
    learning_rate=1e-3,  # at its peak
    # Decays of the
    # two moments.
    betas=(0.9, 0.95),
  ))
  config.data = data()
  config.note = None
  if arg == "tiny":
    config.model.D = 8  # not this one
  elif arg is not None:
    raise ValueError(f"unknown argument {arg!r}, there is 'tiny'")
  return config


def data():
  group = ConfigDict()
  group.tokenizer = "bytes"  # bytes, or a path
  group.T = 256
  return group
'''


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
  """A directory with configs/small.py, which the test runs in."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "small.py").write_text(CONFIG)
  (tmp_path / "configs" / "__init__.py").write_text("")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("COLUMNS", "120")
  return tmp_path


def call(*arguments, config="--config=configs/small.py"):
  return parse(["run.py", config, *arguments])


def mistake(*arguments, config="--config=configs/small.py"):
  with pytest.raises(UserError) as caught:
    parse(["run.py", *([config] if config else []), *arguments])
  message = str(caught.value)
  assert "\n" not in message and "Traceback" not in message
  return message


def test_defaults():
  found = call()
  assert (found.config_file, found.workdir, found.mode, found.overrides) == (
    "configs/small.py",
    "runs/small",
    "train",
    {},
  )
  assert found.config.model.inner == 128 and found.config.is_locked
  with pytest.raises(AttributeError):
    found.config.model.width = 3


def test_arguments_of_the_config_and_flags():
  found = call("--mode=eval", "--workdir", "elsewhere", config="--config=configs/small.py:tiny")
  assert (found.config_file, found.workdir, found.mode) == (
    "configs/small.py:tiny",
    "elsewhere",
    "eval",
  )
  assert found.config.model.D == 8 and found.config.model.inner == 16
  assert call(config="--config=configs/small.py:tiny").workdir == "runs/small-tiny"
  assert parse(["run.py", "--config", "configs/small.py"]).workdir == "runs/small"
  assert configuration.default_workdir("a/b.py:c/d e") == "runs/b-c-d-e"
  assert call().options == {}
  assert call("--mode=doctor", "--op=gla", "--json", "x").options == {"op": "gla", "json": "x"}


@pytest.mark.parametrize(
  ("arguments", "field", "value"),
  [
    (["--config.model.D=32"], "model.D", 32),
    (["--config.model.D", "32"], "model.D", 32),
    (["-config.model.D=-32"], "model.D", -32),
    (["--config.model.D", "-32"], "model.D", -32),
    (["--config.model.D=1_000"], "model.D", 1000),
    (["--config.model.D=3", "--config.model.D=4"], "model.D", 4),
    (["--config.model.tied"], "model.tied", True),
    (["--config.model.tied=false"], "model.tied", False),
    (["--config.model.tied", "false"], "model.tied", False),
    (["--noconfig.model.tied"], "model.tied", False),
    (["--noconfig.model.tied", "--config.model.tied"], "model.tied", True),
    (["--config.optim.learning_rate=1"], "optim.learning_rate", 1.0),
    (["--config.optim.learning_rate=3e-4"], "optim.learning_rate", 3e-4),
    (["--config.optim.betas=(0.8,1)"], "optim.betas", (0.8, 1)),
    (["--config.optim.betas=0.8, 0.9"], "optim.betas", (0.8, 0.9)),
    (["--config.model.pattern=mamba,gla"], "model.pattern", ("mamba", "gla")),
    (["--config.model.pattern=('gla',)"], "model.pattern", ("gla",)),
    (["--config.model.pattern=gla"], "model.pattern", ("gla",)),
    (["--config.model.window=7"], "model.window", 7),
    (["--config.model.window=7", "--config.model.window=None"], "model.window", None),
    (["--config.data.tokenizer="], "data.tokenizer", ""),
    (["--config.data.tokenizer=a=b, 'c'"], "data.tokenizer", "a=b, 'c'"),
    (["--config.data.tokenizer", "12"], "data.tokenizer", "12"),
    (["--config.note=some words"], "note", "some words"),
    (["--config.note=5"], "note", 5),
    (["--config.note=None"], "note", None),
  ],
)
def test_overrides(arguments, field, value):
  for line in (
    [*arguments, "--config=configs/small.py"],
    ["--config=configs/small.py", *arguments],
  ):
    found = parse(["run.py", *line])
    assert found.overrides == {field: value}
    got = dict(configuration.fields_of(found.config))[field]
    assert got == value and type(got) is type(value)


def test_what_follows_from_an_overridden_field_follows():
  assert call("--config.model.D=10").config.model.inner == 20
  assert call("--config.model.D=10", "--config.model.inner=3").config.model.inner == 3


def test_parsing_leaves_nothing_behind():
  call("--config.model.D=10")
  assert call().config.model.D == 64


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.model.d=1", "config.model.d does not exist; did you mean config.model.D?"),
    ("--config.optim.lr=1", "did you mean config.optim.learning_rate?"),
    ("--config.model.learning_rate=1", "did you mean config.optim.learning_rate?"),
    ("--config.model.patern=1", "did you mean config.model.pattern?"),
    ("--config.model.D.x=1", "did you mean config.model."),
    ("--noconfig.model.tie", "did you mean config.model.tied?"),
    ("--config.model.D=wide", "config.model.D is given 'wide'; it takes an int (it is 64 now)"),
    ("--config.model.D=6.5", "config.model.D is given '6.5'; it takes an int"),
    ("--config.data.T=None", "config.data.T is given 'None'; it takes an int"),
    ("--config.model.D", "config.model.D needs a value: an int"),
    (
      "--config.model.window=all",
      "config.model.window is given 'all'; it takes an int (it is None",
    ),
    ("--config.optim.learning_rate=big", "it takes a float (it is 0.001 now)"),
    ("--config.model.tied=maybe", "'maybe'; it takes true or false (it is True now)"),
    ("--config.optim.betas=a,b", "it takes a tuple of float, such as (0.9, 0.95)"),
    ("--config.model.pattern=(1, 2)", "it takes a tuple of str, such as ('mamba', 'attention')"),
    ("--config.optim=3", "is a group; set one of its fields: optim.betas, optim.learning_rate"),
    ("--mode=fly", "--mode is 'fly'; it must be one of train, eval, sample, aot, bench, doctor"),
    ("--workdirr=x", "--workdirr is no flag of this program; did you mean --workdir?"),
    ("--D=3", "--D is no flag of this program; did you mean --config.model.D?"),
    ("--speed=3", "there are --config, --workdir, --mode, "),
    ("--op=gla", "--op is a flag of --mode=doctor; --mode is 'train'"),
    ("words", "'words' is not understood"),
    ("--workdir", "--workdir needs a value, as in --workdir=runs/X"),
  ],
)
def test_mistakes_are_one_line(argument, message):
  assert message in mistake(argument)


def test_unknown_fields_say_where_all_are_listed():
  assert mistake("--config.x=1", config="--config=configs/small.py:tiny").endswith(
    "python run.py --config=configs/small.py:tiny --help lists all fields"
  )


def test_mistakes_about_the_file(small):
  known = "configs/small.py"
  assert mistake(config=None) == f"--config is missing; give one of {known}"
  assert mistake(config="--config=configs/big.py") == (
    f"configs/big.py does not exist; the configs here are {known}"
  )
  assert mistake(config="--config=configs/small.py:huge") == (
    "configs/small.py:huge: unknown argument 'huge', there is 'tiny'"
  )
  (small / "configs" / "small.py").rename(small / "other.py")
  assert "there is no configs/*.py in" in mistake(config=None)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("x = 1\n", "configs/bad.py has no function get_config"),
    (
      "def get_config(arg=None):\n  return 3\n",
      "must return an ml_collections.ConfigDict, not int",
    ),
    ("def get_config(arg=None):\n  return wide\n", "line 2: NameError: name 'wide' is not defined"),
    ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError: No module named"),
    ("def get_config(:\n", "configs/bad.py line 1: invalid syntax"),
    ("def get_config(arg=None):\n  return {}['a']\n", "line 2: KeyError: 'a'"),
    (
      "from ml_collections import ConfigDict\ndef get_config(arg=None):\n"
      "  c = ConfigDict({'a': 1})\n  c.lock()\n  c.b = 2\n  return c\n",
      "configs/bad.py line 5: AttributeError:",
    ),
  ],
)
def test_errors_inside_a_config_are_one_line(small, source, message):
  (small / "configs" / "bad.py").write_text(source)
  assert message in mistake(config="--config=configs/bad.py")


def help_of(capsys, *arguments):
  with pytest.raises(SystemExit) as caught:
    parse(["run.py", *arguments])
  assert caught.value.code == 0
  return capsys.readouterr().out


def test_help_without_a_config_lists_the_configs(capsys):
  text = help_of(capsys, "--help")
  assert "--mode=train|eval|sample|aot|bench|doctor" in text and "  configs/small.py\n" in text


def test_help_lists_each_field_with_its_comment(capsys):
  text = help_of(capsys, "--help", "--config.model.D=5", "--config=configs/small.py")
  assert "A small experiment." in text
  rows = [" ".join(line.split()) for line in text.splitlines()]
  listed = rows[rows.index("model.D int 5 model width") :]
  assert [row for row in listed if row] == [
    "model.D int 5 model width",
    "model.inner int 10 inner width",
    "model.tied bool True the head is the embedding, transposed",
    "model.pattern tuple ('mamba', 'attention') kinds of block",
    "model.window int None tokens; None is all",
    "optim.learning_rate float 0.001 at its peak",
    "optim.betas tuple (0.9, 0.95) Decays of the two moments.",
    "data.tokenizer str 'bytes' bytes, or a path",
    "data.T int 256",
    "note any None",
  ]


def test_help_wraps_to_the_terminal(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "90")
  text = help_of(capsys, "--help", "--config=configs/small.py")
  fields = text[text.index("model.D") :].splitlines()
  assert max(map(len, fields)) <= 90 and "transposed" in [line.strip() for line in fields]


def test_comments_of_imported_configs_come_first(small, capsys, monkeypatch):
  (small / "base_of_help.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=None):\n  config = ConfigDict()\n  config.b = 1  # from the base\n"
    "  config.a = 2\n  return config\n"
  )
  (small / "configs" / "derived.py").write_text(
    "import base_of_help\n"
    "def get_config(arg=None):\n  config = base_of_help.get_config()\n"
    "  config.b = 3  # a reason\n  config.a = 4  # from here\n  return config\n"
  )
  monkeypatch.syspath_prepend(str(small))
  text = help_of(capsys, "--config=configs/derived.py", "--help")
  rows = [" ".join(line.split()) for line in text.splitlines()][-2:]
  assert rows == ["b int 3 from the base", "a int 4 from here"]


def test_every_field_of_the_shipped_configs_has_a_comment():
  root = pathlib.Path(configuration.__file__).parents[1]
  comments = config_help.field_comments((root / "configs" / "defaults.py").read_text())
  assert len(comments) > 50
  assert [name for name, comment in comments.items() if not comment] == []


def test_comments_of_dictionaries_and_multi_line_values():
  source = textwrap.dedent("""
    import ml_collections
    def get_config(arg=None):
      c = ml_collections.ConfigDict({
        "a": 1,  # one
        "b": {"not": "a group"},  # two
        "c": ml_collections.ConfigDict(dict(d=(  # three
          1, 2))),
      })
      # four,
      # really
      c.e = (
        1,
        2,
      )
      unrelated.f = 3  # nothing
      return c
  """)
  assert config_help.field_comments(source) == {
    "a": "one",
    "b": "two",
    "c.d": "three",
    "e": "four, really",
  }


def test_save_and_load_are_inverse(tmp_path):
  config = call("--config.model.window=7").config
  configuration.save(config, tmp_path / "config.json")
  loaded = configuration.load(tmp_path / "config.json")
  assert dict(configuration.fields_of(loaded)) == dict(configuration.fields_of(config))
  assert loaded.is_locked and loaded.model.pattern == ("mamba", "attention")
  assert json.loads((tmp_path / "config.json").read_text())["model"]["inner"] == 128
  assert not list(tmp_path.glob("*.tmp"))


def test_what_json_cannot_hold_is_named(tmp_path):
  config = ml_collections.ConfigDict({"a": {"b": object}})
  with pytest.raises(ValueError, match=r"config\.a\.b is <class 'object'>"):
    configuration.save(config, tmp_path / "config.json")
  assert not list(tmp_path.glob("*json*"))


def test_unreadable_files_are_named(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
    configuration.load(path)
  path.write_text("{")
  with pytest.raises(UserError, match=r"config\.json is not JSON"):
    configuration.load(path)
  path.write_text("[]")
  with pytest.raises(UserError, match=r"config\.json holds a list, not a config"):
    configuration.load(path)


def test_difference(tmp_path):
  here, there = call().config, call("--config.model.D=128", "--config.data.T=9").config
  assert configuration.difference(here, there, where="runs/x") == [
    "model.D is 64 here, 128 in runs/x",
    "model.inner is 128 here, 256 in runs/x",
  ]
  configuration.save(here, tmp_path / "config.json")
  assert configuration.difference(here, configuration.load(tmp_path / "config.json")) == []
  bytes_, words = call().config, call("--config.data.tokenizer=words").config
  assert configuration.difference(bytes_, words) == [
    "data.tokenizer is 'bytes' here, 'words' in the checkpoint"
  ]
  assert configuration.difference(bytes_, words, groups=("data.token",)) == []
  less = ml_collections.ConfigDict(
    {"model": {"D": 64, "pattern": ["mamba", "attention"], "new": 1}}
  )
  assert configuration.difference(here, less, groups=("model",)) == [
    "model.inner is 128 here, absent in the checkpoint",
    "model.tied is True here, absent in the checkpoint",
    "model.window is None here, absent in the checkpoint",
    "model.new is absent here, 1 in the checkpoint",
  ]
