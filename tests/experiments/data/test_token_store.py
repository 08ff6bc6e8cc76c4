import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments.data import cache, token_store
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError

KEY = {"dataset": "tiny", "split": "train"}
TEXTS = [b"one", b"", "zwei ☃".encode(), b"three"]


class Counted(list):
  """A list that counts how often it is read."""

  reads = 0

  def __getitem__(self, index):
    self.reads += 1
    return super().__getitem__(index)


def create(directory, texts=TEXTS, **key):
  return token_store.open_or_create(texts, ByteTokenizer(), directory, {**KEY, **key})


def test_the_stream_is_as_promised(tmp_path):
  store = create(tmp_path)
  expected = []
  for text in TEXTS:
    expected += [256, *text]
  assert store.tokens.tolist() == [*expected, 256] and store.tokens.dtype == np.uint16
  assert [store.tokens[i] for i in store.starts] == [256] * 5
  assert store.documents == 4 and store.text_bytes == sum(map(len, TEXTS))
  assert store.tokens_per_byte == (store.text_bytes + 4) / store.text_bytes
  assert store.crc32 == zlib.crc32(np.array([*expected, 256], np.uint16).tobytes())
  assert isinstance(store.tokens, np.memmap)


def test_a_large_vocabulary_has_wider_tokens(tmp_path):
  tokenizer = ByteTokenizer()
  tokenizer.vocab_size, tokenizer.boundary = 70001, 70000
  store = token_store.open_or_create(TEXTS, tokenizer, tmp_path, KEY)
  assert store.tokens.dtype == np.int32 and store.tokens[0] == store.tokens[-1] == 70000


def test_tokenised_once_per_key(tmp_path):
  texts = Counted(TEXTS)
  create(tmp_path, texts)
  assert texts.reads == len(TEXTS)
  create(tmp_path, texts)
  assert texts.reads == len(TEXTS)
  create(tmp_path, texts, split="test")
  assert texts.reads == 2 * len(TEXTS)


@pytest.mark.parametrize("file", ["tokens.bin", "starts.bin", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty", "remove"])
def test_damage_is_noticed_and_repaired(tmp_path, file, damage):
  before = create(tmp_path)
  path = next((tmp_path / "tokens").glob(f"*/{file}"))
  content = path.read_bytes()
  path.unlink()
  if damage != "remove":
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
    path.write_bytes(
      {"flip": flipped, "truncate": content[:-1], "extend": content + b"\0", "empty": b""}[damage]
    )
  texts = Counted(TEXTS)
  after = create(tmp_path, texts)
  # A JSON file with a stray byte may still be understood; then nothing has to be made again.
  assert texts.reads == len(TEXTS) or file == "index.json"
  assert np.array_equal(after.tokens, before.tokens) and np.array_equal(after.starts, before.starts)
  assert after.text_bytes == before.text_bytes


def test_a_split_without_text_is_an_error(tmp_path):
  with pytest.raises(UserError, match="tiny: the split 'train' holds no text"):
    create(tmp_path, [b"", b""])


SLOW_WRITER = """
import sys, time
from pathlib import Path
from experiments.data import token_store
from experiments.data.tokenizers import ByteTokenizer

class Slow(list):
  def __getitem__(self, index):
    time.sleep(float(sys.argv[2]))
    return super().__getitem__(index)

texts = Slow([b"document %d" % i * 100 for i in range(200)])
key = {"dataset": "tiny", "split": "train"}
store = token_store.open_or_create(texts, ByteTokenizer(), Path(sys.argv[1]), key)
print(int(store.tokens.sum()))
"""


def start_writer(directory, delay: float) -> subprocess.Popen:
  root = Path(__file__).parents[3]
  return subprocess.Popen(
    [sys.executable, "-c", SLOW_WRITER, str(directory), str(delay)],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    stdout=subprocess.PIPE,
    text=True,
  )


def test_a_killed_writer_leaves_nothing_that_is_believed(tmp_path):
  writer = start_writer(tmp_path, 0.5)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob("tokens/*.partial/tokens.bin")):
    assert writer.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  writer.send_signal(signal.SIGKILL)
  writer.communicate()
  assert list(tmp_path.glob("tokens/*.partial")) and not list(tmp_path.glob("tokens/*/index.json"))
  texts = [b"document %d" % i * 100 for i in range(200)]
  store = create(tmp_path, texts)
  assert store.documents == 200 and store.text_bytes == sum(map(len, texts))
  assert not list(tmp_path.glob("tokens/*.partial"))


@pytest.mark.slow
def test_two_writers_agree(tmp_path):
  writers = [start_writer(tmp_path, 0.005) for _ in range(2)]
  sums = [writer.communicate(timeout=120)[0] for writer in writers]
  assert [writer.returncode for writer in writers] == [0, 0]
  assert sums[0] == sums[1] != ""
  assert len(list(tmp_path.glob("tokens/*/index.json"))) == 1


def test_a_full_disk_is_told_with_the_bytes_needed(tmp_path, monkeypatch):
  real_open = open

  class FullFile:
    def __init__(self, file):
      self._file, self._left = file, 2000

    def write(self, content):
      self._left -= memoryview(content).nbytes
      if self._left < 0:
        raise OSError(28, "No space left on device")
      return self._file.write(content)

    def __enter__(self):
      return self

    def __exit__(self, *error):
      self._file.close()

  monkeypatch.setattr(token_store, "open", lambda *a: FullFile(real_open(*a)), raising=False)
  texts = [b"x" * 99] * 50
  with pytest.raises(UserError) as caught:
    create(tmp_path, texts)
  message = str(caught.value)
  assert str(tmp_path) in message and "free" in message and "\n" not in message
  needed = int(message.split("about ")[1].split(" bytes")[0].replace(",", ""))
  assert needed == pytest.approx(50 * 100 * 2 + 51 * 8, rel=0.01)
  assert not list(tmp_path.glob("tokens/*.partial"))
  monkeypatch.undo()
  assert create(tmp_path, texts).documents == 50


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(UserError, match=r"file/.* cannot be written \(data.cache_directory"):
    create(file)


def test_other_errors_pass(tmp_path):
  with pytest.raises(OSError, match="odd"), cache.disk_errors_reported(tmp_path, lambda: 0):
    raise OSError(5, "odd")


def test_the_index_says_what_was_read(tmp_path):
  create(tmp_path, version="3")
  index = json.loads(next(tmp_path.glob("tokens/*/index.json")).read_text())
  assert index["key"] == {**KEY, "version": "3", "tokenizer": "bytes", "format": 1}
