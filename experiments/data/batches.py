"""From places in a token stream to the dict that a training step takes."""

import numpy as np

from experiments.data.token_store import TokenStore


def make_batch(store: TokenStore, places: np.ndarray) -> dict[str, np.ndarray]:
  """Gathers a batch from the stream.

  Args:
    store: the tokens.
    places: index in the stream of each input token [B T]; -1 is padding, at the end of a row only.

  Returns:
    int32 arrays [B T]: inputs; targets (the token after the input in the stream, which is the
    boundary where a document ends); segment_ids (0, 1, ... for the documents of a row in order, -1
    at padding); positions (index of the input in its document, whose boundary has 0). At padding
    inputs, targets and positions are 0.
  """
  real = places >= 0
  known = np.where(real, places, 0)
  inputs = store.tokens[known].astype(np.int32)
  targets = store.tokens[known + 1].astype(np.int32)
  is_start = inputs == store.boundary
  segment_ids = np.cumsum(is_start[:, 1:], axis=1, dtype=np.int32)
  segment_ids = np.pad(segment_ids, ((0, 0), (1, 0)))
  column = np.arange(places.shape[1])
  first = known[:, :1]
  document = np.searchsorted(store.starts, first, side="right") - 1
  start_column = np.where(is_start, column, store.starts[document] - first)
  positions = column - np.maximum.accumulate(start_column, axis=1)
  return {
    "inputs": np.where(real, inputs, 0),
    "targets": np.where(real, targets, 0),
    "segment_ids": np.where(real, segment_ids, -1),
    "positions": np.where(real, positions, 0).astype(np.int32),
  }
