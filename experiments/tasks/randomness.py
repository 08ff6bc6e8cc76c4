"""Random numbers of an endless sequence of examples, each a pure function of (seed, index)."""

import numpy as np

from experiments.errors import UserError

# Of 64 bits, that one step of a Philox generator's counter yields.
_WORDS = 4


def words(seed: int, first: int, count: int, each: int) -> np.ndarray:
  """Returns the random words [count each] uint64 of the examples first, first + 1, ...

  Raw words of a Philox generator, which numpy promises to keep for ever. Its counter is set to the
  first example, so neither the size of the batches nor what was read before matters.

  Args:
    seed: 0 <= seed < 2**64.
    first: index of the first example.
    count: number of examples.
    each: words that an example takes.
  """
  steps = -(-each // _WORDS)
  generator = np.random.Philox(
    key=np.array([seed, 0], np.uint64), counter=np.array([first * steps, 0, 0, 0], np.uint64)
  )
  return generator.random_raw(count * steps * _WORDS).reshape(count, -1)[:, :each]


def uniform(words: np.ndarray) -> np.ndarray:
  """Returns numbers in [0, 1), float64, made of the upper 53 bits as numpy's generators do."""
  return (words >> np.uint64(11)) * 2.0**-53


def bits(words: np.ndarray, count: int) -> np.ndarray:
  """Returns the first `count` bits [... count] uint8 of each row of words."""
  octets = np.ascontiguousarray(words, "<u8").view(np.uint8)
  return np.unpackbits(octets, axis=-1, count=count, bitorder="little")


def check(batch_size: int, seed: int) -> None:
  """Raises UserError where no examples can be made of these."""
  if batch_size < 1:
    raise UserError(f"batch_size={batch_size} examples: at least 1 is needed")
  if not 0 <= seed < 2**64:
    raise UserError(f"seed={seed} must be at least 0 and less than 2**64")
