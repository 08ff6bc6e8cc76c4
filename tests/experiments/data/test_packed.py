import numpy as np
import pytest

from experiments.data.packed import PackedBatches


def rows_of(batch):
  """Yields (inputs, targets, segment_ids, positions) of each row, padding removed."""
  for row in zip(*(batch[name] for name in ("inputs", "targets", "segment_ids", "positions"))):
    real = row[2] >= 0
    padding = np.flatnonzero(~real)
    assert np.array_equal(padding, np.arange(real.sum(), len(real)))
    assert not any(part[~real].any() for part in (row[0], row[1], row[3]))
    yield tuple(part[real] for part in row)


@pytest.mark.parametrize("T", [1, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_epoch_is_every_target_once(make_store, texts, T, batch_size):
  store = make_store(texts)
  stream = store.tokens.astype(int)
  count = -(-(len(stream) - 1) // T)
  batches = PackedBatches(store, batch_size, T, seed=3)
  rows = [row for n in range(-(-2 * count // batch_size)) for row in rows_of(batches[n])]
  orders = []
  for epoch in (rows[:count], rows[count : 2 * count]):
    seen, order = np.zeros(len(stream) - 1, int), []
    for inputs, targets, segment_ids, positions in epoch:
      # Where the row lies in the stream follows from what it holds: no two places look alike.
      places = [i for i in range(0, len(stream) - 1, T) if matches(stream[i:], inputs, targets)]
      place = next(i for i in places if not seen[i])
      seen[place : place + len(inputs)] += 1
      order.append(place)
      starts = inputs == 256
      assert segment_ids[0] == 0 and np.array_equal(np.diff(segment_ids), starts[1:])
      document = np.searchsorted(store.starts, np.arange(place, place + len(inputs)), "right") - 1
      assert np.array_equal(
        positions, np.arange(place, place + len(inputs)) - store.starts[document]
      )
    assert (seen == 1).all()
    orders.append(order)
  if T == 7:
    assert orders[0] != orders[1] != sorted(orders[1])


def matches(stream, inputs, targets):
  count = len(inputs)
  return np.array_equal(stream[:count], inputs) and np.array_equal(stream[1 : count + 1], targets)


def test_seed_and_number_decide_alone(make_store, texts):
  store = make_store(texts)
  make = lambda seed: PackedBatches(store, 4, 8, seed)
  forwards, backwards, other = make(0), make(0), make(1)
  expected = [forwards[n] for n in range(50)]
  for n in reversed(range(50)):
    for name, values in backwards[n].items():
      assert values.dtype == np.int32 and np.array_equal(values, expected[n][name])
  assert any(not np.array_equal(other[n]["inputs"], expected[n]["inputs"]) for n in range(3))


def test_slices_of_rows_join_to_the_batch(make_store, texts):
  store = make_store(texts)
  parts = [PackedBatches(store, 4, 8, 0, slice(i, i + 2)) for i in (0, 2)]
  for n in range(20):
    whole = PackedBatches(store, 4, 8, 0)[n]
    for name, values in whole.items():
      assert np.array_equal(values, np.concatenate([part[n][name] for part in parts]))
