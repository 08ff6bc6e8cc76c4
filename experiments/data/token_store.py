"""A split as one flat array of tokens on disk: read once, memory-mapped ever after.

A document is stored as [boundary, t_1, ..., t_n], the documents one after the other, and one more
boundary closes the stream. So the model is told where a document starts, has to predict where it
ends, and for any i `stream[i : i + T]` are inputs and `stream[i + 1 : i + T + 1]` their targets.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from experiments.data import cache
from experiments.errors import UserError

_FORMAT = 1
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_CRC_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """One split of one data set under one tokenizer.

  Attributes:
    tokens: the stream [N], uint16 or int32, memory-mapped.
    starts: index in the stream of every document's boundary and of the closing one [documents + 1].
    text_bytes: length of all documents' text in UTF-8.
    boundary: the id that starts a document.
    crc32: CRC-32 of the stream's bytes.
  """

  tokens: np.ndarray
  starts: np.ndarray
  text_bytes: int
  boundary: int
  crc32: int

  @property
  def documents(self) -> int:
    return len(self.starts) - 1

  @property
  def tokens_per_byte(self) -> float:
    """Targets of one pass (every text token, one boundary per document) per byte of text.

    bits_per_byte = nats_per_token * tokens_per_byte / ln 2.
    """
    return (len(self.tokens) - 1) / self.text_bytes


def open_or_create(texts: Sequence[bytes], tokenizer, cache_directory: Path, key: dict):
  """Returns the TokenStore of `texts`, tokenised now unless an intact one is in the cache.

  Every file's length and CRC-32 are checked before it is believed, so what a crash or a bad disk
  left behind is made again. It is written to a directory beside the final one and then renamed.

  Args:
    texts: the documents in order, UTF-8; only read when needed.
    tokenizer: see tokenizers.py.
    cache_directory: where caches live.
    key: what the tokens depend on besides the tokenizer; JSON-able, with "dataset" and "split".

  Raises:
    UserError: the split has no text, or the disk is full.
  """
  key = {**key, "tokenizer": tokenizer.fingerprint(), "format": _FORMAT}
  digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
  label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{key['dataset']}-{key['split']}")[:80]
  directory = Path(cache_directory).expanduser() / "tokens" / f"{label}-{digest}"
  store = _read(directory, key, tokenizer)
  if store is None:
    written = {"documents": 0, "bytes": 0}
    needed = lambda: written["bytes"] * len(texts) // max(1, written["documents"])
    with cache.disk_errors_reported(directory, needed), cache.exclusive(directory):
      store = _read(directory, key, tokenizer)
      if store is None:
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
        try:
          _write(texts, tokenizer, partial, key, written)
          partial.rename(directory)
        except BaseException:
          shutil.rmtree(partial, ignore_errors=True)
          raise
        store = _read(directory, key, tokenizer)
  if not store.text_bytes:
    raise UserError(f"{key['dataset']}: the split {key['split']!r} holds no text")
  return store


def _write(texts: Sequence[bytes], tokenizer, directory: Path, key: dict, written: dict) -> None:
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
  boundary = np.array([tokenizer.boundary], dtype)
  documents = grain.MapDataset.source(texts).map(lambda text: (len(text), tokenizer.encode(text)))
  starts, text_bytes, crc = array("q", [0]), 0, 0
  directory.mkdir()
  with open(directory / "tokens.bin", "wb") as file:
    for length, ids in documents.to_iter_dataset(_READ_OPTIONS):
      document = np.concatenate([boundary, ids.astype(dtype)])
      starts.append(starts[-1] + len(document))
      text_bytes += length
      written["documents"] += 1
      written["bytes"] = starts[-1] * dtype.itemsize + 8 * len(starts)
      crc = zlib.crc32(document, crc)
      file.write(document)
    crc = zlib.crc32(boundary, crc)
    file.write(boundary)
  (directory / "starts.bin").write_bytes(starts)
  index = {
    "key": key,
    "dtype": dtype.name,
    "text_bytes": text_bytes,
    "length": {"tokens": starts[-1] + 1, "starts": len(starts)},
    "crc32": {"tokens": crc, "starts": zlib.crc32(starts)},
  }
  (directory / "index.json").write_text(json.dumps(index, indent=2))


def _read(directory: Path, key: dict, tokenizer) -> TokenStore | None:
  """Returns what is stored, or None where it is missing or any part of it is not as written."""
  try:
    index = json.loads((directory / "index.json").read_bytes())
    arrays = {
      "tokens": np.memmap(directory / "tokens.bin", index["dtype"], "r"),
      "starts": np.memmap(directory / "starts.bin", np.int64, "r"),
    }
    intact = index["key"] == key and all(
      len(values) == index["length"][name] and _crc32(values) == index["crc32"][name]
      for name, values in arrays.items()
    )
    facts = {"text_bytes": index["text_bytes"], "crc32": index["crc32"]["tokens"]}
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return TokenStore(**arrays, **facts, boundary=tokenizer.boundary) if intact else None


def _crc32(values: np.ndarray) -> int:
  crc = 0
  for begin in range(0, len(values), _CRC_BLOCK):
    crc = zlib.crc32(values[begin : begin + _CRC_BLOCK], crc)
  return crc
