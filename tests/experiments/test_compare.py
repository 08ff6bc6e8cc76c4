"""The table of several experiments by seeds; the runs themselves are `run.py`'s."""

import json

import pytest

from experiments import compare
from experiments.errors import UserError


def write(directory, name, seed, bits):
  workdir = directory / f"{name}-tiny-{seed}"
  workdir.mkdir(parents=True)
  result = {"validation/bits_per_byte": bits, "test/bits_per_byte": bits + 1, "by_position": []}
  (workdir / "evaluation.json").write_text(json.dumps(result))


def test_runs_that_ended_are_read_and_tabulated(tmp_path, capsys):
  for seed, bits in enumerate([2.0, 2.2]):
    write(tmp_path, "austen_gla", seed, bits)
    write(tmp_path, "austen_mamba", seed, bits - 1)
  options = ["--arg=tiny", "--seeds=0,1", f"--directory={tmp_path}"]
  assert compare.main(["--configs=gla,austen_mamba", *options]) == 0
  rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
  assert "austen_mamba" in rows[0] and "1.100 ± 0.141 | 2.100 ± 0.141" in rows[0]
  assert "austen_gla" in rows[1] and "2.100 ± 0.141" in rows[1]


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--configs=gla,glas", "--configs has 'glas', must be among austen_"),
    ("--seeds=0,x", "--seeds is '0,x', must be numbers"),
    ("--jobs=0", "--jobs is 0, must be at least 1"),
  ],
)
def test_a_mistake_ends_in_one_line(option, message, capsys):
  with pytest.raises(SystemExit) as ended:
    compare.main([option])
  error = capsys.readouterr().err
  assert ended.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_run_that_fails_says_why(tmp_path):
  with pytest.raises(UserError, match="unknown argument 'huge'"):
    compare.train("austen_gla", "huge", 0, tmp_path, [])
