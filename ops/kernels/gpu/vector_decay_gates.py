"""Gates of the vector decay inside the kernels: sums between tokens, and which chunks are hard.

A sum of gates between two tokens is a row of zeros and ones times the gates: a product for the
tensor cores, with the gates as a sum of bfloat16 terms. Most chunks decay so little that all is
relative to their start,

  q_i . k_j exp(g_j+1 + .. + g_i) = (q_i exp(b_i)) . (k_j exp(-b_j))          b sums from the start

with factors up to exp(-LIMIT). The others, and those where a document starts, are hard:
`vector_decay_levels.py`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.mosaic import WGMMA, along_columns, along_rows

CHUNK = 64  # tokens: the rows of one wgmma
TILE = 64  # columns; every tile is 64 by 64
LIMIT = -70.0  # the sum of a chunk's gates from which on factors exp(-sum) might overflow


def positions(zero: int | jax.Array = 0) -> tuple[jax.Array, jax.Array]:
  """Row and column of each element of a tile.

  A `zero` that the compiler does not know keeps it from making them long before they are needed,
  and from keeping registers busy with them.
  """
  both = (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), n, layout=WGMMA) for n in (0, 1))
  return tuple(x + zero for x in both)


def store_mask(target, mask):
  """Ones where `mask`, else zeros."""
  target[...] = jnp.where(mask, 1.0, 0.0).astype(target.dtype)


def store_terms(gates: jax.Array, targets: Sequence):
  """Tiles whose sum is `gates`, rounded if there is one."""
  for target in targets:
    term = gates.astype(target.dtype)
    target[...] = term
    gates = gates - term.astype(jnp.float32)


def sums(mask, terms: Sequence) -> jax.Array:
  """[i d] the gates of channel d, summed over the tokens j where mask_ij is 1."""
  return mosaic.products((CHUNK, TILE), [(mask, term) for term in terms])


def sums_and_totals(mask, upper, tiles: Sequence, simulated: bool):
  """For each of some tiles, given as their terms, `sums`, and [d] those over all tokens.

  `upper` has ones on and above the diagonal.
  """
  groups = []
  for terms in tiles:
    groups.append((mosaic.zeros(CHUNK, TILE), [(mask, term) for term in terms]))
    turned = [(term.transpose((1, 0)), upper) for term in terms]
    groups.append((mosaic.zeros(TILE, CHUNK), turned))
  found = accumulate(simulated, *groups)
  # Sums do not increase.
  return found[::2], [x.min(1) for x in found[1::2]]


def accumulate(simulated: bool, *terms) -> list[jax.Array]:
  """`mosaic.accumulate_sums`; the interpreter knows no accumulator with a start."""
  if simulated:
    return [start + mosaic.products(start.shape, pairs) for start, pairs in terms]
  return mosaic.accumulate_sums(*terms)


class Documents:
  """Starts of documents since the chunk's start, per token, float32 [C] in shared memory."""

  def __init__(self, ref):
    self.ref = ref

  @property
  def last(self):
    return self.ref[CHUNK - 1]

  def rows(self) -> jax.Array:
    return plgpu.load(self.ref, layout=WGMMA.reduce(1))

  def pairs(self) -> jax.Array:
    """[i j] whether both are in one document."""
    columns = plgpu.load(self.ref, layout=WGMMA.reduce(0))
    return along_rows(self.rows(), CHUNK) == along_columns(columns, CHUNK)

  def goes_on(self, zero: jax.Array) -> jax.Array:
    """[i] 0 where a document starts, else 1; `zero` as in `positions`."""
    i, j = positions(zero)
    earlier = jnp.where(self.pairs() & (i > j), 1.0, 0.0).sum(1)
    return jnp.where((earlier == 0.0) & (self.rows() != 0.0), 0.0, 1.0)

  def before(self, x: jax.Array) -> jax.Array:
    """Rows of the document that was there before the chunk; the others are 0."""
    return jnp.where(along_rows(self.rows(), x.shape[1]) == 0.0, x, 0.0)

  def after(self, x: jax.Array) -> jax.Array:
    """Rows of the document that goes on after the chunk; the others are 0."""
    return jnp.where(along_rows(self.rows(), x.shape[1]) == self.last, x, 0.0)


def all_products(left, right) -> jax.Array:
  """left right^T over all tiles of channels."""
  tiles = range(left.shape[0])
  pairs = [(left.at[tile], right.at[tile].transpose((1, 0))) for tile in tiles]
  return mosaic.products((CHUNK, CHUNK), pairs)


def chunk_by_chunk(steps: jax.Array, prepare: Callable, step: Callable, states, gates):
  """The states after all steps.

  Chunks that are not hard have a loop of their own, which does not have to spare registers for the
  others.

  Args:
    steps: how many chunks there are, int32.
    prepare: `prepare(n, gates)` is whether the n-th chunk is hard, a `zero` for `positions`, and
      sums of the gates from the chunk's start.
    step: `step(n, states, sums, zero)` is the states after the chunk and the gates of the next one;
      for a hard chunk `sums` is None, for others `zero` is.
  """

  def next_easy(carried):
    n, _, zero, states, gates = carried
    hard, zero, sums = prepare(n, gates)
    hard = hard.astype(jnp.int32)
    states, gates = lax.cond(
      hard == 0, lambda sums, states, _: step(n, states, sums, None),
      lambda sums, *carried: carried, sums, states, gates,
    )  # fmt: skip
    return n + 1 - hard, hard, zero, states, gates

  def up_to_hard(carried):
    n, hard, zero, states, gates = lax.while_loop(
      lambda carried: (carried[0] < steps) & (carried[1] == 0), next_easy, carried
    )
    states, gates = lax.cond(
      hard == 1,
      lambda states, _: step(n, states, None, zero),
      lambda *carried: carried,
      states,
      gates,
    )
    return n + hard, jnp.int32(0), zero, states, gates

  zero = jnp.int32(0)
  carried = zero, zero, zero, states, gates
  return lax.while_loop(lambda carried: carried[0] < steps, up_to_hard, carried)[3]


def is_hard(totals, documents) -> tuple[jax.Array, jax.Array]:
  """Whether a chunk is hard, by its gates' sums [K] and documents, and a `zero` for `positions`."""
  least = jnp.min(plgpu.load(totals, layout=WGMMA.reduce(0)))
  hard = least < LIMIT
  if documents is not None:
    hard = hard | (documents.last != 0.0)
  return hard, (least > 1.0).astype(jnp.int32)
