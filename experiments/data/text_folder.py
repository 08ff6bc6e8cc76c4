"""A folder of .txt and .jsonl files as a TFDS data set."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.errors import UserError

# A tail cut off a train document is at most this part of it: one in ...
_LARGEST_TAIL = 4


class TextFolder(tfds.core.GeneratorBasedBuilder):
  """One document per .txt file and per line of a .jsonl file, found recursively, sorted by path.

  A document's split follows from a hash of its path and line, so adding files moves no other
  document. There is always a train split. Where no document falls to validation (or test), the
  tail of the longest train document is cut off for it: its fraction of the whole text, at most a
  quarter of that document. A split with fraction 0 does not exist. Documents without text are left
  out.

  The directory of the prepared data, below data_dir, is named after a fingerprint of the files'
  names, sizes and times of change: a folder that has changed is prepared anew.

  Args:
    folder: the directory.
    key: the field of a .jsonl line that holds its text.
    validation_fraction, test_fraction: of the documents; their sum < 1.

  Raises:
    UserError: the folder is missing or holds no text, or a file cannot be understood.
  """

  # TFDS would look for it with a package that it does not install.
  code_path = Path(__file__)
  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    *,
    folder: str | Path,
    key: str = "text",
    validation_fraction: float = 0.01,
    test_fraction: float = 0.01,
    data_dir: str | Path,
    **kwargs,
  ):
    self._folder = Path(folder).expanduser().resolve()
    self._key = key
    self._fractions = {"validation": validation_fraction, "test": test_fraction}
    if min(self._fractions.values()) < 0 or sum(self._fractions.values()) >= 1:
      raise UserError(
        f"data.validation_fraction={validation_fraction} and data.test_fraction={test_fraction} "
        "must be at least 0 and their sum less than 1"
      )
    settings = [str(self._folder), key, validation_fraction, test_fraction]
    label = re.sub(r"[^A-Za-z0-9]+", "_", self._folder.name)[:40]
    fingerprint = _fingerprint(self._folder, settings)
    super().__init__(data_dir=Path(data_dir) / f"{label}-{fingerprint}", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "source": tfds.features.Text()}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    lengths = {name: len(text) for name, text in read_documents(self._folder, self._key)}
    if not lengths:
      raise UserError(f"data.directory={str(self._folder)!r}: its files hold no text")
    splits = {"train": {}, "validation": {}, "test": {}}
    for name in lengths:
      splits[self._split(name)][name] = slice(None)
    train = splits["train"]
    if not train:
      longest = max(lengths, key=lengths.get)
      train[longest] = splits[self._split(longest)].pop(longest)
    longest = max(train, key=lengths.get)
    end = lengths[longest]
    for split, fraction in self._fractions.items():
      if fraction and not splits[split] and end > 1:
        tail = min(round(fraction * sum(lengths.values())), lengths[longest] // _LARGEST_TAIL)
        cut = end - max(1, tail)
        splits[split][longest] = slice(cut, end)
        train[longest] = slice(0, cut)
        end = cut
    return {split: self._generate_examples(parts) for split, parts in splits.items() if parts}

  def _split(self, name: str) -> str:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, fraction in self._fractions.items():
      if place < fraction:
        return split
      place -= fraction
    return "train"

  def _generate_examples(self, parts: dict[str, slice]):
    for name, text in read_documents(self._folder, self._key):
      if name in parts:
        yield name, {"text": text[parts[name]], "source": name}

  def text_bytes(self) -> int:
    """Returns the length of all files."""
    return sum(path.stat().st_size for path in _files(self._folder))


def builder(data_config, data_dir: Path) -> TextFolder:
  """Returns the data set of the folder data_config.directory, to be prepared below `data_dir`."""
  if not data_config.directory:
    raise UserError('data.directory="": data.name="folder" needs the directory with the texts')
  return TextFolder(
    folder=data_config.directory,
    key=data_config.text_feature,
    validation_fraction=data_config.validation_fraction,
    test_fraction=data_config.test_fraction,
    data_dir=data_dir,
    file_format="array_record",
  )


def read_documents(folder: Path, key: str) -> Iterator[tuple[str, str]]:
  """Yields (path within the folder and line from 1 for .jsonl, text) of documents with any text."""
  for path in _files(folder):
    name = path.relative_to(folder).as_posix()
    if path.suffix.lower() == ".jsonl":
      documents = _read_lines(path, name, key)
    else:
      documents = [(name, _decode(path.read_bytes(), path, 0))]
    yield from ((name, text) for name, text in documents if text)


def _files(folder: Path) -> list[Path]:
  if not folder.is_dir():
    raise UserError(f"data.directory={str(folder)!r} is not a folder")
  files = [path for path in folder.rglob("*") if path.suffix.lower() in (".txt", ".jsonl")]
  files = sorted(path for path in files if path.is_file())
  if not files:
    raise UserError(f"data.directory={str(folder)!r} holds no .txt or .jsonl file")
  return files


def _fingerprint(folder: Path, settings: list) -> str:
  stats = [(str(path), path.stat()) for path in _files(folder)]
  files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
  return hashlib.sha256(json.dumps([settings, files]).encode()).hexdigest()[:16]


def _read_lines(path: Path, name: str, key: str) -> Iterator[tuple[str, str]]:
  offset = 0
  with open(path, "rb") as file:
    for number, line in enumerate(file, start=1):
      where = f"{path}, line {number}"
      text = _decode(line, path, offset).strip("\ufeff \t\r\n")
      offset += len(line)
      if not text:
        continue
      try:
        record = json.loads(text)
      except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from error
      if not isinstance(record, dict) or key not in record:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no field data.text_feature={key!r} (found: {found})")
      document = record[key]
      if not isinstance(document, str):
        raise UserError(f"{where}: the field {key!r} is no text but {type(document).__name__}")
      if not _is_encodable(document):
        raise UserError(f"{where}: the field {key!r} holds half a surrogate pair, which is no text")
      yield f"{name}:{number}", document


def _decode(content: bytes, path: Path, offset: int) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 at byte {offset + error.start}") from error


def _is_encodable(text: str) -> bool:
  return not any("\ud800" <= character <= "\udfff" for character in text)
