import collections
import itertools

import numpy as np
import pytest

from experiments.data import streaming
from experiments.data.streaming import StreamingBatches, evaluation_batches
from experiments.data.token_store import TokenStore


def read_rows(batches) -> list[list[tuple]]:
  """Checks that rows run on from batch to batch; returns per row (position, input, target)."""
  rows, last = None, None
  for batch in batches:
    if rows is None:
      rows = [[] for _ in batch["inputs"]]
      last = [None] * len(rows)
    assert batch["continues"].dtype == bool
    for r, row in enumerate(rows):
      real = batch["segment_ids"][r] >= 0
      count = real.sum()
      assert real[:count].all()
      for name in ("inputs", "targets", "positions"):
        assert not batch[name][r][count:].any()
      if not count:
        assert not batch["continues"][r]
        continue
      inputs, targets, positions, ids = (
        batch[name][r][:count].tolist()
        for name in ("inputs", "targets", "positions", "segment_ids")
      )
      # A token continues its document exactly when it is not the boundary that opens one.
      assert batch["continues"][r] == (inputs[0] != 256)
      if last[r] is not None:
        previous_position, previous_target = last[r]
        assert inputs[0] == previous_target
        assert positions[0] == (previous_position + 1 if batch["continues"][r] else 0)
      assert ids == list(itertools.accumulate((int(i == 256) for i in inputs[1:]), initial=0))
      assert inputs[1:] == targets[:-1]
      row += zip(positions, inputs, targets)
      last[r] = (positions[-1], targets[-1])
  return rows


def documents_of(row: list[tuple]) -> list[bytes]:
  """Returns the whole documents in a row, each with its boundaries checked."""
  documents, current = [], None
  for position, token, target in row:
    if token == 256:
      assert position == 0
      current = []
    else:
      current.append(token)
      assert position == len(current)
    if target == 256:
      documents.append(bytes(current))
  return documents


@pytest.mark.parametrize("T", [1, 7, 64, 500])
def test_rows_run_on_without_a_gap(make_store, texts, T):
  batches = StreamingBatches(make_store(texts), 3, T, seed=0)
  rows = read_rows(batches[n] for n in range(-(-1500 // T)))
  assert {len(row) for row in rows} == {T * -(-1500 // T)}
  for row in rows:
    assert set(documents_of(row)) <= set(texts)


@pytest.mark.parametrize("batch_size", [1, 3, 15])
def test_every_document_once_per_epoch(make_store, texts, batch_size, monkeypatch):
  monkeypatch.setattr(streaming, "_ROUNDS", 3)  # many hands in a short test
  batches = StreamingBatches(make_store(texts), batch_size, 16, seed=5)
  rows = [documents_of(row) for row in read_rows(batches[n] for n in range(600))]
  # Deal the rows' documents back into one sequence: it must be one permutation after the other.
  rounds = min(map(len, rows))
  dealt = [row[k] for k in range(rounds) for row in rows]
  epochs = [dealt[i : i + len(texts)] for i in range(0, len(dealt), len(texts))][:-1]
  assert len(epochs) > 5
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(texts)
  assert len({tuple(epoch) for epoch in epochs}) > 1


def numbered_store(lengths: list[int]) -> TokenStore:
  """Documents of so many tokens after the boundary; token i of the stream is 1000 + i."""
  starts = np.cumsum([0, *(length + 1 for length in lengths)])
  tokens = 1000 + np.arange(starts[-1] + 1, dtype=np.uint16)
  tokens[starts] = 256
  return TokenStore(tokens, starts, sum(lengths), 256, 0)


def segments_of(batches) -> list[list[list[int]]]:
  """Returns per row the places in a numbered stream of each segment, after the promised checks.

  A segment goes on in the next batch if `continues` says so; the last one may be unfinished.
  """
  rows = None
  for batch in batches:
    rows = rows or [[] for _ in batch["inputs"]]
    places = batch["targets"] - 1001
    places = np.where(batch["targets"] == 256, batch["inputs"] - 1000, places)
    expected = np.where(batch["positions"] == 0, 256, 1000 + places)
    assert np.array_equal(batch["inputs"], expected)
    for row, ids, continues, found, positions in zip(
      rows, batch["segment_ids"], batch["continues"], places.tolist(), batch["positions"]
    ):
      assert ids[0] == 0 and set(np.diff(ids)) <= {0, 1}
      for new, place, position in zip(
        [not continues, *np.diff(ids)], found, positions.tolist(), strict=True
      ):
        if new:
          row.append([])
        row[-1].append((place, position))
  return rows


@pytest.mark.parametrize("T", [1, 16, 150])
@pytest.mark.parametrize(
  "lengths, batch_size", [([400], 2), ([400], 7), ([90, 3, 200], 4), ([1, 1, 300], 20), ([5], 11)]
)
def test_too_few_documents_are_cut_and_their_pieces_dealt(lengths, batch_size, T, monkeypatch):
  monkeypatch.setattr(streaming, "_ROUNDS", 3)
  store = numbered_store(lengths)
  targets = len(store.tokens) - 1
  longest = -(-targets // batch_size)
  batches = StreamingBatches(store, batch_size, T, seed=2)
  rows = segments_of(batches[n] for n in range(12 * longest // T + 2))

  again = 0
  for row in rows:
    for segment in row:
      begin, position = segment[0]
      # In one document, without a gap, at the positions that its tokens have there.
      assert segment == [(begin + i, position + i) for i in range(len(segment))]
      assert begin - position in store.starts and len(segment) <= longest
      assert not set(store.starts) & {place for place, _ in segment[1:]}
    again += sum(a[-1][0] + 1 == b[0][0] and b[0][1] > 0 for a, b in itertools.pairwise(row[:-1]))
  # A piece that follows the one before it in its document begins anew all the same.
  assert again or lengths != [400]

  dealt = [row[k] for k in range(min(map(len, rows)) - 1) for row in rows]
  epochs, left = 0, list(dealt)
  while left:
    epoch = []
    while left and sum(map(len, epoch)) < targets:
      epoch.append(left.pop(0))
    places = sorted(place for segment in epoch for place, _ in segment)
    if left:
      assert places == list(range(targets))
      assert len(epoch) >= min(batch_size, targets)
      epochs += 1
  assert epochs > 5
  # No two rows read the same at the same time, as far as the first round goes.
  assert len({segment[0][0] for segment in dealt[:batch_size]}) == min(batch_size, targets)


@pytest.mark.parametrize("documents, is_cut", [(5, True), (6, False), (7, False)])
def test_documents_are_cut_only_where_rows_outnumber_them(documents, is_cut):
  store = numbered_store([*[2] * (documents - 1), 300])
  rows = segments_of(StreamingBatches(store, 6, 10, seed=0)[n] for n in range(100))
  longest = max(len(segment) for row in rows for segment in row)
  assert longest == 301 or (is_cut and longest < 60)
  evaluated = [batch for batch in evaluation_batches(store, 6, 10)]
  assert (
    sum((~batch["continues"] & (batch["positions"][:, 0] > 0)).sum() for batch in evaluated) == 0
  )
  assert max(batch["positions"].max() for batch in evaluated) == 300


@pytest.mark.parametrize("batch_size", [4, 40])
def test_seed_and_number_decide_alone(make_store, texts, monkeypatch, batch_size):
  monkeypatch.setattr(streaming, "_ROUNDS", 3)
  store = make_store(texts)
  make = lambda seed, rows=slice(None): StreamingBatches(store, batch_size, 8, seed, rows)
  half = batch_size // 2
  forwards, backwards = make(0), make(0)
  parts = [make(0, slice(half)), make(0, slice(half, batch_size))]
  expected = [forwards[n] for n in range(200)]
  for n in reversed(range(200)):
    for name, values in backwards[n].items():
      assert np.array_equal(values, expected[n][name])
      assert np.array_equal(values, np.concatenate([part[n][name] for part in parts]))
  far = make(0)[5000]
  assert np.array_equal(far["inputs"], forwards[5000]["inputs"])
  assert not np.array_equal(make(1)[0]["inputs"], expected[0]["inputs"])


def test_a_document_after_itself_starts_anew(make_store):
  batches = StreamingBatches(make_store([b"abc"]), 1, 8, seed=0)
  assert batches[0]["inputs"].tolist() == [[256, 97, 98, 99, 256, 97, 98, 99]]
  assert batches[0]["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
  assert batches[1]["continues"].tolist() == [False]


@pytest.mark.parametrize("T", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 30])
def test_evaluation_is_every_target_once(make_store, texts, batch_size, T):
  store = make_store(texts)
  batches = evaluation_batches(store, batch_size, T)
  rows = read_rows(batches)
  assert len(list(batches)) == len(batches) == -(-max(map(len, rows)) // T)
  documents = [document for row in rows for document in documents_of(row)]
  assert collections.Counter(documents) == collections.Counter(texts)
  assert sum(map(len, rows)) == len(store.tokens) - 1
  assert batches.tokens_per_byte * sum(map(len, texts)) == pytest.approx(len(store.tokens) - 1)
  if batch_size == 3:
    loads = sorted(map(len, rows))
    assert loads[-1] - loads[0] <= min(map(len, texts)) + 30
  with pytest.raises(IndexError):
    batches[len(batches)]


def test_longest_documents_come_first_to_the_emptiest_row(make_store):
  store = make_store([b"a" * n for n in (1, 8, 3, 5)])
  rows = read_rows(evaluation_batches(store, 2, 4))
  assert [list(map(len, documents_of(row))) for row in rows] == [[8, 1], [5, 3]]


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_rows_are_loaded_greedily(make_store, batch_size):
  lengths = np.random.default_rng(batch_size).integers(1, 60, 70).tolist()
  rows = read_rows(evaluation_batches(make_store([b"a" * n for n in lengths]), batch_size, 50))
  loads = [0] * batch_size
  for length in sorted(lengths, reverse=True):
    loads[loads.index(min(loads))] += length + 1
  assert sorted(map(len, rows)) == sorted(loads)


@pytest.mark.parametrize("max_tokens", [1, 50, 200, 10**9])
def test_evaluation_of_a_prefix(make_store, texts, max_tokens):
  store = make_store(texts)
  expected = min(max_tokens, len(store.tokens) - 1)
  found = collections.Counter()
  for batch in evaluation_batches(store, 3, 16, max_tokens):
    real = batch["segment_ids"] >= 0
    found.update(zip(batch["inputs"][real].tolist(), batch["targets"][real].tolist()))
  stream = store.tokens.tolist()
  assert found == collections.Counter(itertools.pairwise(stream[: expected + 1]))


def test_slices_of_evaluation_join(make_store, texts):
  store = make_store(texts)
  whole = evaluation_batches(store, 4, 16)
  parts = [evaluation_batches(store, 4, 16, rows=slice(i, i + 1)) for i in range(4)]
  assert {len(part) for part in parts} == {len(whole)}
  for n, batch in enumerate(whole):
    for name, values in batch.items():
      assert np.array_equal(values, np.concatenate([part[n][name] for part in parts]))
