"""Which data set `data.name` means, found or prepared, and the texts of one of its splits."""

import contextlib
import io
import shutil
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.data import austen, cache, text_folder
from experiments.errors import UserError

_OWN = 'its own are "austen/chapters", "austen/novels" and "folder"; else a prepared TFDS data set'


class Texts:
  """The documents of one split as a sequence of bytes, read when asked for."""

  def __init__(self, source, feature: str):
    self._source = source
    self._feature = feature

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> bytes:
    text = self._source[index][self._feature]
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
  feature = data_config.text_feature if data_config.name != "folder" else "text"
  if not isinstance(dict(builder.info.features.items()).get(feature), tfds.features.Text):
    texts = [name for name, kind in builder.info.features.items() if _is_text(kind)]
    raise UserError(
      f"data.text_feature={feature!r} is no text of {builder.info.full_name}: "
      f"its texts are {', '.join(texts) or 'none'}"
    )
  try:
    source = builder.as_data_source(split)
  except (ValueError, KeyError, NotImplementedError) as error:
    raise UserError(
      f"split {split!r} of data.name={data_config.name!r} cannot be read: "
      f"its splits are {', '.join(builder.info.splits)} ({_first_line(error)})"
    ) from error
  if not len(source):
    raise UserError(f"split {split!r} of data.name={data_config.name!r} has no documents")
  written = {
    name: [info.num_examples, info.num_bytes] for name, info in builder.info.splits.items()
  }
  key = {
    "dataset": builder.info.full_name,
    "directory": str(builder.data_dir),
    "written": written,
    "feature": feature,
    "split": split,
  }
  return Texts(source, feature), key


def _is_text(feature) -> bool:
  return isinstance(feature, tfds.features.Text)


def _builder(data_config) -> tfds.core.DatasetBuilder:
  name = data_config.name
  directory = Path(data_config.directory).expanduser() if data_config.directory else None
  root = Path(data_config.cache_directory).expanduser() / "datasets"
  if name == "folder":
    return _prepared(text_folder.builder(data_config, root), root)
  if name in ("austen", "austen/chapters", "austen/novels"):
    root = directory or root
    config = name.partition("/")[2] or "chapters"
    return _prepared(austen.Austen(config=config, data_dir=root, file_format="array_record"), root)
  return _installed(name, directory)


def _prepared(builder: tfds.core.DatasetBuilder, root: Path) -> tfds.core.DatasetBuilder:
  """Prepares one of our own data sets below `root` unless that is done, by one process at a time.

  TFDS writes to a directory of another name and renames it, so what exists is whole.
  """
  if not builder.is_prepared():
    with cache.full_disk_reported(root, lambda: 0), cache.exclusive(root / builder.name):
      for leftover in Path(builder.data_dir).parent.glob("*incomplete*"):
        shutil.rmtree(leftover, ignore_errors=True)
      if not builder.is_prepared():
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
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    raise UserError(
      f"data.name={name!r} is not among the data sets in data.directory="
      f"{str(data_dir or '')!r} ({_first_line(error)}): {_OWN}"
    ) from error
  if not builder.is_prepared():
    raise UserError(
      f"data.name={name!r} is not prepared in {builder.data_dir}: "
      f"run `tfds build {name} --file_format=array_record` first, or set data.directory"
    )
  return builder


def _first_line(error: BaseException) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
