"""`newton_scan` over a mesh axis that splits time.

Each device holds the iterates of its part of time, and one of the state that enters it. With d the
increments, e the iterate that enters, and A, b the part's map of increments, an iteration is

  d_in = the maps of the parts before, composed, from 0   (`ops.device_scan`: the only exchange)
  h <- h + d                                              (the part, from d_in)
  e <- h' + d_in,   h' being the last state of the part before, until then

so a device has the new iterate that enters it without waiting for a second message: h' is known
before the iteration, and on its way while the part is scanned. Were e itself carried on, e + d_in,
the rounding of large increments would stay in it for ever. Clipping, relaxation, and guesses in
place of what is not finite act on e as they do on every state.

For a state of d numbers and Jacobians of a, a device receives in each iteration

  all_gather         d + a from every other device, and d from the one before
  all_scan           d, and d from the one before
  doubling           about (1 + log2 P) d + log2 P a, and d from the one before
  method "jacobi"    d from the one before

with documents also where they begin; ahead of all iterations d, of the guess; after them d, and one
number, of the residual. The backward pass sends one map, once. Where something is not finite, how
far it reaches is one more exchange.

The loop is a chain of devices, see `ops.device_chain`.

Lim et al. 2024 (DEER, arXiv:2309.12252), Danieli et al. 2025 (ParaRNN, arXiv:2510.21450).
"""

import functools

import jax
import jax.numpy as jnp

from ops import affine, time_axis
from ops.affine_scan import before, choose_plan, from_windows, to_windows
from ops.device_chain import chain, only
from ops.device_scan import Algebra, border, incoming
from ops.newton import Options, fold, obey, pose
from ops.newton_cells import KINDS
from ops.newton_solve import (
  Report,
  Tokens,
  advance,
  begin_adjoint,
  begin_increment,
  initial_guess,
  map_kind,
  pull_back,
  recurrent,
  repeat,
  residual,
  spoilt,
)
from ops.segments import where_mask


def _form(split, arguments):
  arguments = dict(arguments)
  implementation, report = (arguments.pop(name) for name in ("implementation", "report"))
  options = Options(**{name: arguments.pop(name) for name in Options._fields})
  problem = pose(**arguments, options=options)
  real, ids = problem.tokens.real, problem.segment_ids
  if ids is not None:
    first = real & (jnp.cumsum(real, axis=1) == 1)
    start = problem.tokens.start | (first & border(split, ids)[:, None])
    problem = problem._replace(tokens=problem.tokens._replace(start=start))
  name = problem.choose(implementation, parts=split.P)[0]
  h, result = SHARDED[name](split, problem)
  return problem.answer(h, split.from_last(h[:, -1]), result if report else None)


def _recurrent(split, problem):
  """One device after the other."""
  loop = functools.partial(_loop, problem.cell, problem.options)
  h, _ = chain(split, loop, (problem.params, problem.tokens), problem.state)
  return h, Report(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def _loop(cell, options, arrays, state):
  h, _ = recurrent(cell, options, *arrays, state)
  return h, h[:, -1]


def _parallel(split, problem):
  cell, options, params, tokens, state = problem[:5]
  T = jax.tree.leaves(tokens.x)[0].shape[1]
  if options.window is not None and options.window < split.P * T:
    raise ValueError(
      f"window is {options.window}, expected None or at least T={split.P * T}, for time is split"
      f" over {split.P} devices, which solve all tokens at once"
    )
  plan = choose_plan(T, state.size, T)
  tokens = jax.tree.map(lambda leaf: leaf[0], fold(tokens, plan))
  h, result = _solve(split, cell, options, plan, params, tokens, state)
  everywhere = [jax.lax.axis_index(axis) == 0 for axis in _axes()]
  speaks = functools.reduce(jnp.logical_and, everywhere)
  return obey(options, from_windows(h[None], plan), result, speaks), result


SHARDED = {"recurrent": _recurrent, "parallel": _parallel}


def _axes() -> tuple[str, ...]:
  """All axes of the mesh."""
  return jax.sharding.get_abstract_mesh().axis_names


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _solve(split, cell, options, plan, params, tokens, state):
  """As `newton_solve.solve`, of tokens in one window [W B ...]; `state` enters the first device."""
  return _forward(split, cell, options, plan, params, tokens, state)[0]


def _forward(split, cell, options, plan, params, tokens, state):
  first = split.order() == 0
  halo = lambda h: jnp.where(first, state, split.send(h[-1]))
  limits = cell.limits(state)
  guess = initial_guess(cell, limits, params, tokens, state, plan.N * plan.C)
  guess_before = halo(guess)
  measure = lambda h, e: _agreed(residual(cell, params, tokens, e, h))

  def iterate(iterates):
    h, e = iterates
    scan = begin_increment(cell, options, plan, params, tokens, e, h, given=first)
    if options.method == "jacobi":
      d, _ = scan.states(e)
      h = advance(options, limits, h, d, guess)
      return h, halo(h)
    last_before = halo(h)
    d_in = _incoming(split, scan.whole(), map_kind(cell, options.method == "quasi"))
    d, _ = scan.states(d_in)
    entering = advance(options, limits, last_before, d_in, guess_before)
    return advance(options, limits, h, d, guess), jnp.where(first, state, entering)

  (h, _), _, count = repeat(options, iterate, lambda it: measure(*it), (guess, guess_before))
  # What entered was rounded apart from the last state of the part before: that one counts.
  e = halo(h)
  error, fell_back = measure(h, e), jnp.zeros((), bool)
  with_halo = lambda h: (h, halo(h))
  if options.policy != "fallback":
    spoil = lambda: with_halo(_spoil(split, cell, params, tokens, e, h))
    h, e = jax.lax.cond(jnp.isfinite(error), lambda: (h, e), spoil)
  else:
    fell_back = ~(error <= options.limit)
    loop = lambda: with_halo(_chained(split, cell, options, plan, params, tokens, state))
    h, e = jax.lax.cond(fell_back, loop, lambda: (h, e))
  report = Report(error.astype(jnp.float32), count, fell_back)
  return (h, report), (params, tokens, h, e)


def _backward(split, cell, options, plan, residuals, cotangents):
  params, tokens, h, e = residuals
  g = cotangents[0]
  previous = before(h, e, tokens.start)
  adjoint = begin_adjoint(cell, plan, params, tokens, previous, g)
  backwards = split._replace(reverse=not split.reverse)
  entering = _incoming(backwards, adjoint.whole(), map_kind(cell, diagonal=False))
  later, d_state = adjoint.states(entering, incoming=True)
  d_params, d_x = pull_back(cell, params, tokens, previous, g + later)
  return d_params, Tokens(d_x, None, None), only(split.order() == 0, d_state)


_solve.defvjp(_forward, _backward)


def _incoming(split, element, kind):
  """`device_scan.incoming` of maps on states, where nothing enters the first device."""
  column = kind == KINDS["dense"]
  if column:
    element = element._replace(input=element.input[..., None])
  with jax.default_matmul_precision("highest"):
    algebra = Algebra(tuple(kind.items()))
    entering, _ = incoming(split, element, jnp.zeros_like(element.input), algebra)
  return entering[..., 0] if column else entering


def _agreed(error):
  """The largest of all devices; NaN where any is, which a maximum may drop."""
  broken = jnp.isnan(error)
  both = jnp.stack([jnp.where(broken, 0, error), broken.astype(error.dtype)])
  error, broken = jax.lax.pmax(both, _axes())
  return jnp.where(broken > 0, jnp.nan, error)


def _chained(split, cell, options, plan, params, tokens, state):
  """The loop's states, in the window."""
  tokens = jax.tree.map(lambda leaf: from_windows(leaf[None], plan), tokens)
  h, _ = chain(split, functools.partial(_loop, cell, options), (params, tokens), state)
  return to_windows(h, plan, edge=True)[0]


def _spoil(split, cell, params, tokens, e, h):
  """As in `newton_solve`: a document that a device finds spoilt is so on those after it."""
  bad = spoilt(cell, params, tokens, e, h)
  element = affine.Affine(jnp.ones_like(e), bad[-1].astype(e.dtype))
  if tokens.start is not None:
    element = affine.reset(element, tokens.start.any(axis=0))
  carried = _incoming(split, element, {}) > 0
  carried = jnp.broadcast_to(carried, h.shape)
  if tokens.start is not None:
    carried = where_mask(jnp.cumsum(tokens.start, axis=0) == 0, carried)
  return jnp.where(bad | carried, jnp.nan, h)


time_axis.declare(
  "newton_scan",
  _form,
  {"params": "", "x": "B T", "initial_state": "B", "segment_ids": "B T"},
  ("B T", "B", ""),
)
