"""What holds for the batches of every task."""

import zlib

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks.arrow import ArrowBatches, ArrowTokenBatches
from experiments.tasks.parity import ParityBatches
from experiments.tasks.rays import RayBatches

# A maker of (batch_size, seed, rows), and the CRC of batch 3 of 4 rows of seed 5.
TASKS = {
  "parity": (lambda size, seed, rows: ParityBatches(size, 300, seed, rows), 3427983394),
  "last": (
    lambda size, seed, rows: ParityBatches(size, 1, seed, rows, supervise="last"),
    1620158447,
  ),
  "rays": (lambda size, seed, rows: RayBatches(size, 9, seed, rows), 3117069096),
  "tokens": (lambda size, seed, rows: ArrowTokenBatches(size, 8, seed, rows), 3300571017),
  "arrow": (lambda size, seed, rows: ArrowBatches(size, 192, seed, rows, examples=10), 3508321695),
  "endless": (lambda size, seed, rows: ArrowBatches(size, 96, seed, rows, 0, scale=0.5), 738760506),
}
ALL = slice(None)


@pytest.fixture(params=TASKS)
def task(request):
  return TASKS[request.param]


def equal(one, other):
  return one.keys() == other.keys() and all(
    one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
  )


def joined(batches):
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_the_data_are_fixed_for_ever(task):
  # If these change, no run can be resumed or compared exactly after an upgrade.
  make, expected = task
  batch = make(4, 5, ALL)[3]
  crc = 0
  for name in sorted(batch):
    values = batch[name]
    # What the last bits of a cosine are is the machine's business.
    if values.dtype == np.float32:
      values = np.round(values * 1000).astype(np.int32)
    crc = zlib.crc32(np.ascontiguousarray(values, values.dtype.newbyteorder("<")), crc)
  assert crc == expected


def test_seed_and_number_decide_alone(task):
  make, _ = task
  forwards, backwards, other = make(4, 5, ALL), make(4, 5, ALL), make(4, 6, ALL)
  batches = [forwards[n] for n in range(6)]
  assert all(equal(backwards[n], batches[n]) for n in reversed(range(6)))
  assert not equal(joined([other[n] for n in range(6)]), joined(batches))
  # Batches of another size hold the same sequence of examples.
  sixes = make(6, 5, ALL)
  assert equal(joined([sixes[n] for n in range(4)]), joined(batches))


def test_slices_of_rows_join_to_the_batch(task):
  make, _ = task
  whole = make(4, 5, ALL)
  parts = [make(4, 5, rows) for rows in (slice(0, 1), slice(1, 3), slice(3, None))]
  for n in (0, 2):
    assert equal(joined([part[n] for part in parts]), whole[n])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ParityBatches(0, 8, 0), "batch_size=0 examples: at least 1"),
    (lambda: ParityBatches(1, 0, 0), "T=0 bits per row: at least 1"),
    (lambda: ParityBatches(1, 8, 0, supervise="first"), "supervise='first'.*all, last"),
    (lambda: RayBatches(1, 0, 0), "side=0 cells: at least 1"),
    (lambda: RayBatches(1, 8, -1), "seed=-1 must be at least 0"),
    (lambda: RayBatches(1, 8, 2**64), "seed=18446744073709551616 must be"),
    (lambda: ArrowBatches(1, 180, 0), "side=180 pixels: at least 181"),
    (lambda: ArrowBatches(1, 90, 0, scale=0.5), "side=90 pixels: at least 181 times .* 0.5"),
    (lambda: ArrowBatches(1, 192, 0, scale=0), "scale=0 must be"),
    (lambda: ArrowBatches(1, 192, 0, scale=float("nan")), "scale=nan must be"),
    (lambda: ArrowBatches(1, 192, 0, examples=-1), "examples=-1 must be"),
    (lambda: ArrowTokenBatches(1, 6, 0), "side=6 cells: at least 7"),
  ],
)
def test_bad_arguments_are_named(make, message):
  with pytest.raises(UserError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value)
