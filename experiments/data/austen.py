"""Jane Austen's six novels as a TFDS data set, from the files beside this module."""

import lzma
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

_NOVELS = {
  "train": {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "sensesensibility": "Sense and Sensibility",
    "northangerabbey": "Northanger Abbey",
  },
  "validation": {"persuasion": "Persuasion"},
  "test": {"prideprejudice": "Pride and Prejudice"},
}

# A heading stands alone on its line; a volume's heading belongs to the chapter that it opens.
_HEADING = re.compile(rb"^(?:VOLUME [IVX]+\s+)?CHAPTER (?:[IVXL]+|[0-9]+)$", re.M | re.I)


class Austen(tfds.core.GeneratorBasedBuilder):
  """The embedded corpus: 4,025,023 bytes, split by novel.

  The documents of a novel, joined in order, are the novel byte for byte: what stands before the
  first chapter belongs to the first chapter. With the config "novels" a document is a novel and
  its chapter is 0.
  """

  # TFDS would look for it with a package that it does not install.
  code_path = Path(__file__)
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(name="chapters", description="A document is a chapter."),
    tfds.core.BuilderConfig(name="novels", description="A document is a novel."),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "title": tfds.features.Text(), "chapter": np.int32}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(novels) for split, novels in _NOVELS.items()}

  def text_bytes(self) -> int:
    """Returns the length of the whole corpus."""
    return sum(len(novel_text(file)) for novels in _NOVELS.values() for file in novels)

  def _generate_examples(self, novels: dict[str, str]):
    for file, title in novels.items():
      novel = novel_text(file)
      chapters = split_chapters(novel) if self.builder_config.name == "chapters" else [novel]
      for number, text in enumerate(chapters, start=len(chapters) > 1):
        yield f"{file}-{number:02}", {"text": text, "title": title, "chapter": number}


def novel_text(file: str) -> bytes:
  """Returns a novel, UTF-8, by its file's name without endings ("emma")."""
  return lzma.decompress((Path(__file__).parent / "austen" / f"{file}.txt.xz").read_bytes())


def split_chapters(novel: bytes) -> list[bytes]:
  """Cuts a novel before the heading of every chapter but the first."""
  starts = [heading.start() for heading in _HEADING.finditer(novel)]
  return [novel[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(novel)])]
