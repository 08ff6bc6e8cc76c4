import importlib.util
import io

import numpy as np
import pytest

from experiments.data import austen, tokenizers
from experiments.errors import UserError

TEXT = "Hello  wörld\n\tfoo ☃ 日本"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  sentencepiece = pytest.importorskip("sentencepiece")
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(austen.novel_text("emma").decode()[:50000].splitlines()),
    model_writer=written,
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp("pieces") / "small.model"
  path.write_bytes(written.getvalue())
  return path


def test_bytes_are_their_own_ids():
  tokenizer = tokenizers.load("bytes")
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and ids.tolist() == list(TEXT.encode())
  every_byte = bytes(range(256))
  assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte
  assert tokenizer.vocab_size == 257 and tokenizer.boundary == 256
  assert tokenizer.decode([72, 256, 105]) == b"Hi" and tokenizer.decode([]) == b""
  for wrong in (-1, 257):
    with pytest.raises(ValueError, match=f"id={wrong}"):
      tokenizer.decode([65, wrong])


def test_pieces_come_back_exactly(model):
  tokenizer = tokenizers.load(str(model))
  for text in (TEXT, " leading", "trailing \n", "", "Emma Woodhouse, handsome"):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.boundary not in ids
    assert tokenizer.decode(ids) == text.encode()
    assert b"".join(map(tokenizer.decode_bytes, ids.tolist())).removeprefix(b" ") == (
      text.encode().removeprefix(b" ") if not text.startswith(" ") else text.encode()
    )
  assert tokenizer.vocab_size == 401 and tokenizer.boundary == 400
  assert tokenizer.decode_bytes(tokenizer.boundary) == b""
  assert len(tokenizer.encode("Emma Woodhouse")) < len("Emma Woodhouse")


def test_fingerprints_tell_tokenizers_apart(model, tmp_path):
  other = tmp_path / "other.model"
  other.write_bytes(model.read_bytes())
  load = lambda name: tokenizers.load(str(name)).fingerprint()
  assert load(model) == load(other) != load("bytes")


def test_a_wrong_tokenizer_is_named(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"data.tokenizer='bpe' is unknown.*bytes.*model"):
    tokenizers.load("bpe")
  path = tmp_path / "x.model"
  with pytest.raises(UserError, match=r"x.model': there is no such file"):
    tokenizers.load(str(path))
  path.write_bytes(b"\xff\x00 no model")
  with pytest.raises(UserError, match=r"x.model' is not a SentencePiece model"):
    tokenizers.load(str(path))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install sentencepiece"):
    tokenizers.load(str(path))
