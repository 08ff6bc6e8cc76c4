"""Which data set `data.name` means, found or prepared, and the texts of one of its splits."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.data import austen, cache, text_folder
from experiments.errors import UserError

_AUSTEN = ("austen", "austen/chapters", "austen/novels")


class Texts:
  """The documents of one split as a sequence of bytes, read when asked for."""

  def __init__(self, source, feature: str, directory: str):
    self._source, self._feature, self._directory = source, feature, directory

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> bytes:
    try:
      text = self._source[index][self._feature]
    except RuntimeError as error:
      raise UserError(
        f"the prepared data in {self._directory} are damaged ({_first_line(error)}): delete that "
        "directory to have them made again"
      ) from error
    return text.encode() if isinstance(text, str) else bytes(text)


def open_texts(data_config, split: str) -> tuple[Texts, dict]:
  """Returns the documents of a split in order, and a key that changes whenever they do.

  Args:
    data_config: the group `data`; name, directory, text_feature and cache_directory are read.
    split: a TFDS split string, such as "train" or "train[:10%]".

  Raises:
    UserError: no such data set, split or text feature; or a split without documents.
  """
  tfds.disable_progress_bar()
  builder = _builder(data_config)
  info = builder.info
  # For a folder the field says where the text is in a .jsonl line.
  feature = "text" if data_config.name == "folder" else data_config.text_feature
  text_features = [name for name, kind in info.features.items() if _is_text(kind)]
  if feature not in text_features:
    raise UserError(
      f"data.text_feature={feature!r} is no text feature of {info.full_name}: "
      f"it has {', '.join(text_features) or 'none'}"
    )
  try:
    source = builder.as_data_source(split)
  except (ValueError, KeyError, NotImplementedError) as error:
    raise UserError(
      f"split {split!r} of data.name={data_config.name!r} cannot be read: "
      f"its splits are {', '.join(info.splits)} ({_first_line(error)})"
    ) from error
  if not len(source):
    raise UserError(f"split {split!r} of data.name={data_config.name!r} has no documents")
  key = {
    "dataset": info.full_name,
    "directory": str(builder.data_dir),
    "written": {name: [part.num_examples, part.num_bytes] for name, part in info.splits.items()},
    "feature": feature,
    "split": split,
  }
  return Texts(source, feature, str(builder.data_dir)), key


def _is_text(feature) -> bool:
  return isinstance(feature, tfds.features.Text)


def _builder(data_config) -> tfds.core.DatasetBuilder:
  name = data_config.name
  directory = Path(data_config.directory).expanduser() if data_config.directory else None
  root = Path(data_config.cache_directory).expanduser() / "datasets"
  if name == "folder":
    return _prepared(lambda: text_folder.builder(data_config, root), root)
  if name in _AUSTEN:
    root = directory or root
    make = lambda: austen.Austen(
      config=name.partition("/")[2] or "chapters", data_dir=root, file_format="array_record"
    )
    return _prepared(make, root)
  return _installed(name, directory)


def _prepared(make: Callable[[], tfds.core.DatasetBuilder], root: Path) -> tfds.core.DatasetBuilder:
  """Prepares one of our own data sets below `root` unless that is done, by one process at a time.

  TFDS writes to a directory of another name and renames it, so what exists is whole. A builder
  looks for prepared data only when it is made: hence a second one when it is our turn.
  """
  builder = make()
  if not builder.info.splits:
    with (
      cache.disk_errors_reported(root, builder.text_bytes),
      cache.exclusive(root / builder.name),
    ):
      builder = make()
      if not builder.info.splits:
        directory = Path(builder.data_dir)
        for leftover in (directory, *directory.parent.glob("incomplete*")):
          shutil.rmtree(leftover, ignore_errors=True)
        # TFDS announces a download, which there is not.
        with contextlib.redirect_stdout(io.StringIO()):
          builder.download_and_prepare()
  return builder


def _installed(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
  """Finds a data set that TFDS has on this machine, by its directory or by name."""
  try:
    if data_dir and (data_dir / "dataset_info.json").exists():
      return tfds.builder_from_directory(data_dir)
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
    raise UserError(
      f"data.name={name!r} is unknown: allowed are {', '.join(_AUSTEN)}, folder, and the TFDS data "
      f"sets in {data_dir or tfds.core.constants.DATA_DIR} ({_first_line(error)})"
    ) from error
  if not Path(builder.data_dir).exists():
    raise UserError(
      f"data.name={name!r} is not prepared in {builder.data_dir}: "
      f"run `tfds build {name} --file_format=array_record` first, or set data.directory"
    )
  return builder


def _first_line(error: BaseException) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
