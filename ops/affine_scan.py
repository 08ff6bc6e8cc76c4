"""h_t = A_t h_{t-1} + b_t for affine maps of every kind, in chunks of tokens that lie side by side.

Time comes first and is cut into windows [S W B ...]. A window is solved in N chunks of C tokens:
one step of a loop over C works on N rows, one of every chunk. Three loops make a scan: the map of
each chunk as a whole, the states between chunks, the states within. No product of more than C
transitions is ever formed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ops import affine, dispatch
from ops.precision import varying_like
from ops.segments import where_mask

CACHED = 2**15  # numbers per array that a CPU caches along with the others of a solution


class Plan(NamedTuple):
  """How T tokens lie: S windows of N chunks of C, the last ones filled up."""

  T: int
  S: int
  N: int
  C: int

  @property
  def filled(self) -> bool:
    """Whether there are tokens that nobody gave."""
    return self.S * self.N * self.C != self.T


def choose_plan(T: int, size: int, window: int | None = None) -> Plan:
  """For T tokens of `size` numbers each, in windows of at least `window` if that is given.

  On a CPU a window is what its cache holds, and chunks balance the loops; on a GPU there is one
  chunk, of everything, for an associative scan.
  """
  if window is None:
    window = max(256, CACHED // size) if dispatch.platform() == "cpu" else T
  S = -(-T // window)
  W = -(-T // S)
  C = W if dispatch.platform() == "gpu" else min(W, max(8, 1 << (W.bit_length() // 2)))
  return Plan(T, S, -(-W // C), C)


def to_windows(x: Array, plan: Plan, *, edge: bool = False) -> Array:
  """[B T ...] as [S W B ...], filled up with zeros, or with the last token again where `edge`."""
  x = jnp.moveaxis(x, 1, 0)
  if plan.filled:
    fill = ((0, plan.S * plan.N * plan.C - plan.T),) + ((0, 0),) * (x.ndim - 1)
    x = jnp.pad(x, fill, mode="edge" if edge else "constant")
  return x.reshape(plan.S, plan.N * plan.C, *x.shape[1:])


def from_windows(x: Array, plan: Plan) -> Array:
  """[S W B ...] as [B T ...]."""
  return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[: plan.T], 0, 1)


def before(h: Array, state: Array, start: Bool[Array, "W B"] | None) -> Array:
  """The states before each token of a window: those of the token to the left, `state` [B ...]
  before the first, zero at a `start`."""
  h = jnp.concatenate([state[None], h[:-1]])
  return h if start is None else where_mask(~start, h)


class Scan(NamedTuple):
  """A scan of a window, before it is known what enters it."""

  whole: Callable[[], affine.Affine]  # the window as one map
  states: Callable[..., tuple[Array, Array]]  # what `affine_scan` returns, for what enters


def affine_scan(
  elements: affine.Affine,
  state: Array,
  C: int,
  *,
  reverse: bool = False,
  incoming: bool = False,
  **kind: bool,
) -> tuple[Array, Array]:
  """All states of h_t = A_t h_{t-1} + b_t.

  Args:
    elements: the maps of a window, [W B ...].
    state: [B ...], before the first token, or after the last where `reverse`.
    C: tokens per chunk, which divides W.
    reverse: from the right: h_t = A_t h_{t+1} + b_t.
    incoming: return the states that go into the maps, not those that come out.
    **kind: of the maps, as in `ops.affine`.

  Returns:
    The states [W B ...], and the last one [B ...].
  """
  return begin_scan(elements, C, reverse=reverse, **kind).states(state, incoming=incoming)


def begin_scan(elements: affine.Affine, C: int, *, reverse: bool = False, **kind: bool) -> Scan:
  """As `affine_scan`, for who must tell others the window's map to learn what enters it."""
  begin = _associative if dispatch.platform() == "gpu" else functools.partial(_chunked, C=C)
  with jax.default_matmul_precision("highest"):
    whole, solve = begin(elements, reverse=reverse, kind=kind)

  def exact_whole():
    with jax.default_matmul_precision("highest"):
      return whole()

  def states(state, *, incoming=False):
    state = varying_like(state, *elements)
    with jax.default_matmul_precision("highest"):
      h = solve(state)
    last = h[0] if reverse else h[-1]
    if incoming:
      h = jnp.concatenate([h[1:], state[None]] if reverse else [state[None], h[:-1]])
    return h, last

  return Scan(exact_whole, states)


def _associative(elements, *, reverse, kind):
  """In log W steps, each over everything."""
  compose = lambda earlier, later: affine.compose(earlier, later, **kind)
  prefix = jax.lax.associative_scan(compose, elements, reverse=reverse)
  whole = lambda: jax.tree.map(lambda x: x[0 if reverse else -1], prefix)
  everywhere = lambda state: jnp.broadcast_to(state, elements.input.shape)
  return whole, lambda state: affine.apply(prefix, everywhere(state), **kind)


def _chunked(elements, *, C, reverse, kind):
  W = elements.input.shape[0]
  chunks = jax.tree.map(lambda x: x.reshape(W // C, C, *x.shape[1:]), elements)
  # Of a single chunk only who asks for it needs the map.
  maps = functools.cache(lambda: _whole(chunks, reverse, kind))

  def whole():
    one = maps() if C == W else _whole(jax.tree.map(lambda x: x[None], maps()), reverse, kind)
    return jax.tree.map(lambda x: x[0], one)

  def solve(state):
    between = state[None] if C == W else _between(maps(), state, reverse, kind)
    return _within(chunks, between, reverse, kind).reshape(elements.input.shape)

  return whole, solve


# The loops count in unsigned numbers: of others XLA asks at every step whether they are negative.
def _at(i, C, reverse):
  return C - 1 - i if reverse else i


def _whole(chunks, reverse, kind):
  """The map of each chunk, [N B ...]."""
  C = chunks.input.shape[1]

  def step(i, whole):
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, _at(i, C, reverse), 1, keepdims=False)
    return affine.compose(whole, jax.tree.map(pick, chunks), **kind)

  first = affine.identity(jax.tree.map(lambda x: x[:, 0], chunks), **kind)
  return jax.lax.fori_loop(np.uint32(0), np.uint32(C), step, first)


def _between(whole, state, reverse, kind):
  """The states before each chunk, [N B ...]."""
  step = lambda h, element: (affine.apply(element, h, **kind), h)
  return jax.lax.scan(step, state, whole, reverse=reverse)[1]


def _within(chunks, between, reverse, kind):
  """All states [N C B ...] of chunks that begin at `between`.

  They are written where the inputs were, each after the input has been read: a loop that fills
  another array would clear it first.
  """
  C = chunks.input.shape[1]

  def step(i, carry):
    h, states = carry
    at = _at(i, C, reverse)
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, at, 1, keepdims=False)
    h = affine.apply(jax.tree.map(pick, chunks._replace(input=states)), h, **kind)
    return h, jax.lax.dynamic_update_index_in_dim(states, h, at, 1)

  return jax.lax.fori_loop(np.uint32(0), np.uint32(C), step, (between, chunks.input))[1]
