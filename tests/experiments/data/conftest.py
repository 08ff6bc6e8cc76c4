"""Small stores made in memory, and a config whose caches are the test's own."""

import zlib

import numpy as np
import pytest

from configs import defaults
from experiments.data.token_store import TokenStore

BOUNDARY = 256


@pytest.fixture
def make_store():
  """Returns texts -> TokenStore of their bytes, written out independently of the package."""

  def make(texts: list[bytes]) -> TokenStore:
    stream, starts = [], []
    for text in texts:
      starts.append(len(stream))
      stream += [BOUNDARY, *text]
    starts.append(len(stream))
    tokens = np.array([*stream, BOUNDARY], np.uint16)
    crc32 = zlib.crc32(tokens.tobytes())
    return TokenStore(tokens, np.array(starts), sum(map(len, texts)), BOUNDARY, crc32)

  return make


@pytest.fixture
def texts() -> list[bytes]:
  """Documents of many lengths, one of them empty; no two places look alike."""
  lengths = np.random.default_rng(0).integers(1, 40, 13).tolist()
  generator = np.random.default_rng(1)
  return [generator.integers(0, 256, n, np.uint8).tobytes() for n in [*lengths, 0, 90]]


@pytest.fixture
def make_config(tmp_path_factory):
  """Returns fields -> the group `data`, with a cache shared by the tests of one session.

  The fields are those of the program's own defaults: none may be needed that is not among them.
  """
  cache_directory = tmp_path_factory.getbasetemp() / "cache"

  def make(**fields):
    config = defaults.get_config().data.lock()
    fields = {"T": 32, "prefetch": 2, "cache_directory": cache_directory, **fields}
    config.update(
      {name: str(value) if "directory" in name else value for name, value in fields.items()}
    )
    return config

  return make


@pytest.fixture
def folder(tmp_path):
  """Returns {name: content} -> a folder with those files."""

  def make(files: dict[str, bytes | str]):
    for name, content in files.items():
      path = tmp_path / "texts" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / "texts"

  return make
