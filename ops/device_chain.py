"""Ops whose parts are no affine maps: one device after the other.

What enters a part of time is known once everything before it has been run, so P devices take as
long as one does. What is split is the memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops.floating import filled_in, floating
from ops.time_axis import Split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chain(split: Split, op: Callable, arrays: Any, state: Any) -> tuple[Any, Any]:
  """Runs `op` on the devices' parts of time in turn, each from the state that the one before left.

  Of P rounds each is one device's, the others wait; after it the state moves on by one permutation,
  of which a round on one device is all that is sent. Only the entering states are kept for the
  backward pass, which goes through the devices from the last to the first and runs `op` again.

  Args:
    split: how time is split.
    op: op(arrays, state) -> (o, state after), without collectives; it closes over no array.
    arrays: a pytree, this device's part of each; differentiable where floating.
    state: a pytree, what enters the first device's part; of other devices it is not read.

  Returns:
    o of this device's part, and the state after it.
  """
  return _forward(split, op, arrays, state)[0]


def _forward(split, op, arrays, state):
  run = functools.partial(op, arrays)
  out, entered = _in_turn(split, run, only(split.order() == 0, state), lambda out: out[1])
  return out, (arrays, entered)


def _backward(split, op, residuals, cotangents):
  arrays, entered = residuals
  d_o, d_after = cotangents

  def run(d_after):
    local = lambda moved, state: op(filled_in(moved, arrays), state)
    return jax.vjp(local, floating(arrays), entered)[1]((d_o, d_after))

  backwards = split._replace(reverse=not split.reverse)
  (d_arrays, d_state), _ = _in_turn(backwards, run, d_after, lambda out: out[1])
  return d_arrays, only(split.order() == 0, d_state)


chain.defvjp(_forward, _backward)


def _in_turn(split, run, entering, leaving):
  """What `run` makes of what enters each device's part, and what that is: `entering`, and what
  leaves the part before."""
  place = split.order()
  shapes = jax.eval_shape(run, entering)
  nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

  def turn(r, carry):
    entering, out = carry
    out = jax.lax.cond(place == r, run, lambda _: out, entering)
    sent = only(place == r + 1, split.send(leaving(out)))
    return jax.tree.map(jnp.add, entering, sent), out

  entered, out = jax.lax.fori_loop(0, split.P, turn, (entering, nothing))
  return out, entered


def only(here: jax.Array, tree: Any) -> Any:
  """The tree where `here`, zeros on other devices."""
  return jax.tree.map(lambda leaf: jnp.where(here, leaf, jnp.zeros_like(leaf)), tree)
