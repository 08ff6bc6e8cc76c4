"""The last tokens before each device's part of time: what a window that crosses its border sees.

Without documents and padding these are the last tokens of one neighbour, which sends them. With
them, a window may reach over several devices, or be cut at a document's start: then every device
sends the last real tokens of its last document to all, and each puts together what came before it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ops.device_scan import border
from ops.segments import find_segments, where_mask
from ops.time_axis import Split


class Window(NamedTuple):
  """The last real tokens of a document."""

  tokens: Array  # [B W ...], the latest last; zeros where there are fewer than W
  count: Array  # int32 [B], how many there are


class _Part(NamedTuple):
  """What a part of time leaves in a window."""

  window: Window
  push: Array  # int32 [B], how far the tokens that were there move; W, and they are gone


def before(split: Split, x: Array, first: Window, segment_ids: Array | None = None) -> Window:
  """The window in front of this device's part of time.

  Args:
    split: how time is split.
    x: [B T ...], the tokens of this part.
    first: what is in front of the first part. Its W is that of the window.
    segment_ids: int32 [B T], documents and padding, see `ops.segments`.
  """
  W, place = first.tokens.shape[1], split.order()
  if W == 0:
    return first
  if _one_neighbour(x, W, segment_ids):
    received = split.send(_last(split, x, W)).astype(first.tokens.dtype)
    return Window(
      jnp.where(place == 0, first.tokens, received), jnp.where(place == 0, first.count, W)
    )
  parts, crossing = _everyone(split, x, W, segment_ids)
  window = _put_together(first, parts, place)
  return (
    window if crossing is None else jax.tree.map(functools.partial(where_mask, ~crossing), window)
  )


def after(split: Split, x: Array, first: Window, segment_ids: Array | None = None) -> Window:
  """The window after all of time, on every device; arguments as of `before`."""
  W = first.tokens.shape[1]
  if W == 0:
    return first
  if _one_neighbour(x, W, segment_ids):
    last = split.from_last(_last(split, x, W)).astype(first.tokens.dtype)
    return Window(last, jnp.full_like(first.count, W))
  parts, _ = _everyone(split, x, W, segment_ids)
  return _put_together(first, parts, split.P)


def _one_neighbour(x, W, segment_ids):
  return segment_ids is None and x.shape[1] >= W


def _last(split, x, W):
  return jnp.flip(x[:, :W], 1) if split.reverse else x[:, x.shape[1] - W :]


def _everyone(split, x, W, segment_ids):
  """The part of each device, [P ...] in the order of time, and whether this device's first document
  is a new one."""
  (B, T), crossing = x.shape[:2], None
  if segment_ids is None:
    tokens = _last(split, x, T)
    count = push = jnp.full((B,), T, jnp.int32)
  else:
    crossing = border(split, segment_ids)
    segments = find_segments(segment_ids, reverse=split.reverse)
    if split.reverse:
      x, segments = jax.tree.map(lambda array: jnp.flip(array, 1), (x, segments))
    fresh = crossing | segments.start.any(axis=1)
    kept = segments.real & (segments.document == segments.document[:, -1:])
    places, _ = jax.lax.top_k(jnp.where(kept, jnp.arange(T), -1), min(W, T))
    places = jnp.flip(places, 1)
    tokens = where_mask(places >= 0, _rows(x, jnp.maximum(places, 0)))
    count = jnp.minimum(jnp.sum(kept, axis=1, dtype=jnp.int32), W)
    push = jnp.where(fresh, W, count)
  numbers = jnp.stack([count, push])
  tokens, numbers = jax.lax.all_gather((tokens, numbers), split.axis)
  if split.reverse:
    tokens, numbers = jnp.flip(tokens, 0), jnp.flip(numbers, 0)
  missing = [(0, 0), (0, 0), (W - tokens.shape[2], 0)] + [(0, 0)] * (tokens.ndim - 3)
  window = Window(jnp.pad(tokens, missing), numbers[:, 0])
  return _Part(window, numbers[:, 1]), crossing


def _put_together(first: Window, parts: _Part, places) -> Window:
  """The window after the first `places` parts of time."""
  i = jnp.arange(first.tokens.shape[1])

  def step(window, numbered):
    place, (new, push) = numbered
    source = i + push[:, None]
    pushed = _rows(window.tokens, jnp.minimum(source, len(i) - 1))
    stays = (source < len(i)).reshape(*source.shape, *(1,) * (pushed.ndim - 2))
    tokens = jnp.where(stays, pushed, new.tokens.astype(pushed.dtype))
    count = jnp.minimum(new.count + jnp.minimum(window.count, len(i) - push), len(i))
    return jax.tree.map(
      functools.partial(jnp.where, place < places), Window(tokens, count), window
    ), None

  return jax.lax.scan(step, first, (jnp.arange(len(parts.push)), parts))[0]


_rows = jax.vmap(lambda array, indices: array[indices])
