"""Streaming batches: each row reads document after document through consecutive batches.

Made for truncated backpropagation through time: the state after batch n is the initial state of
batch n + 1, row by row, unless `continues` is False there.
"""

import bisect
import functools
import heapq
import itertools
import threading
from collections.abc import Iterator

import numpy as np

from experiments.data.batches import make_batch
from experiments.data.order import ShuffledEpochs
from experiments.data.token_store import TokenStore

_ROUNDS = 64


class StreamingBatches:
  """`batches[n]` is batch n, a pure function of (seed, n).

  Documents are dealt to the rows like cards: place j of the endless sequence of shuffled epochs
  goes to row j mod batch_size, so each epoch holds every document once over all rows. A row with
  shorter documents runs ahead of the others. Rows may drift apart like this because to balance
  them would mean to cut documents, to pad, or to fix which documents share a row.

  Only a split with fewer documents than rows is cut, for else several rows would read the same
  document in step: see `_cuts`. Its pieces are dealt instead of documents, and each begins
  like a document, with a segment id of its own and `continues` False, but at its position in the
  document that it is part of.

  Args:
    store: the split.
    batch_size: rows of the global batch.
    T: tokens per row and batch.
    seed: of the order of the documents.
    rows: which rows of the global batch to make; all by default.
  """

  def __init__(
    self, store: TokenStore, batch_size: int, T: int, seed: int, rows: slice = slice(None)
  ):
    self._store, self._batch_size, self._T = store, batch_size, T
    self._rows = range(batch_size)[rows]
    self._cuts = _cuts(store.starts, batch_size)
    self._starts = np.union1d(store.starts, self._cuts) if len(self._cuts) else store.starts
    self._order = ShuffledEpochs(len(self._starts) - 1, seed)
    # A hand is _ROUNDS rounds of the deal; _hand_begins[h][r] is where hand h begins in row r.
    self._hand_begins = [np.zeros(batch_size, np.int64)]
    self._lock = threading.Lock()
    self._hand = functools.lru_cache(maxsize=16)(self._hand)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    end = (n + 1) * self._T
    with self._lock:
      while self._hand_begins[-1].min() < end:
        self._hand_begins.append(
          self._hand_begins[-1] + self._hand(len(self._hand_begins) - 1)[1][-1]
        )
    places = np.stack([self._places(row, end - self._T) for row in self._rows])
    return _make_batch(self._store, places, self._cuts)

  def _places(self, row: int, begin: int) -> np.ndarray:
    parts, missing = [], self._T
    hand = bisect.bisect_right(self._hand_begins, begin, key=lambda begins: begins[row]) - 1
    while missing:
      pieces, ends = self._hand(hand)
      places = _read_on(
        self._starts, pieces[:, row], ends[:, row], begin - self._hand_begins[hand][row], missing
      )
      parts.append(places)
      begin, missing, hand = begin + len(places), missing - len(places), hand + 1
    return np.concatenate(parts)

  def _hand(self, hand: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces [_ROUNDS B] of a hand and the sums of their lengths down each row."""
    size = _ROUNDS * self._batch_size
    pieces = self._order[hand * size : (hand + 1) * size].reshape(_ROUNDS, -1)
    lengths = self._starts[pieces + 1] - self._starts[pieces]
    return pieces, np.cumsum(lengths, axis=0)


class EvaluationBatches:
  """One exact pass over a split in the streaming layout: `len`, `batches[n]`, or iterate.

  Every target of every document comes exactly once. Documents go, longest first, to the row with
  the least to read; a row with nothing left is padded. Documents are never cut: each is read from
  its start with state.

  Args:
    store: the split.
    batch_size: rows of the global batch.
    T: tokens per row and batch.
    max_tokens: only the first so many targets of the stream; None for all.
    rows: which rows of the global batch to make; all by default.
  """

  def __init__(
    self,
    store: TokenStore,
    batch_size: int,
    T: int,
    max_tokens: int | None = None,
    rows: slice = slice(None),
  ):
    self._store, self._T = store, T
    limit = store.starts[-1] if max_tokens is None else max_tokens
    lengths = np.minimum(store.starts[1:], limit) - np.minimum(store.starts[:-1], limit)
    dealt = [[] for _ in range(batch_size)]
    loads = [(0, row) for row in range(batch_size)]
    for document in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]:
      load, row = heapq.heappop(loads)
      dealt[row].append(document)
      heapq.heappush(loads, (load + int(lengths[document]), row))
    self._batches = -(-max(load for load, _ in loads) // T)
    self._documents = [np.array(documents, np.int64) for documents in dealt[rows]]
    self._ends = [np.cumsum(lengths[documents]) for documents in self._documents]

  @property
  def tokens_per_byte(self) -> float:
    """That of the whole split, see TokenStore."""
    return self._store.tokens_per_byte

  def __len__(self) -> int:
    return self._batches

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return (self[n] for n in range(len(self)))

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    if not 0 <= n < len(self):
      raise IndexError(f"n={n}: there are {len(self)} batches")
    places = np.full((len(self._documents), self._T), -1, np.int64)
    for row, (documents, ends) in enumerate(zip(self._documents, self._ends)):
      found = _read_on(self._store.starts, documents, ends, n * self._T, self._T)
      places[row, : len(found)] = found
    return _make_batch(self._store, places)


def evaluation_batches(
  store: TokenStore,
  batch_size: int,
  T: int,
  max_tokens: int | None = None,
  rows: slice = slice(None),
) -> EvaluationBatches:
  """Returns one exact pass over a split in the streaming layout; see EvaluationBatches."""
  return EvaluationBatches(store, batch_size, T, max_tokens, rows)


def _cuts(starts: np.ndarray, batch_size: int) -> np.ndarray:
  """Returns where in the stream documents are to be cut; nowhere if they are enough for the rows.

  If not, a document of n of all N tokens is cut into ceil(n batch_size / N) pieces, equally long to
  a token. None is longer than N / batch_size, rounded up, and together they are at least batch_size
  (with fewer tokens than rows, each token is a piece, and named more than once here).
  """
  if len(starts) > batch_size:
    return np.zeros(0, np.int64)
  cuts = []
  for start, end in itertools.pairwise(starts.tolist()):
    pieces = -(-(end - start) * batch_size // int(starts[-1]))
    cuts.append(start + (end - start) * np.arange(1, pieces) // pieces)
  return np.concatenate(cuts)


def _read_on(
  starts: np.ndarray, pieces: np.ndarray, ends: np.ndarray, begin: int, count: int
) -> np.ndarray:
  """Returns where in the stream tokens begin to begin + count of the joined pieces are.

  Fewer than count where the pieces end before. Piece i is stream[starts[i] : starts[i + 1]], and
  `ends` are the sums of the pieces' lengths.
  """
  total = ends[-1] if len(ends) else 0
  reading = np.arange(begin, max(begin, min(begin + count, total)))
  which = np.searchsorted(ends, reading, side="right")
  first = np.concatenate([[0], ends[:-1]])[which]
  return starts[pieces[which]] + reading - first


def _make_batch(
  store: TokenStore, places: np.ndarray, cuts: np.ndarray | tuple = ()
) -> dict[str, np.ndarray]:
  batch = make_batch(store, places, cuts)
  continues = (batch["positions"][:, 0] > 0) & ~np.isin(places[:, 0], cuts)
  return {**batch, "continues": continues}
