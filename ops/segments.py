"""Documents in a batch: what `segment_ids` means to every recurrence.

A row of `segment_ids` [T] may pack several documents and padding, in any order: `-1 5 5 -1 5 2 2`
holds padding, a document of three tokens with padding inside it, a document of two tokens. Padding
(any negative id) leaves the state as it is; a document is new when its id differs from that of the
last real token. The first real token of a row starts no document: the `initial_state` belongs to
it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Segments(NamedTuple):
  """The masks that every op uses; selected with `where`, never multiplied: no NaN passes."""

  real: Bool[Array, "B T"]  # a token; False is padding
  start: Bool[Array, "B T"]  # a real token before which the state is reset
  document: Int[
    Array, "B T"
  ]  # starts so far, this token's included; padding belongs to the document before


def find_segments(segment_ids: Int[Array, "B T"], *, reverse: bool = False) -> Segments:
  """The masks of `segment_ids` int32 [B T]; with `reverse`, "before" means to the right."""
  if reverse:
    return Segments(*(jnp.flip(mask, 1) for mask in find_segments(jnp.flip(segment_ids, 1))))
  real = segment_ids >= 0
  last_real = jax.lax.cummax(jnp.where(real, jnp.arange(segment_ids.shape[1]), -1), axis=1)
  before = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  start = real & (before >= 0) & (segment_ids != id_before)
  return Segments(real, start, jnp.cumsum(start, axis=1, dtype=jnp.int32))


def where_mask(mask: Bool[Array, "..."], x: Array, other: float = 0.0) -> Array:
  """`x` where `mask` (over the leading axes of `x`), else `other`; masks the gradient too."""
  return jnp.where(
    mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.asarray(other, x.dtype)
  )


def quarantine(segments: Segments, arrays: Sequence[Array | None], state: Array):
  """Takes NaN and infinity out of what is packed, before products sum over several documents.

  In a product over a chunk, what belongs to another document is multiplied by 0, and 0 * NaN is
  NaN.

  Args:
    segments: the masks of the row.
    arrays: [B T ...] each, or None.
    state: [B ...], the state before the first document.

  Returns:
    The arrays with padding and spoilt tokens zeroed, the state, zeroed where it is spoilt, and bool
    [B T]: where the output is NaN, from a document's first spoilt token to its end.
  """
  spoilt = jnp.zeros(segments.real.shape, bool)
  for array in arrays:
    if array is not None:
      spoilt |= ~jnp.isfinite(array).reshape(*array.shape[:2], -1).all(-1)
  arrays = [
    None if array is None else where_mask(segments.real & ~spoilt, array) for array in arrays
  ]
  state_spoilt = ~jnp.isfinite(state).reshape(state.shape[0], -1).all(-1)
  spoilt = (spoilt & segments.real) | (state_spoilt[:, None] & (segments.document == 0))
  places = jnp.arange(spoilt.shape[1])
  last = lambda mask: jax.lax.cummax(jnp.where(mask, places, -1), axis=1)
  spoilt = last(spoilt) >= jnp.maximum(last(segments.start), 0)
  return arrays, where_mask(~state_spoilt, state), spoilt
