import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import pipeline
from experiments.errors import UserError

MODES = ["packed", "streaming"]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_batches_have_the_promised_form(make_config, mode):
  batches = pipeline.train_batches(make_config(mode=mode), batch_size=8, seed=0)
  batch = next(iter(batches))
  names = {"inputs", "targets", "segment_ids", "positions"}
  assert set(batch) == names | ({"continues"} if mode == "streaming" else set())
  for name in names:
    assert batch[name].shape == (8, 32) and batch[name].dtype == np.int32
  if mode == "streaming":
    assert batch["continues"].shape == (8,) and batch["continues"].dtype == bool
  assert batches.tokenizer.vocab_size == pipeline.tokenizer(make_config()).vocab_size == 257
  assert batches.tokens_per_byte == (2_873_403 + 184) / 2_873_403


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_any_state_can_be_resumed(make_config, mode, prefetch):
  make = lambda: pipeline.train_batches(
    make_config(mode=mode, prefetch=prefetch), batch_size=4, seed=7
  )
  batches, states, expected = make(), [], []
  for _ in range(40):
    states.append(json.loads(json.dumps(batches.get_state())))
    expected.append(next(batches))
  fresh = make()
  for n in np.random.default_rng(0).integers(0, 38, 12).tolist():
    for resumed in (batches, fresh):
      resumed.set_state(states[n])
      assert resumed.get_state() == states[n]
      assert_equal(next(resumed), expected[n])
      assert_equal(next(resumed), expected[n + 1])
      assert resumed.get_state() == states[n + 2]


SHARES = {
  "2 processes": [[slice(0, 4)], [slice(4, 8)]],
  "4 processes": [[slice(n, n + 2)] for n in range(0, 8, 2)],
  "rows in turn": [[slice(0, 2), slice(4, 6)], [slice(2, 4), slice(6, 8)]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_processes_share_one_global_batch(make_config, mode, shares):
  make = lambda rows: pipeline.train_batches(
    make_config(mode=mode), batch_size=8, seed=1, rows=rows
  )
  whole, parts = make([slice(None)]), [make(rows) for rows in shares]
  for n in range(6):
    if n == 3:
      for batches in (whole, *parts):
        batches.set_state({"next_batch": 12345})
    expected = next(whole)
    for rows, part in zip(shares, parts):
      share = {name: np.concatenate([x[r] for r in rows]) for name, x in expected.items()}
      assert_equal(next(part), share)
    assert all(part.get_state() == whole.get_state() for part in parts)


ORDER = {"seed": 7, "T": 32, "batch_size": 4, "mode": "packed"}


@pytest.fixture
def make_batches(make_config):
  """Returns changes of ORDER and fields -> TrainBatches."""

  def make(config_fields=(), **changes):
    order = {**ORDER, **changes}
    config = make_config(T=order["T"], mode=order["mode"], **dict(config_fields))
    return pipeline.train_batches(config, batch_size=order["batch_size"], seed=order["seed"])

  return make


def test_the_state_tells_the_order(make_batches):
  batches = make_batches()
  next(batches)
  state = batches.get_state()
  assert state["next_batch"] == 1
  assert {name: state["order"][name] for name in ORDER} == ORDER
  assert state["order"]["tokens"] == 2_873_403 + 184 + 1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 8}, "train.batch_size is 8 here, 4 in the checkpoint"),
    ({"T": 16}, "data.T is 16 here, 32 in the checkpoint"),
    ({"seed": 8}, "train.seed is 8 here, 7 in the checkpoint"),
    ({"mode": "streaming"}, "data.mode is 'streaming' here, 'packed' in the checkpoint"),
    (
      {"batch_size": 8, "seed": 8},
      "train.seed is 8 here, 7 in the checkpoint; train.batch_size is 8 here, 4 in the checkpoint",
    ),
  ],
)
def test_another_order_is_refused(make_batches, changes, message):
  state = json.loads(json.dumps(make_batches().get_state()))
  batches = make_batches(**changes)
  expected = [next(batches) for _ in range(2)]
  batches = make_batches(**changes)
  assert_equal(next(batches), expected[0])
  with pytest.raises(UserError) as caught:
    batches.set_state({**state, "next_batch": 9})
  assert str(caught.value) == (
    f"{message}: the data would not go on where they stopped; give the same, or another --workdir"
  )
  # The batches are still where they were.
  assert_equal(next(batches), expected[1])


def test_another_text_is_refused(make_batches, folder):
  def make(text):
    return make_batches({"name": "folder", "directory": folder({"a.txt": text})})

  state = make("a text\n" * 40).get_state()
  make("a text\n" * 40).set_state(state)
  with pytest.raises(UserError, match=r"^the number of tokens to train on is \d+ here, \d+ in the"):
    make("a text\n" * 50).set_state(state)
  with pytest.raises(UserError, match=r"^the CRC-32 of the tokens to train on is \d+ here, \d+ in"):
    make("A text\n" * 40).set_state(state)


def test_a_state_without_an_order_is_read(make_batches):
  batches, fresh = make_batches(), make_batches()
  batches.set_state({"next_batch": 5})
  fresh.set_state({**fresh.get_state(), "next_batch": 5})
  assert_equal(next(batches), next(fresh))
  assert batches.get_state() == fresh.get_state()


@pytest.mark.parametrize(
  "shares", [[[slice(None)]], [[slice(0, 1), slice(2, 4)], [slice(1, 2)]]], ids=["one", "two"]
)
def test_evaluation_covers_a_split(make_config, shares):
  counted = 0
  for rows in shares:
    batches = pipeline.evaluation_batches(
      make_config(), "validation", batch_size=4, T=512, rows=rows
    )
    held = sum(len(range(4)[part]) for part in rows)
    for batch in batches:
      assert batch["inputs"].shape == (held, 512)
      counted += (batch["segment_ids"] >= 0).sum()
  assert counted == 466_853 + 24
  # A model that gives each token 1/257 spends this many bits per byte of text.
  bits = math.log(257) * batches.tokens_per_byte / math.log(2)
  assert bits * 466_853 == pytest.approx(counted * math.log2(257))


def test_a_prefix_can_be_evaluated(make_config):
  batches = pipeline.evaluation_batches(make_config(), "test", batch_size=4, max_tokens=1000)
  assert sum((batch["segment_ids"] >= 0).sum() for batch in batches) == 1000


@pytest.mark.parametrize("mode", MODES)
def test_rows_longer_than_the_text(make_config, folder, mode):
  config = make_config(
    name="folder", directory=folder({"a.txt": "tiny text"}), mode=mode, T=100, prefetch=0
  )
  batch = next(pipeline.train_batches(config, batch_size=2, seed=0))
  assert batch["inputs"].shape == (2, 100)
  assert (batch["segment_ids"] >= 0).any(axis=1).all()


@pytest.mark.parametrize(
  "fields, call, message",
  [
    ({"mode": "random"}, {}, "data.mode='random' is unknown: allowed are packed, streaming"),
    ({"name": "no_such"}, {}, "data.name='no_such' is unknown: allowed are"),
    ({"T": 0}, {}, "data.T=0 "),
    ({"prefetch": -1}, {}, "data.prefetch=-1 "),
    ({"tokenizer": "words"}, {}, "data.tokenizer='words' is unknown"),
    ({"train_split": "training"}, {}, "split 'training' .* its splits are train, "),
    ({}, {"seed": -1}, "train.seed=-1 "),
    ({}, {"batch_size": 0}, "train.batch_size=0 "),
  ],
)
def test_what_is_wrong_is_said_in_one_line(make_config, fields, call, message):
  with pytest.raises(UserError, match=message) as caught:
    pipeline.train_batches(make_config(**fields), **{"batch_size": 8, "seed": 0, **call})
  assert "\n" not in str(caught.value)


FULL_PASS = """
import sys
import ml_collections
from experiments.data import pipeline
config = ml_collections.ConfigDict(dict(
  name="austen/chapters", directory="", text_feature="text", tokenizer="bytes", T=256,
  mode="packed", train_split="train", cache_directory=sys.argv[1], prefetch=2))
batches = pipeline.train_batches(config, batch_size=64, seed=0)
for _ in range(2873403 // (64 * 256) + 1):
  next(batches)
for batch in pipeline.evaluation_batches(config, "validation", batch_size=16):
  pass
assert "tensorflow" not in sys.modules
"""


def test_a_quiet_full_pass_without_tensorflow(tmp_path):
  root = Path(__file__).parents[3]
  finished = subprocess.run(
    [sys.executable, "-c", FULL_PASS, str(tmp_path)],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
