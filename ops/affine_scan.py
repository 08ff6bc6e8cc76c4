"""h_t = A_t h_{t-1} + b_t for affine maps of every kind, in chunks of tokens that lie side by side.

Arrays are folded from [B T ...] to [C N B ...]: token t is number i = t mod C of chunk n = t // C,
so that one step of a loop over C works on N whole rows of all chunks at once. Whoever needs many
scans of one length folds once. Three loops make a scan: the map of each chunk as a whole, the
states between chunks, and the states within. No product of more than C transitions is ever formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ops import affine, dispatch
from ops.precision import varying_like


class Fold(NamedTuple):
  """How T tokens lie: N chunks of C, the last one filled up."""

  T: int
  C: int
  N: int

  @property
  def filled(self) -> bool:
    """Whether there are tokens that nobody gave."""
    return self.C * self.N != self.T


def choose_fold(T: int) -> Fold:
  """One chunk of everything where an associative scan is best, else a balance of the loops."""
  C = T if dispatch.platform() == "gpu" else min(T, max(8, 1 << (T.bit_length() // 2)))
  return Fold(T, C, -(-T // C))


def fold(x: Array, plan: Fold, *, edge: bool = False) -> Array:
  """[B T ...] as [C N B ...], filled up with zeros, or with the last token again where `edge`."""
  fill = ((0, 0), (0, plan.C * plan.N - plan.T)) + ((0, 0),) * (x.ndim - 2)
  if plan.filled:
    x = jnp.pad(x, fill, mode="edge" if edge else "constant")
  x = x.reshape(x.shape[0], plan.N, plan.C, *x.shape[2:])
  return x.transpose(2, 1, 0, *range(3, x.ndim))


def unfold(x: Array, plan: Fold) -> Array:
  """[C N B ...] as [B T ...]."""
  x = x.transpose(2, 1, 0, *range(3, x.ndim))
  return x.reshape(x.shape[0], plan.C * plan.N, *x.shape[3:])[:, : plan.T]


def before(h: Array, state: Array, start: Bool[Array, "C N B"] | None) -> Array:
  """The states before each token: those of the token to the left, `state` [B ...] before the
  first, zero at a `start`."""
  first = jnp.concatenate([state[None], h[-1, :-1]])
  h = jnp.concatenate([first[None], h[:-1]])
  if start is None:
    return h
  return jnp.where(start.reshape(start.shape + (1,) * (h.ndim - 3)), jnp.zeros_like(h), h)


def affine_scan(
  elements: affine.Affine,
  state: Array,
  *,
  reverse: bool = False,
  incoming: bool = False,
  **kind: bool,
) -> tuple[Array, Array]:
  """All states of h_t = A_t h_{t-1} + b_t.

  Args:
    elements: folded maps, [C N B ...].
    state: [B ...], before the first token, or after the last where `reverse`.
    reverse: from the right: h_t = A_t h_{t+1} + b_t.
    incoming: return the states that go into the maps, not those that come out.
    **kind: of the maps, as in `ops.affine`.

  Returns:
    The states, folded, and the last one [B ...].
  """
  state = varying_like(state, *elements)
  with jax.default_matmul_precision("highest"):
    if dispatch.platform() == "gpu":
      return _associative(elements, state, reverse, incoming, kind)
    if elements.input.shape[1] == 1:
      last, h = _loop(elements, state[None], reverse, incoming, kind)
      return h, last[0]
    last, between = _loop(_whole(elements, reverse, kind), state, reverse, True, kind)
    return _loop(elements, between, reverse, incoming, kind)[1], last


def _whole(elements, reverse, kind):
  """The map of each chunk, [N B ...]."""
  first = affine.identity(jax.tree.map(lambda x: x[0], elements), **kind)
  step = lambda whole, element: (affine.compose(whole, element, **kind), None)
  return jax.lax.scan(step, first, elements, reverse=reverse)[0]


def _loop(elements, state, reverse, incoming, kind):
  """One map after the other along the first axis: the last state, and all of them."""

  def step(h, element):
    after = affine.apply(element, h, **kind)
    return after, h if incoming else after

  return jax.lax.scan(step, state, elements, reverse=reverse)


def _associative(elements, state, reverse, incoming, kind):
  """In log T steps, for one chunk of all tokens (N = 1)."""
  compose = lambda earlier, later: affine.compose(earlier, later, **kind)
  prefix = jax.lax.associative_scan(compose, elements, reverse=reverse)
  h = affine.apply(prefix, jnp.broadcast_to(state, elements.input.shape), **kind)
  last = h[0, 0] if reverse else h[-1, 0]
  if incoming:
    edge = state[None, None]
    h = jnp.concatenate([h[1:], edge] if reverse else [edge, h[:-1]])
  return h, last
