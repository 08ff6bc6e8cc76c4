"""Documents in a batch: what `segment_ids` means to every recurrence.

A row of `segment_ids` [T] may pack several documents and padding, in any order: `-1 5 5 -1 5 2 2`
holds padding, a document of three tokens with padding inside it, a document of two tokens. Padding
(any negative id) leaves the state as it is; a document is new when its id differs from that of the
last real token. The first real token of a row starts no document: the `initial_state` belongs to
it.
"""

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
