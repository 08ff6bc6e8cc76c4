"""Nonlinear recurrences h_t = f(h_{t-1}, x_t), solved for all t at once by Newton's method.

The states of all tokens are one unknown; at an iterate h, with J_t = df/dh at (h_{t-1}, x_t), its
increment solves a linear recurrence, which runs in parallel over time:

  d_t = J_t d_{t-1} + f(h_{t-1}, x_t) - h_t,    d_{-1} = 0,    h_t <- h_t + d_t

After k iterations the first k states are exact whatever the guess, and near the solution the error
is squared each time. But where products of Jacobians grow over long stretches, iterates wander far
before they settle; they are clipped to the box in which the cell keeps its states, which moves no
solution. The gradient is that of the recurrence at the states returned, by one linear recurrence
from the right with transposed exact Jacobians:

  l_t = g_t + J_{t+1}^T l_{t+1},    (dparams, dx_t) = VJP of f at (h_{t-1}, x_t) of l_t

Lim et al. 2024 (DEER, arXiv:2309.12252), Danieli et al. 2025 (ParaRNN, arXiv:2510.21450).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops import affine, dispatch
from ops.affine_scan import Scan, before, begin_scan, from_windows, to_windows
from ops.floating import filled_in, floating
from ops.newton_cells import KINDS, product, transpose, unit, value_and_jacobian
from ops.precision import varying_like
from ops.segments import where_mask


class Report(NamedTuple):
  """How well the states returned solve the recurrence."""

  residual: Float[Array, ""]  # of Newton's states: max |h_t - f(h_{t-1}, x_t)| over batch and time
  iterations: Int[Array, ""]  # done; the most of any window
  fell_back: Bool[Array, ""]  # whether the states are those of the sequential scan


class Options(NamedTuple):
  """What is static in a solution; see `newton_scan`."""

  iterations: int
  tolerance: float | None
  method: str
  damping: float
  relaxation: float
  window: int | None
  policy: str
  limit: float


class Tokens(NamedTuple):
  """What a recurrence reads: [B T ...] or folded."""

  x: Any
  real: Bool[Array, "..."] | None  # False leaves the state as it is
  start: Bool[Array, "..."] | None  # the state is zero before it


def recurrent(cell, options, params, tokens, state):
  """One token after the other; autodiff goes through the loop."""

  def step(h, token):
    previous = h if token.start is None else where_mask(~token.start, h)
    new = cell.step(params, previous, token.x)
    new = new if token.real is None else jnp.where(_align(token.real, h), new, h)
    return new, new

  by_time = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens)
  h = jnp.moveaxis(jax.lax.scan(step, state, by_time)[1], 0, 1)
  return h, Report(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def _align(mask, like):
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def solve(cell, options, plan, params, tokens, state):
  """All states [S W B ...] and a `Report`; under "fallback" the loop's where Newton's are bad."""
  limits = cell.limits(state)
  guess = initial_guess(cell, limits, params, tokens, state, plan.S, plan.N * plan.C)

  def step(state, window):
    h, residual, count = _newton(cell, options, plan, limits, params, *window, state)
    return h[-1], (h, residual, count)

  _, (h, residuals, counts) = jax.lax.scan(step, state, (tokens, guess))
  residual, fell_back = jnp.max(residuals), jnp.zeros((), bool)
  if options.policy != "fallback":
    spoil = lambda: _spoil(cell, plan, params, tokens, state, h)
    h = jax.lax.cond(jnp.isfinite(residual), lambda: h, spoil)
  else:
    fell_back = ~(residual <= options.limit)
    h = jax.lax.cond(
      fell_back, lambda: _loop(cell, options, plan, params, tokens, state), lambda: h
    )
  return h, Report(residual.astype(jnp.float32), jnp.max(counts), fell_back)


def _spoil(cell, plan, params, tokens, state, h):
  """NaN from where a document's states are not finite to its end, as in the loop: iterates put
  finite guesses there."""
  tokens, y = jax.tree.map(_flat, (tokens, h))
  return jnp.where(spoilt(cell, params, tokens, state, y), jnp.nan, y).reshape(h.shape)


def spoilt(cell, params, tokens, state, h):
  """Where a document's states have not been finite, bool [W B ...]."""
  value = _value(cell, params, before(h, state, tokens.start), tokens)
  bad = ~(jnp.isfinite(value) & jnp.isfinite(h))
  if cell.structure != "diagonal":  # what is coupled goes together
    bad = jnp.broadcast_to(bad.any(-1 if cell.structure == "dense" else -2, keepdims=True), h.shape)
  places = jnp.arange(len(h)).reshape(-1, *(1,) * (h.ndim - 1))
  last = jax.lax.cummax(jnp.where(bad, places, -1), axis=0)
  begin = jnp.zeros((), places.dtype)
  if tokens.start is not None:
    begin = jax.lax.cummax(jnp.where(_align(tokens.start, h), places, 0), axis=0)
  return last >= begin


def _flat(leaf):
  return leaf.reshape(-1, *leaf.shape[2:])


def _loop(cell, options, plan, params, tokens, state):
  by_row = jax.tree.map(lambda leaf: from_windows(leaf, plan), tokens)
  return to_windows(recurrent(cell, options, params, by_row, state)[0], plan, edge=True)


def _solve_forward(cell, options, plan, params, tokens, state):
  h, result = solve(cell, options, plan, params, tokens, state)
  return (h, result), (params, tokens, state, h)


def _solve_backward(cell, options, plan, residuals, cotangents):
  params, tokens, state, h = residuals
  # One window of all tokens: nothing is evaluated more than once.
  tokens, h, g = jax.tree.map(_flat, (tokens, h, cotangents[0]))
  previous = before(h, state, tokens.start)
  adjoint = begin_adjoint(cell, plan, params, tokens, previous, g)
  later, d_state = adjoint.states(jnp.zeros_like(state), incoming=True)
  d_params, d_x = pull_back(cell, params, tokens, previous, g + later)
  d_x = jax.tree.map(lambda leaf: leaf.reshape(plan.S, -1, *leaf.shape[1:]), d_x)
  return d_params, Tokens(d_x, None, None), d_state


solve.defvjp(_solve_forward, _solve_backward)


def begin_adjoint(cell, plan, params, tokens, previous, g) -> Scan:
  """Of what reaches the states before tokens [W B ...] from what comes behind them, from the right;
  g [W B ...] are the cotangents of the tokens' own states."""
  J = transpose(cell, _jacobian(cell, params, previous, tokens)[1])
  elements = affine.Affine(J, product(cell, J, g))
  if tokens.start is not None:
    elements = affine.reset(elements, tokens.start)
    elements = elements._replace(input=where_mask(~tokens.start, elements.input))
  return _begin_scan(cell, plan, elements, reverse=True)


def pull_back(cell, params, tokens, previous, l):
  """What l [W B ...] sends through the cell to the parameters and to x."""
  x, l = tokens.x, l if tokens.real is None else where_mask(tokens.real, l)

  def pull(h, x, l):
    local = lambda moved, x_moved: cell.step(filled_in(moved, params), h, filled_in(x_moved, x))
    return jax.vjp(local, floating(params), floating(x))[1](l)

  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  if dispatch.platform() != "cpu" or size > 8 * previous[0, 0].size:
    return pull(previous, x, l)
  # With one number per channel, XLA's sums over tokens take longer on a CPU than all the rest. Each
  # token's share, and a product with ones, take a third of it.
  shares, d_x = jax.vmap(jax.vmap(pull))(previous, x, l)
  with jax.default_matmul_precision("highest"):
    return jax.tree.map(
      lambda share: jnp.tensordot(jnp.ones(l.shape[:2], share.dtype), share, 2), shares
    ), d_x


def initial_guess(cell, limits, params, tokens, state, *leading):
  """f(0, x) within the limits, for tokens [*leading B ...]; of all windows at once, for in a loop
  that cuts windows out XLA does not vectorise it for CPUs."""
  h = jnp.zeros((*leading, *state.shape), state.dtype)
  guess = _clip(cell.step(params, h, tokens.x), limits)
  guess = guess if tokens.real is None else where_mask(tokens.real, guess)
  return varying_like(guess, state)


def _clip(h, limits):
  return h if limits is None else jnp.clip(h, -limits, limits)


def _newton(cell, options, plan, limits, params, tokens, guess, state):
  """Newton's states in a window, their residual, and the iterations made."""
  iterate, measure = iteration(cell, options, plan, limits, params, tokens, guess, state)
  h, error, count = repeat(options, iterate, measure, guess)
  return h, measure(h) if error is None else error, count


def repeat(options, iterate, residual, first):
  """The last iterate, a pytree as `first`; its residual, where a tolerance asked for it, or None;
  and the iterations made."""
  if options.tolerance is None:
    h = jax.lax.fori_loop(0, options.iterations, lambda _, h: iterate(h), first)
    return h, None, jnp.asarray(options.iterations, jnp.int32)

  def unfinished(carry):
    _, error, count = carry
    return (count < options.iterations) & ~(error <= options.tolerance)

  def again(carry):
    h = iterate(carry[0])
    return h, residual(h), carry[2] + 1

  return jax.lax.while_loop(
    unfinished, again, (first, residual(first), jnp.zeros((), jnp.int32))
  )  # fmt: skip


def iteration(cell, options, plan, limits, params, tokens, guess, state):
  """Two functions of an iterate of a window: the next one, and the residual."""

  zeros = jnp.zeros_like(state)

  def iterate(h):
    d, _ = begin_increment(cell, options, plan, params, tokens, state, h).states(zeros)
    return advance(options, limits, h, d, guess)

  return iterate, functools.partial(residual, cell, params, tokens, state)


def advance(options, limits, h, d, guess):
  """The iterate after h, d being its increment."""
  h = h + options.relaxation * d
  return _clip(jnp.where(jnp.isfinite(h), h, guess), limits)


def residual(cell, params, tokens, state, h):
  """max |h_t - f(h_{t-1}, x_t)| of a window."""
  return jnp.max(jnp.abs(_value(cell, params, before(h, state, tokens.start), tokens) - h))


def begin_increment(cell, options, plan, params, tokens, state, h, given=True) -> Scan:
  """Of d_t = A_t d_{t-1} + f(h_{t-1}, x_t) - h_t.

  Args:
    given: whether `state`, before the first token, is no unknown; may be an array.
  """
  previous = before(h, state, tokens.start)
  if options.method == "jacobi":
    d = _value(cell, params, previous, tokens) - h
    return Scan(None, lambda state: (d, d[-1]))
  diagonal = options.method == "quasi"
  f, A = _jacobian(cell, params, previous, tokens, diagonal=diagonal, own=True)
  # Nothing multiplies what is given, were it inf or NaN.
  first = jnp.arange(len(A)).reshape(-1, *(1,) * (A.ndim - 1)) == 0
  A = jnp.where(first & given, 0, (1 - options.damping) * A)
  elements = affine.Affine(A, f - h)
  if tokens.start is not None:
    elements = affine.reset(elements, tokens.start)
  return _begin_scan(cell, plan, elements, diagonal=diagonal)


def map_kind(cell, diagonal: bool) -> dict[str, bool]:
  """Of the maps of increments, as in `ops.affine`."""
  return {} if diagonal else KINDS[cell.structure]


def _begin_scan(cell, plan, elements, *, diagonal=False, reverse=False):
  """As `affine_scan.begin_scan`; dense matrices act on columns."""
  kind = map_kind(cell, diagonal)
  if kind != KINDS["dense"]:
    return begin_scan(elements, plan.C, reverse=reverse, **kind)
  elements = elements._replace(input=elements.input[..., None])
  scan = begin_scan(elements, plan.C, reverse=reverse, **kind)

  def whole():
    element = scan.whole()
    return element._replace(input=element.input[..., 0])

  def states(state, **options):
    h, last = scan.states(state[..., None], **options)
    return h[..., 0], last[..., 0]

  return Scan(whole, states)


def _value(cell, params, previous, tokens):
  f = cell.step(params, previous, tokens.x)
  return f if tokens.real is None else jnp.where(_align(tokens.real, f), f, previous)


def _jacobian(cell, params, previous, tokens, **options):
  """Values and Jacobians; padding is the map h' = h."""
  f, J = value_and_jacobian(cell, params, previous, tokens.x, **options)
  if tokens.real is None:
    return f, J
  identity = unit(cell, J) if not options.get("diagonal") else jnp.ones((), J.dtype)
  real = tokens.real
  return jnp.where(_align(real, f), f, previous), jnp.where(_align(real, J), J, identity)
