"""The algebra of affine maps h' = A h + b, out of which every parallel recurrence is made.

A map is an `Affine`; `compose` is associative, `identity` is its unit, so a recurrence is a prefix
"sum" of maps (Blelloch, "Prefix sums and their applications", 1990). The transition A comes in
three kinds, told apart by its shape:

  scalar     A [...]        h [... K] or [... K V]   one number for the whole state
  diagonal   A [... K]      h [... K] or [... K V]   one number per row of the state
  dense      A [... K K]    h [... K V]              a matrix; pass `dense=True`

A map with `fresh` set forgets what came before it. That is a flag and not A = 0, because 0 * NaN
is NaN.
"""

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


def _act(transition: Array, h: Array, dense: bool) -> Array:
  return transition @ h if dense else _align(transition, h) * h


def apply(element: Affine, h: Array, *, dense: bool = False) -> Array:
  """The state after `element`, from the state `h` before it."""
  return _forget(element, _act(element.transition, _forget(element, h), dense)) + element.input


def _forget(element: Affine, h: Array) -> Array:
  """Zero where fresh. Done to what goes into a product and to what comes out, so that neither the
  values nor the gradients multiply a NaN from the other side of a reset by 0."""
  if element.fresh is None:
    return h
  return jnp.where(_align(element.fresh, h), jnp.zeros_like(h), h)


def compose(earlier: Affine, later: Affine, *, dense: bool = False) -> Affine:
  """The one map that does `earlier` and then `later`."""
  transition = _act(later.transition, _forget(later, earlier.transition), dense)
  input = apply(later, earlier.input, dense=dense)
  if later.fresh is None and earlier.fresh is None:
    return Affine(transition, input)
  if later.fresh is None or earlier.fresh is None:
    fresh = earlier.fresh if later.fresh is None else later.fresh
  else:
    fresh = later.fresh | earlier.fresh
  element = Affine(transition, input, fresh)
  return element._replace(transition=_forget(element, transition))


def identity(like: Affine, *, dense: bool = False) -> Affine:
  """The map that changes nothing, in the shapes and dtypes of `like`."""
  if dense:
    eye = jnp.eye(like.transition.shape[-1], dtype=like.transition.dtype)
    transition = jnp.broadcast_to(eye, like.transition.shape)
  else:
    transition = jnp.ones_like(like.transition)
  fresh = None if like.fresh is None else jnp.zeros_like(like.fresh)
  return Affine(transition, jnp.zeros_like(like.input), fresh)


def reset(element: Affine, start: Bool[Array, "..."]) -> Affine:
  """`element`, made to forget the state before it wherever `start`."""
  element = element._replace(fresh=start if element.fresh is None else element.fresh | start)
  return element._replace(transition=_forget(element, element.transition))
