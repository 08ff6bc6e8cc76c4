import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from experiments.data import cache, datasets
from experiments.errors import UserError


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """Returns where a TFDS data set "tiny_reviews" lies, prepared by code that is gone since."""
  directory = tmp_path_factory.mktemp("tfds")
  code = """
import sys
import tensorflow_datasets as tfds
tfds.disable_progress_bar()

class TinyReviews(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"review": tfds.features.Text(), "stars": tfds.features.ClassLabel(num_classes=5)}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(10), "test": self._generate_examples(2)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"review": f"review {i}", "stars": i % 5}

TinyReviews(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
  script = directory / "prepare.py"
  script.write_text(code)
  subprocess.run([sys.executable, script, directory], check=True, timeout=120)
  return directory


def contents(config, split):
  texts, _ = datasets.open_texts(config, split)
  return [texts[i].decode() for i in range(len(texts))]


def test_an_installed_data_set_is_found_by_name_or_directory(make_config, installed):
  expected = [f"review {i}" for i in range(10)]
  for name, directory in [
    ("tiny_reviews", installed),
    ("tiny_reviews:1.0.0", installed),
    ("tiny_reviews", installed / "tiny_reviews" / "1.0.0"),
  ]:
    config = make_config(name=name, directory=directory, text_feature="review")
    assert contents(config, "train") == expected
    assert contents(config, "train[20%:50%]+test") == [*expected[2:5], *expected[:2]]


def test_the_key_tells_texts_apart(make_config, installed):
  config = make_config(name="tiny_reviews", directory=installed, text_feature="review")
  keys = [
    datasets.open_texts(config, "train")[1],
    datasets.open_texts(config, "train[:5]")[1],
    datasets.open_texts(make_config(), "train")[1],
    datasets.open_texts(make_config(name="austen/novels"), "train")[1],
  ]
  assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
  assert keys[0] == datasets.open_texts(config, "train")[1]


@pytest.mark.parametrize(
  "fields, split, message",
  [
    ({"text_feature": "text"}, "train", "data.text_feature='text' is no text .* it has review"),
    ({"text_feature": "stars"}, "train", "data.text_feature='stars' is no text feature"),
    ({}, "validation", "split 'validation' .* its splits are train, test"),
    ({}, "train[:0]", r"split 'train\[:0\]'"),
    ({}, "train[", r"split 'train\['"),
    ({"name": "no_such"}, "train", "data.name='no_such' is unknown: allowed are .*austen/novels"),
    ({"name": "austen/pages"}, "train", "data.name='austen/pages' is unknown"),
    ({"name": "lm1b"}, "train", "data.name='lm1b' is not prepared in .*tfds build lm1b"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(make_config, installed, fields, split, message):
  config = make_config(
    **{"name": "tiny_reviews", "directory": installed, "text_feature": "review", **fields}
  )
  with pytest.raises(UserError, match=message) as caught:
    datasets.open_texts(config, split)
  assert "\n" not in str(caught.value)


def test_another_file_format_is_refused(make_config, installed, tmp_path):
  directory = tmp_path / "tiny_reviews" / "1.0.0"
  directory.mkdir(parents=True)
  for file in (installed / "tiny_reviews" / "1.0.0").iterdir():
    content = file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
    (directory / file.name).write_bytes(content)
  config = make_config(name="tiny_reviews", directory=tmp_path, text_feature="review")
  with pytest.raises(UserError, match="TFRECORD is not supported"):
    datasets.open_texts(config, "train")


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_records_are_named(make_config, tmp_path, damage):
  config = make_config(cache_directory=tmp_path)
  datasets.open_texts(config, "validation")
  path = next(tmp_path.glob("datasets/austen/chapters/1.0.0/*validation*"))
  content = path.read_bytes()
  flipped = content[:5000] + bytes([content[5000] ^ 255]) + content[5001:]
  path.write_bytes(flipped if damage == "flip" else content[: len(content) // 2])
  with pytest.raises(UserError, match=r"chapters/1.0.0 are damaged .*: delete that directory"):
    contents(config, "validation")


@pytest.mark.parametrize(
  "error",
  [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left on device")],
)
def test_a_full_disk_while_preparing(make_config, tmp_path, monkeypatch, error):
  def full(self):
    raise error

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", full)
  with pytest.raises(UserError, match=r"datasets is full .* 4,025,0\d\d bytes needed"):
    datasets.open_texts(make_config(cache_directory=tmp_path), "train")


PREPARE = """
import sys, time
import ml_collections
from experiments.data import austen, datasets
read = austen.novel_text

def slow(file):
  time.sleep(float(sys.argv[2]))
  return read(file)

austen.novel_text = slow
config = ml_collections.ConfigDict(
  dict(name="austen", directory="", text_feature="text", cache_directory=sys.argv[1])
)
print(len(datasets.open_texts(config, "train")[0]))
"""


def start_preparation(directory, delay: float) -> subprocess.Popen:
  root = Path(__file__).parents[3]
  return subprocess.Popen(
    [sys.executable, "-c", PREPARE, str(directory), str(delay)],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    stdout=subprocess.PIPE,
    text=True,
  )


def test_a_killed_preparation_is_begun_again(make_config, tmp_path):
  process = start_preparation(tmp_path, 1)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob("datasets/austen/chapters/incomplete*/*")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert list(tmp_path.glob("datasets/austen/chapters/incomplete*"))
  texts, _ = datasets.open_texts(make_config(cache_directory=tmp_path), "train")
  assert len(texts) == 184
  assert not list(tmp_path.glob("datasets/austen/chapters/incomplete*"))


def test_what_another_prepared_while_we_waited_is_used(make_config, tmp_path, monkeypatch):
  config = make_config(cache_directory=tmp_path)
  exclusive = cache.exclusive

  @contextlib.contextmanager
  def overtaken(path):
    monkeypatch.undo()
    datasets.open_texts(config, "train")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", None)
    with exclusive(path):
      yield

  monkeypatch.setattr(cache, "exclusive", overtaken)
  assert len(datasets.open_texts(config, "train")[0]) == 184


def test_two_preparations_agree(tmp_path):
  processes = [start_preparation(tmp_path, 0.1) for _ in range(2)]
  assert [process.communicate(timeout=120)[0] for process in processes] == ["184\n"] * 2
