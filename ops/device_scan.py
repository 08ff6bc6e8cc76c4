"""Scans of affine maps over devices: the state that enters each device's part of time.

Device p holds a map h -> A_p h + b_p, its whole part of time as one step; what enters it is

  s_p = A_{p-1} s_{p-1} + b_{p-1},    s_0 given

With s bytes of state and m of transition, P devices, a device receives

  all_gather   (P - 1) (s + m), in one step        Sun et al., "LASP-2", 2025 (arXiv:2502.07563)
  all_scan     s, in P + K - 2 steps of s / K      Chou et al., "ZeCO", 2025 (arXiv:2507.01004)
  doubling     about (1 + log2 P) s + log2 P m, in 1 + log2 P steps      Hillis and Steele, 1986

A chain of sends needs no transitions: who receives a state applies its own.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ops import affine
from ops.segments import where_mask
from ops.time_axis import Split

LATENCY = 8.5e-6  # seconds a message takes to start, and
BANDWIDTH = 50e9  # bytes a second: between hosts; they only choose how many blocks all_scan sends


class Algebra(NamedTuple):
  """How maps act, and what is sent of a transition."""

  kind: tuple[tuple[str, bool], ...] = ()  # as in `ops.affine`
  # From what is sent of a transition to the transition. What is sent adds up where maps are
  # composed, as logarithms do. None sends the transition.
  expand: Callable[[Array], Array] | None = None

  def apply(self, element: affine.Affine, h: Array) -> Array:
    if self.expand is not None:
      element = element._replace(transition=self.expand(element.transition))
    return affine.apply(element, h, **dict(self.kind))

  def compose(self, earlier: affine.Affine, later: affine.Affine) -> affine.Affine:
    if self.expand is None:
      return affine.compose(earlier, later, **dict(self.kind))
    fresh = None if later.fresh is None else later.fresh | earlier.fresh
    transition = earlier.transition + later.transition
    return affine.Affine(transition, self.apply(later, earlier.input), fresh)


def incoming(
  split: Split, element: affine.Affine, state: Array, algebra: Algebra, gathered=None
) -> tuple[Array, tuple[Array, Array | None] | None]:
  """The state that enters this device's part of time.

  Args:
    split: how time is split, and the method.
    element: the map of this device's part.
    state: what enters the first device's part; of other devices it is not read.
    algebra: of the maps.
    gathered: the second result of an earlier call with the same transitions and resets: they are
      not sent again by "all_gather".

  Returns:
    The state, and what the call with reversed time can be given as `gathered` (its transitions are
    as they were here: a caller that needs others transposes them).
  """
  first = split.order() == 0
  # The first device's map is applied at once: it needs nobody.
  element = element._replace(input=jnp.where(first, algebra.apply(element, state), element.input))
  if split.method == "all_gather":
    s, gathered = _all_gather(split, element, gathered, algebra)
  elif split.method == "doubling":
    s, gathered = _doubling(split, element, algebra), None
  else:
    s, gathered = _all_scan(split, element, algebra), None
  return jnp.where(first, state, s), gathered


def _all_gather(split, element, gathered, algebra):
  """Everything to everybody; each folds what is before it."""
  gather = lambda x: None if x is None else jax.lax.all_gather(x, split.axis)
  if gathered is None:
    gathered = gather(element.transition), gather(element.fresh)
  elements = affine.Affine(gathered[0], gather(element.input), gathered[1])
  place, h = split.order(), None
  for p in range(split.P - 1):
    index = split.P - 1 - p if split.reverse else p
    e = affine.Affine(*(None if x is None else x[index] for x in elements))
    h = e.input if h is None else jnp.where(p < place, algebra.apply(e, h), h)
  return h, gathered


def _doubling(split, element, algebra):
  """Rounds of sends 1, 2, 4, ... devices far; after each, a map covers twice as many devices."""
  place = split.order()
  reach = split.send(element)  # the device before
  hops = 1
  while hops < split.P - 1:
    earlier = split.send(reach, hops)
    longer = algebra.compose(earlier, reach)
    # Whose map covers everything before it already has the state in it.
    reach = jax.tree.map(functools.partial(jnp.where, place > hops), longer, reach)
    hops *= 2
  return reach.input


def _all_scan(split, element, algebra):
  """A chain of sends, pipelined: the state goes in K blocks of its last axis, each on its way as
  soon as it is there."""
  P, whole = split.P, element.input
  K = _blocks(split, whole)
  width = whole.shape[-1] // K
  # A transition of each number of the state, or of each channel, goes in blocks too; every other
  # one acts on each block.
  if algebra.expand is not None:
    element = element._replace(transition=algebra.expand(element.transition))
  own = dict(algebra.kind).get("blocks") or (
    not algebra.kind and element.transition.ndim == whole.ndim
  )
  cut = lambda x, k: jax.lax.dynamic_slice_in_dim(x, k * width, width, axis=-1)
  place = split.order()
  s = jnp.zeros_like(whole)
  for r in range(P + K - 2):
    k = jnp.clip(r - place, 0, K - 1)
    transition = cut(element.transition, k) if own else element.transition
    block = affine.Affine(transition, cut(whole, k), element.fresh)
    out = affine.apply(block, cut(s, k), **dict(algebra.kind))
    # The first device has nothing before it, and its map has been applied.
    out = jnp.where(place == 0, cut(whole, k), out)
    senders = range(max(r - K + 1, 0), min(r, P - 2) + 1)
    received = split.send(out, places=senders)
    k = r - place + 1
    at = jnp.clip(k, 0, K - 1) * width
    updated = jax.lax.dynamic_update_slice_in_dim(s, received, at, axis=-1)
    s = jnp.where((place > 0) & (k >= 0) & (k < K), updated, s)
  return s


def _blocks(split: Split, state: Array) -> int:
  """Blocks of a state that take least time in all, (P + K - 2) (latency + s / K / bandwidth)."""
  size = state.size * state.dtype.itemsize
  best = split.blocks or max(1.0, (max(split.P - 2, 0) * size / (LATENCY * BANDWIDTH)) ** 0.5)
  divisors = [K for K in range(1, state.shape[-1] + 1) if state.shape[-1] % K == 0]
  return min(divisors, key=lambda K: abs(K - best))


def border(split: Split, segment_ids: Array) -> Array:
  """Whether this device's first document is another than the last before it, bool [B].

  Sends the id of the last real token of each part, int32 [B]; padding has none.
  """
  real = segment_ids >= 0
  at = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), -1), axis=1)[:, -1]
  some = at >= 0
  pick = lambda index: jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
  edges = pick(jnp.argmax(real, axis=1)), pick(jnp.maximum(at, 0))
  first, last = edges[::-1] if split.reverse else edges
  everyone = jax.lax.all_gather(jnp.where(some, last, -1), split.axis)
  before, place = jnp.full_like(last, -1), split.order()
  for p in range(split.P - 1):
    earlier = everyone[split.P - 1 - p if split.reverse else p]
    before = jnp.where((p < place) & (earlier >= 0), earlier, before)
  return some & (before >= 0) & (before != first)


def enter(crossing: Array | None, state: Array) -> Array:
  """The state, zero where a new document begins at the border."""
  return state if crossing is None else where_mask(~crossing, state)
