"""From text to token ids and back, exactly."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from experiments.errors import UserError


class ByteTokenizer:
  """One token per byte of UTF-8; id 256 marks the start of a document."""

  vocab_size = 257
  boundary = 256

  def encode(self, text: bytes | str) -> np.ndarray:
    """Returns the ids [T] int32 of a text, without any boundary."""
    return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

  def decode(self, ids) -> bytes:
    """Returns the text of ids; boundaries have none."""
    ids = np.asarray(ids)
    for id in (ids.min(), ids.max()) if ids.size else ():
      _check_id(id, self.vocab_size)
    return ids[ids != self.boundary].astype(np.uint8).tobytes()

  def decode_bytes(self, id: int) -> bytes:
    """Returns the bytes of one id, for printing a sample while it grows."""
    _check_id(id, self.vocab_size)
    return b"" if id == self.boundary else bytes([id])

  def fingerprint(self) -> str:
    """Returns a name that changes whenever the ids of some text would."""
    return "bytes"


class SentencePieceTokenizer:
  """The pieces of a trained SentencePiece model, and one id more for the document boundary.

  The boundary is an id of our own because no text may ever be encoded to it.

  Raises:
    UserError: sentencepiece is not installed, or the file is missing or no model.
  """

  def __init__(self, path: str | Path):
    path = Path(path).expanduser()
    if importlib.util.find_spec("sentencepiece") is None:
      raise UserError(
        f"data.tokenizer={str(path)!r} needs the sentencepiece package: pip install sentencepiece"
      )
    if not path.is_file():
      raise UserError(f"data.tokenizer={str(path)!r}: there is no such file")
    import sentencepiece

    content = path.read_bytes()
    self._pieces = sentencepiece.SentencePieceProcessor()
    try:
      self._pieces.LoadFromSerializedProto(content)
    except RuntimeError as error:
      raise UserError(f"data.tokenizer={str(path)!r} is not a SentencePiece model") from error
    self._sha256 = hashlib.sha256(content).hexdigest()
    self.boundary = self._pieces.vocab_size()
    self.vocab_size = self.boundary + 1
    self._adds_space = self._pieces.IdToPiece(self._pieces.encode("a")[0]).startswith("▁")

  def encode(self, text: bytes | str) -> np.ndarray:
    """Returns the ids [T] int32 of a text, without any boundary."""
    return np.asarray(self._pieces.encode(_as_bytes(text).decode()), np.int32)

  def decode(self, ids) -> bytes:
    """Returns the text of ids that begin a document: the space the model puts in front is gone."""
    text = b"".join(self.decode_bytes(int(id)) for id in ids)
    return text.removeprefix(b" ") if self._adds_space else text

  def decode_bytes(self, id: int) -> bytes:
    """Returns the bytes of one id, for printing a sample while it grows."""
    _check_id(id, self.vocab_size)
    if id == self.boundary or self._pieces.IsControl(id):
      return b""
    if self._pieces.IsUnknown(id):
      return "\N{REPLACEMENT CHARACTER}".encode()
    piece = self._pieces.IdToPiece(id)
    if self._pieces.IsByte(id):
      return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()

  def fingerprint(self) -> str:
    """Returns a name that changes whenever the ids of some text would."""
    return f"sentencepiece-{self._sha256}"


def load(name: str) -> ByteTokenizer | SentencePieceTokenizer:
  """Returns the tokenizer that `data.tokenizer` names: "bytes" or the path of a .model file."""
  if name == "bytes":
    return ByteTokenizer()
  if name.endswith(".model"):
    return SentencePieceTokenizer(name)
  raise UserError(
    f'data.tokenizer={name!r} is unknown: allowed are "bytes" and the path of a SentencePiece '
    "model (*.model)"
  )


def _as_bytes(text: bytes | str) -> bytes:
  return text.encode() if isinstance(text, str) else text


def _check_id(id: int, vocab_size: int) -> None:
  if not 0 <= id < vocab_size:
    raise ValueError(f"id={id} is no token: the vocabulary has ids 0 to {vocab_size - 1}")
