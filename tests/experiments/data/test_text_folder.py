import itertools
import json
import os

import pytest

from experiments.data import datasets
from experiments.errors import UserError

SPLITS = ("train", "validation", "test")


def read(config) -> dict[str, list[str]]:
  """Returns the documents of every split that exists."""
  found = {}
  for split in SPLITS:
    try:
      texts, _ = datasets.open_texts(config, split)
    except UserError as error:
      assert f"split '{split}'" in str(error)
    else:
      found[split] = [texts[i].decode() for i in range(len(texts))]
  return found


@pytest.fixture
def folder_config(make_config, tmp_path):
  return lambda directory, **fields: make_config(
    name="folder", directory=directory, cache_directory=tmp_path / "cache", **fields
  )


def test_files_and_lines_are_documents_in_order(folder, folder_config):
  lines = [json.dumps({"text": f"line {i} ☃"}) for i in range(3)]
  directory = folder(
    {
      "b.txt": "second",
      "a/deep/x.TXT": "first\r\n",
      "c.jsonl": "\ufeff" + "\n\n".join(lines),
      "empty.txt": "",
      "ignored.md": b"\xff",
    }
  )
  config = folder_config(directory, validation_fraction=0.0, test_fraction=0.0)
  expected = ["first\r\n", "second", "line 0 ☃", "line 1 ☃", "line 2 ☃"]
  assert read(config) == {"train": expected}


def test_splits_are_disjoint_whole_and_stable(folder, folder_config):
  documents = {f"{i}.txt": f"document {i}" for i in range(300)}
  fractions = {"validation_fraction": 0.1, "test_fraction": 0.2}
  before = read(folder_config(folder(documents), **fractions))
  assert sorted(itertools.chain(*before.values())) == sorted(documents.values())
  assert 15 < len(before["validation"]) < 45 and 40 < len(before["test"]) < 80
  after = read(folder_config(folder({"new.txt": "one more"}), **fractions))
  for split in SPLITS:
    assert set(before[split]) == set(after[split]) - {"one more"}


@pytest.mark.parametrize("length", [2, 3, 10, 5000])
def test_one_document_is_cut_into_three(folder, folder_config, length):
  text = "".join(chr(0x100 + i % 500) for i in range(length))
  splits = read(folder_config(folder({"only.txt": text})))
  assert splits["train"] and splits["validation"]
  assert "test" in splits or length == 2
  assert "".join(splits["train"] + splits.get("test", []) + splits["validation"]) == text
  if length == 5000:
    assert [len(splits[split][0]) for split in SPLITS] == [4900, 50, 50]


def test_a_train_split_always_exists(folder, folder_config):
  directory = folder({"a.txt": "short", "b.txt": "the longest of them"})
  splits = read(folder_config(directory, validation_fraction=0.5, test_fraction=0.4999999))
  assert all(splits[split] for split in SPLITS)
  assert sum(len(text) for texts in splits.values() for text in texts) == len(
    "short" + "the longest of them"
  )


def test_one_character_can_be_trained_on(folder, folder_config):
  assert read(folder_config(folder({"a.txt": "x"}))) == {"train": ["x"]}


def test_a_changed_folder_is_read_again(folder, folder_config):
  directory = folder({"a.txt": "one" * 100})
  config = folder_config(directory, validation_fraction=0.0, test_fraction=0.0)
  assert read(config) == {"train": ["one" * 100]}
  folder({"a.txt": "two" * 100})
  os.utime(directory / "a.txt", ns=(1, 1))
  assert read(config) == {"train": ["two" * 100]}
  folder({"b.txt": "more"})
  assert read(config) == {"train": ["two" * 100, "more"]}
  (directory / "a.txt").unlink()
  assert read(config) == {"train": ["more"]}


def test_the_key_of_a_line_can_be_chosen(folder, folder_config):
  directory = folder({"a.jsonl": '{"body": "hello there"}'})
  config = folder_config(directory, text_feature="body", validation_fraction=0.0, test_fraction=0.0)
  assert read(config) == {"train": ["hello there"]}


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "is not a folder"),
    ({"a.md": "x"}, "holds no .txt or .jsonl file"),
    ({"a.txt": "", "b.jsonl": "\n"}, "its files hold no text"),
    ({"a.txt": b"abc\xff"}, r"a.txt is not UTF-8 at byte 3"),
    ({"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}'}, "a.jsonl is not UTF-8 at byte 24"),
    ({"a.jsonl": '{"text": "x"}\n\n{"text": '}, "a.jsonl, line 3: no JSON"),
    ({"a.jsonl": '{"body": 1, "id": 2}'}, r"line 1: no field .*'text' \(found: body, id\)"),
    ({"a.jsonl": '["text"]'}, r"line 1: no field .*'text' \(found: list\)"),
    ({"a.jsonl": '{"text": 3}'}, "line 1: the field 'text' is no text but int"),
    ({"a.jsonl": '{"text": "\\ud800"}'}, "line 1: .* half a surrogate pair"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(folder, folder_config, tmp_path, files, message):
  folder(files)
  with pytest.raises(UserError, match=message) as caught:
    datasets.open_texts(folder_config(tmp_path / "texts"), "train")
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5)])
def test_fractions_must_leave_something(folder, folder_config, fractions):
  config = folder_config(
    folder({"a.txt": "x"}), validation_fraction=fractions[0], test_fraction=fractions[1]
  )
  with pytest.raises(UserError, match=r"data.validation_fraction=.* must be at least 0"):
    datasets.open_texts(config, "train")
