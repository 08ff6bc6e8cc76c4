"""The algebra of affine maps h' = A h + b, out of which every parallel recurrence is made.

A map is an `Affine`; `compose` is associative, `identity` is its unit, so a recurrence is a prefix
"sum" of maps (Blelloch, "Prefix sums and their applications", 1990). The transition A comes in
four kinds, the first two told apart by its shape:

  scalar     A [...]        h [... K] or [... K V]   one number for the whole state
  diagonal   A [... K]      h [... K] or [... K V]   one number per row of the state
  dense      A [... K K]    h [... K V]              a matrix; pass `dense=True`
  blocks     A [... M M D]  h [... M D]              a small matrix per channel; `blocks=True`

A map with `fresh` set forgets what came before it. That is a flag and not A = 0, because 0 * NaN
is NaN.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact


class Affine(NamedTuple):
  """The map h -> transition h + input, or h -> input where `fresh`; `fresh` None means nowhere."""

  transition: Inexact[Array, "..."]
  input: Inexact[Array, "..."]
  fresh: Bool[Array, "..."] | None = None


def _align(x: Array, like: Array) -> Array:
  return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def act(transition: Array, h: Array, *, dense: bool = False, blocks: bool = False) -> Array:
  """A h alone, without the input; h may also be another transition of the same kind."""
  if dense:
    return transition @ h
  if not blocks:
    return _align(transition, h) * h
  # Sums spelled out over whole rows of channels: as products of tiny matrices they crawl.
  matrix = h.ndim == transition.ndim
  column = lambda j: transition[..., j, None, :] if matrix else transition[..., j, :]
  row = lambda j: h[..., None, j, :, :] if matrix else h[..., None, j, :]
  return functools.reduce(operator.add, (column(j) * row(j) for j in range(h.shape[-2 - matrix])))


def apply(element: Affine, h: Array, **kind: bool) -> Array:
  """The state after `element`, from the state `h` before it."""
  return _forget(element, act(element.transition, _forget(element, h), **kind)) + element.input


def _forget(element: Affine, h: Array) -> Array:
  """Zero where fresh. Done to what goes into a product and to what comes out, so that neither the
  values nor the gradients multiply a NaN from the other side of a reset by 0."""
  if element.fresh is None:
    return h
  return jnp.where(_align(element.fresh, h), jnp.zeros_like(h), h)


def compose(earlier: Affine, later: Affine, **kind: bool) -> Affine:
  """The one map that does `earlier` and then `later`."""
  transition = act(later.transition, _forget(later, earlier.transition), **kind)
  input = apply(later, earlier.input, **kind)
  if later.fresh is None and earlier.fresh is None:
    return Affine(transition, input)
  if later.fresh is None or earlier.fresh is None:
    fresh = earlier.fresh if later.fresh is None else later.fresh
  else:
    fresh = later.fresh | earlier.fresh
  element = Affine(transition, input, fresh)
  return element._replace(transition=_forget(element, transition))


def identity(like: Affine, *, dense: bool = False, blocks: bool = False) -> Affine:
  """The map that changes nothing, in the shapes and dtypes of `like`."""
  transition = jnp.ones_like(like.transition)
  if dense or blocks:
    eye = jnp.eye(transition.shape[-2], dtype=transition.dtype)
    transition *= eye[..., None] if blocks else eye
  fresh = None if like.fresh is None else jnp.zeros_like(like.fresh)
  return Affine(transition, jnp.zeros_like(like.input), fresh)


def reset(element: Affine, start: Bool[Array, "..."]) -> Affine:
  """`element`, made to forget the state before it wherever `start`."""
  element = element._replace(fresh=start if element.fresh is None else element.fresh | start)
  return element._replace(transition=_forget(element, element.transition))
