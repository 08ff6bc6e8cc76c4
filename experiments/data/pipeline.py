"""The batches of a run, from the group `data` of its config."""

import sys
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from experiments import processes
from experiments.data import datasets, token_store, tokenizers
from experiments.data.batches import JoinedRows
from experiments.data.packed import PackedBatches
from experiments.data.streaming import EvaluationBatches, StreamingBatches
from experiments.errors import UserError

ALL_ROWS = (slice(None),)

_MODES = {"packed": PackedBatches, "streaming": StreamingBatches}

# What batch n depends on besides n, as a user knows it.
_ORDER = {
  "seed": "train.seed",
  "T": "data.T",
  "batch_size": "train.batch_size",
  "mode": "data.mode",
  "tokens": "the number of tokens to train on",
  "crc": "the CRC-32 of the tokens to train on",
  "name": "data.name",
  "length": "the length of an example",
  "examples": "data.examples",
}


class TrainBatches:
  """An endless iterator over batches, prepared ahead of time by threads.

  Batch n is a pure function of the order and n, so these are the state: the same in every process,
  and valid for any number of processes.

  Attributes:
    tokenizer: what encoded the text; None where there is none.
    tokens_per_byte: bits_per_byte = nats_per_token * tokens_per_byte / ln 2; None without text.
  """

  def __init__(self, batches, order: dict, tokenizer, tokens_per_byte: float, prefetch: int):
    self._order = order
    self.tokenizer = tokenizer
    self.tokens_per_byte = tokens_per_byte
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.range(sys.maxsize).map(batches.__getitem__)
    self._iterator = iter(dataset.to_iter_dataset(options))

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterator)

  def get_state(self) -> dict:
    """Returns the number of the batch that comes next and what else it depends on, JSON-able."""
    return {"next_batch": self._iterator.get_state()["next_index"], "order": dict(self._order)}

  def set_state(self, state: dict) -> None:
    """Goes on, or back, to the batch that `state` says.

    Raises:
      UserError: the state is of batches in another order.
    """
    # States once were without an order: they are trusted.
    saved = {**self._order, **state.get("order", {})}
    differences = [
      f"{_ORDER[name]} is {here!r} here, {saved[name]!r} in the checkpoint"
      for name, here in self._order.items()
      if saved[name] != here
    ]
    if differences:
      raise UserError(
        f"{'; '.join(differences)}: the data would not go on where they stopped; "
        "give the same, or another --workdir"
      )
    self._iterator.set_state({"next_index": int(state["next_batch"])})


def tokenizer(data_config):
  """Returns the tokenizer that data_config.tokenizer names."""
  return tokenizers.load(data_config.tokenizer)


def train_batches(
  data_config,
  *,
  batch_size: int,
  seed: int,
  rows: Sequence[slice] = ALL_ROWS,
) -> TrainBatches:
  """Returns the batches to train on, from the split data_config.train_split.

  Each batch is a dict of int32 arrays [B T]: inputs, targets, segment_ids (0, 1, ... along a row,
  -1 at padding, whose targets must not be counted), positions (index of the input in its
  document, whose boundary token has 0). In mode "streaming" also `continues`, bool [B]: the row's
  first token belongs to the document, or the piece of one, of its last token in the batch before.

  Args:
    data_config: the group `data`.
    batch_size: B over all processes.
    seed: of the order of rows or documents; 0 <= seed < 2**64.
    rows: which rows of the global batch to make, slices of them in order; all by default.

  Raises:
    UserError: a field that is wrong, data that are missing or unreadable, or a full disk.
  """
  if data_config.mode not in _MODES:
    raise UserError(f"data.mode={data_config.mode!r} is unknown: allowed are {', '.join(_MODES)}")
  if not 0 <= seed < 2**64:
    raise UserError(f"train.seed={seed} must be at least 0 and less than 2**64")
  if data_config.prefetch < 0:
    raise UserError(f"data.prefetch={data_config.prefetch} batches: at least 0 is needed")
  if batch_size < 1:
    raise UserError(f"train.batch_size={batch_size} rows: at least 1 is needed")
  encoder, store = _store(data_config, data_config.train_split)
  T, mode = data_config.T, data_config.mode
  order = {
    "seed": seed,
    "T": T,
    "batch_size": batch_size,
    "mode": mode,
    "tokens": len(store.tokens),
    "crc": store.crc32,
  }
  batches = JoinedRows(lambda part: _MODES[mode](store, batch_size, T, seed, part), rows)
  return TrainBatches(batches, order, encoder, store.tokens_per_byte, data_config.prefetch)


def evaluation_batches(
  data_config,
  split: str,
  *,
  batch_size: int,
  T: int | None = None,
  max_tokens: int | None = None,
  rows: Sequence[slice] = ALL_ROWS,
) -> JoinedRows:
  """Returns one exact pass over a split: the state is to be carried from batch to batch.

  Batches are those of mode "streaming", `len` of them; see EvaluationBatches.

  Args:
    data_config: the group `data`.
    split: a TFDS split string, such as data_config.validation_split.
    batch_size: B over all processes.
    T: tokens per row and batch; data_config.T by default.
    max_tokens: only the first so many targets of the split.
    rows: as in train_batches.

  Raises:
    UserError: as train_batches.
  """
  _, store = _store(data_config, split)
  make = lambda part: EvaluationBatches(store, batch_size, T or data_config.T, max_tokens, part)
  return JoinedRows(make, rows)


def _store(data_config, split: str):
  if data_config.T < 1:
    raise UserError(f"data.T={data_config.T} tokens per row: at least 1 is needed")
  encoder = tokenizer(data_config)
  cache_directory = Path(data_config.cache_directory).expanduser()
  # Where hosts share the cache, file locks may not hold between them.
  with processes.first_before_others():
    texts, key = datasets.open_texts(data_config, split)
    return encoder, token_store.open_or_create(texts, encoder, cache_directory, key)
