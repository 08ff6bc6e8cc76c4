"""From places in a token stream to the dict that a training step takes."""

import numpy as np

from experiments.data.token_store import TokenStore


def make_batch(
  store: TokenStore, places: np.ndarray, cuts: np.ndarray | tuple = ()
) -> dict[str, np.ndarray]:
  """Gathers a batch from the stream.

  Args:
    store: the tokens.
    places: index in the stream of each input token [B T]; -1 is padding, at the end of a row only.
    cuts: indices in the stream where a segment begins, as it does where a document begins.

  Returns:
    int32 arrays [B T]: inputs; targets (the token after the input in the stream, which is the
    boundary where a document ends); segment_ids (0, 1, ... for the documents of a row in order, or
    for their pieces between cuts; -1 at padding); positions (index of the input in its document,
    whose boundary has 0). At padding inputs, targets and positions are 0.
  """
  real = places >= 0
  known = np.where(real, places, 0)
  inputs = store.tokens[known].astype(np.int32)
  targets = store.tokens[known + 1].astype(np.int32)
  begins = (inputs == store.boundary) | np.isin(known, cuts)
  begins[:, 0] = True
  # Segments numbered through all rows: each lies in one document.
  segment = np.cumsum(begins).reshape(begins.shape) - 1
  document = np.searchsorted(store.starts, known[begins], side="right") - 1
  positions = known - store.starts[document][segment]
  return {
    "inputs": np.where(real, inputs, 0),
    "targets": np.where(real, targets, 0),
    "segment_ids": np.where(real, segment - segment[:, :1], -1).astype(np.int32),
    "positions": np.where(real, positions, 0).astype(np.int32),
  }
