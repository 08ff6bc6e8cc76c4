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
from ops.affine_scan import affine_scan, before, choose_fold, fold, unfold
from ops.newton_cells import (
  KINDS,
  Cell,
  check_step,
  floating_dtype,
  guess_state_shape,
  product,
  transpose,
  unit,
  value_and_jacobian,
)
from ops.precision import varying_like
from ops.segments import find_segments, where_mask

METHODS = ("newton", "quasi", "jacobi")
POLICIES = ("ignore", "warn", "fallback", "nan")


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


def newton_scan(
  cell: Cell,
  params: Any,
  x: Any,
  *,
  initial_state: Float[Array, "B ..."] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
  iterations: int = 4,
  tolerance: float | None = None,
  method: str = "newton",
  damping: float = 0.0,
  relaxation: float = 1.0,
  window: int | None = None,
  policy: str = "ignore",
  limit: float = 1e-3,
  report: bool = False,
):
  """h_t = cell.step(params, h_{t-1}, x_t) for every token.

  Args:
    cell: the recurrence, see `ops.Cell`; whether its promises are true, `ops.check_cell` tells.
    params: any pytree of arrays, differentiable.
    x: any pytree of [B T ...] arrays, differentiable where floating.
    initial_state: [B D], or [B M D] for a "block" cell; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: scan from the right.
    implementation: "recurrent" (one token after the other, gradients by autodiff), "parallel"
      (Newton), or None: Newton where it is the faster and the cell has a box or `policy` guards it.
    iterations: of Newton's method; with `tolerance`, at most.
    tolerance: stop at a residual of at most this; None makes exactly `iterations`.
    method: "newton"; "quasi" (the diagonal of the Jacobian: linear memory for dense cells, more
      iterations); "jacobi" (no Jacobian: one token further per iteration, more where the cell
      forgets fast). Gradients are exact all the same.
    damping: Jacobians are multiplied by 1 - damping.
    relaxation: increments are multiplied by it.
    window: solve so many tokens at a time, each window from the last state of the one before.
    policy: where the residual exceeds `limit` or is not a number: "ignore"; "warn" (print, once
      per call); "fallback" (the sequential scan's states, bit for bit); "nan" (everything NaN).
      Under `jax.vmap` "fallback" computes both and selects: map over the batch axis instead.
    limit: of the residual, in units of the state.
    report: also return a `Report`.

  Returns:
    h [B T D] or [B T M D] in the dtype of the floating x, zero at padding; the final state in
    float32 (float64 for float64 inputs); with `report`, a `Report`.

  Raises:
    ValueError: an argument that cannot be, or a cell whose structure is false.
  """
  options = Options(
    iterations, tolerance, method, damping, relaxation, window, policy, limit
  )  # fmt: skip
  _check_options(options)
  rows, length = _check_tokens(x, segment_ids)
  dtype = floating_dtype(params, x, initial_state)
  floats = [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  out_dtype = jnp.result_type(*floats) if floats else dtype
  params, x = jax.tree.map(lambda leaf: _widen(leaf, dtype), (params, x))
  first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(_token(leaf), leaf.dtype), x)
  if initial_state is None:
    initial_state = jnp.zeros((rows, *guess_state_shape(cell, params, first)), dtype)
  letters = "B M D" if cell.structure == "block" else "B D"
  rows_of_x = jax.ShapeDtypeStruct((rows,), bool)
  dispatch.check_shapes(x=(rows_of_x, "B"), initial_state=(initial_state, letters))
  dispatch.check_dtypes(initial_state=initial_state)
  check_step(cell, params, jax.ShapeDtypeStruct(initial_state.shape, dtype), first)
  _, run = dispatch.choose(
    "newton_scan", implementation, cell=cell, x=x, initial_state=initial_state, length=length,
    segment_ids=segment_ids, options=options,
  )  # fmt: skip
  state = varying_like(initial_state.astype(dtype), *jax.tree.leaves((params, x)), segment_ids)
  tokens, segments = Tokens(x, None, None), None
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
    x = jax.tree.map(lambda leaf: where_mask(segments.real, leaf), x)
    tokens = Tokens(x, segments.real, segments.start)
  if reverse:
    tokens = jax.tree.map(lambda leaf: jnp.flip(leaf, 1), tokens)
  h, result = run(cell, options, params, tokens, state)
  final_state = h[:, -1]
  h = jnp.flip(h, 1) if reverse else h
  h = h if segments is None else where_mask(segments.real, h)
  h = h.astype(out_dtype)
  return (h, final_state, result) if report else (h, final_state)


def _widen(leaf, dtype):
  return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _token(leaf):
  return (leaf.shape[0], *leaf.shape[2:])


def _check_options(o: Options):
  """Raises ValueError, naming the argument."""
  positive = lambda n: isinstance(n, int) and n >= 1
  allowed = {
    "iterations": (isinstance(o.iterations, int) and o.iterations >= 0, "an int of at least 0"),
    "tolerance": (o.tolerance is None or o.tolerance > 0, "a positive number or None"),
    "method": (o.method in METHODS, f"one of {', '.join(METHODS)}"),
    "damping": (0 <= o.damping <= 1, "a number from 0 to 1"),
    "relaxation": (0 < o.relaxation < 2, "a number between 0 and 2"),
    "window": (o.window is None or positive(o.window), "an int of at least 1 or None"),
    "policy": (o.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
    "limit": (o.limit > 0, "a positive number"),
  }
  for name, (fine, expected) in allowed.items():
    if not fine:
      raise ValueError(f"{name} is {getattr(o, name)!r}, expected {expected}")


def _check_tokens(x, segment_ids) -> tuple[int, int]:
  """B and T of every array in x."""
  leaves = jax.tree.leaves_with_path(x)
  if not leaves:
    raise ValueError("x holds no array, expected a pytree of [B T ...] arrays")
  shape = leaves[0][1].shape[:2]
  for path, leaf in leaves:
    if leaf.ndim < 2 or leaf.shape[:2] != shape or 0 in shape:
      raise ValueError(
        f"x{jax.tree_util.keystr(path)} has shape {leaf.shape}, expected [B T ...]"
        + (f" with B={shape[0]}, T={shape[1]}" if len(shape) == 2 and 0 not in shape else "")
      )
  dispatch.check_shapes(
    x=(jax.ShapeDtypeStruct(shape, bool), "B T"), segment_ids=(segment_ids, "B T")
  )
  dispatch.check_segment_ids(segment_ids)
  return shape


def _recurrent(cell, options, params, tokens, state):
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


def _parallel(cell, options, params, tokens, state):
  h, result = _solve(cell, options, params, tokens, state)
  bad = ~(result.residual <= options.limit)
  if options.policy == "warn":
    jax.debug.callback(_warn, result.residual, result.iterations, limit=options.limit)
  if options.policy == "nan":
    h = h * jnp.where(bad, jnp.nan, 1.0).astype(h.dtype)
  return h, result


def _warn(residual, iterations, limit):
  if not residual <= limit:
    print(
      f"newton_scan: residual {residual:.3g} after {iterations} iterations, above the limit of"
      f" {limit:g}: states and gradients are not those of the recurrence",
      flush=True,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(cell, options, params, tokens, state):
  """All states h [B T ...] and a `Report`; under "fallback", those of the loop where Newton's
  are bad."""
  h, residual, count = _newton(cell, options, params, tokens, state)
  fell_back = jnp.zeros((), bool)
  if options.policy == "fallback":
    fell_back = ~(residual <= options.limit)
    loop = lambda: _recurrent(cell, options, params, tokens, state)[0]
    h = jax.lax.cond(fell_back, loop, lambda: h)
  return h, Report(residual.astype(jnp.float32), count, fell_back)


def _solve_forward(cell, options, params, tokens, state):
  h, result = _solve(cell, options, params, tokens, state)
  return (h, result), (params, tokens, state, h)


def _solve_backward(cell, options, residuals, cotangents):
  params, tokens, state, h = residuals
  plan = choose_fold(h.shape[1])
  tokens = _filled(tokens, plan)
  previous = before(fold(h, plan, edge=True), state, tokens.start)
  g = fold(cotangents[0], plan)
  J = transpose(cell, _jacobian(cell, params, previous, tokens)[1])
  elements = affine.Affine(J, product(cell, J, g))
  if tokens.start is not None:
    elements = affine.reset(elements, tokens.start)
    elements = elements._replace(input=where_mask(~tokens.start, elements.input))
  nothing = jnp.zeros_like(state)
  from_right, d_state = _scan_linear(cell, elements, nothing, reverse=True, incoming=True)
  l = g + from_right
  l = l if tokens.real is None else where_mask(tokens.real, l)
  local = lambda params, x: cell.step(params, previous, x)
  d_params, d_x = jax.vjp(local, params, tokens.x)[1](l)
  d_x = jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else unfold(d, plan), d_x)
  return d_params, Tokens(d_x, None, None), d_state


_solve.defvjp(_solve_forward, _solve_backward)


def _newton(cell, options, params, tokens, state):
  """Newton's states, their residual, and the iterations made; by windows if there are any."""
  limits = cell.limits(state)
  T = jax.tree.leaves(tokens.x)[0].shape[1]
  W = options.window or T
  if W >= T:
    return _window(cell, options, limits, params, tokens, state)
  windows = -(-T // W)
  missing = windows * W - T
  if missing and tokens.real is None:
    tokens = tokens._replace(real=jnp.ones((state.shape[0], T), bool))
  split = lambda leaf, **mode: jnp.moveaxis(
    jnp.pad(leaf, ((0, 0), (0, missing)) + ((0, 0),) * (leaf.ndim - 2), **mode)
    .reshape(leaf.shape[0], windows, W, *leaf.shape[2:]), 1, 0)  # fmt: skip
  x = jax.tree.map(functools.partial(split, mode="edge"), tokens.x)
  tokens = Tokens(x, *jax.tree.map(split, tokens[1:]))

  def step(state, tokens):
    h, residual, count = _window(cell, options, limits, params, tokens, state)
    return h[:, -1], (h, residual, count)

  _, (h, residual, count) = jax.lax.scan(step, state, tokens)
  h = jnp.moveaxis(h, 0, 1).reshape(h.shape[1], windows * W, *h.shape[3:])[:, :T]
  return h, jnp.max(residual), jnp.max(count)


def _window(cell, options, limits, params, tokens, state):
  plan = choose_fold(jax.tree.leaves(tokens.x)[0].shape[1])
  tokens = _filled(tokens, plan)
  clip = lambda h: h if limits is None else jnp.clip(h, -limits, limits)
  guess = clip(cell.step(params, jnp.broadcast_to(0 * state, _shape(tokens.x, state)), tokens.x))
  if tokens.real is not None:
    guess = where_mask(tokens.real, guess)

  def residual(h):
    return jnp.max(jnp.abs(_value(cell, params, before(h, state, tokens.start), tokens) - h))

  def iterate(h):
    h = h + options.relaxation * _increment(cell, options, params, tokens, state, h)
    return clip(jnp.where(jnp.isfinite(h), h, guess))

  if options.tolerance is None:
    h = jax.lax.fori_loop(0, options.iterations, lambda _, h: iterate(h), guess)
    return unfold(h, plan), residual(h), jnp.asarray(options.iterations, jnp.int32)

  def unfinished(carry):
    _, error, count = carry
    return (count < options.iterations) & ~(error <= options.tolerance)

  def advance(carry):
    h = iterate(carry[0])
    return h, residual(h), carry[2] + 1

  first = guess, residual(guess), jnp.zeros((), jnp.int32)
  h, error, count = jax.lax.while_loop(unfinished, advance, first)
  return unfold(h, plan), error, count


def _increment(cell, options, params, tokens, state, h):
  """The solution of d_t = A_t d_{t-1} + f(h_{t-1}, x_t) - h_t."""
  previous = before(h, state, tokens.start)
  if options.method == "jacobi":
    return _value(cell, params, previous, tokens) - h
  diagonal = options.method == "quasi"
  f, A = _jacobian(cell, params, previous, tokens, diagonal=diagonal, own=True)
  # What comes before the first token is given: nothing multiplies it, were it inf or NaN.
  A = ((1 - options.damping) * A).at[0, 0].set(0)
  elements = affine.Affine(A, f - h)
  if tokens.start is not None:
    elements = affine.reset(elements, tokens.start)
  return _scan_linear(cell, elements, jnp.zeros_like(state), diagonal=diagonal)[0]


def _scan_linear(cell, elements, state, *, diagonal=False, **options):
  kind = {} if diagonal else KINDS[cell.structure]
  if kind != KINDS["dense"]:
    return affine_scan(elements, state, **kind, **options)
  elements = elements._replace(input=elements.input[..., None])
  h, last = affine_scan(elements, state[..., None], **kind, **options)
  return h[..., 0], last[..., 0]


def _filled(tokens, plan):
  """Tokens folded; what fills the last chunk up repeats the last token, and is not real."""
  x = jax.tree.map(lambda leaf: fold(leaf, plan, edge=True), tokens.x)
  real = tokens.real
  if plan.filled and real is None:
    real = jnp.ones(jax.tree.leaves(tokens.x)[0].shape[:2], bool)
  return Tokens(x, *(None if mask is None else fold(mask, plan) for mask in (real, tokens.start)))


def _shape(x, state):
  """Of all states, folded."""
  return (*jax.tree.leaves(x)[0].shape[:3], *state.shape[1:])


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


def _preference(cell, length, options, **arguments):
  guarded = cell.box is not None or options.policy != "ignore"
  if guarded and cell.structure != "dense" and length >= 1024:
    return ["parallel", "recurrent"]
  return ["recurrent", "parallel"]


dispatch.declare(
  "newton_scan",
  {
    "recurrent": dispatch.Implementation(
      _recurrent, dispatch.anything, "T steps, exact, least memory"
    ),
    "parallel": dispatch.Implementation(
      _parallel, dispatch.anything, "Newton: a few linear scans, log T or sqrt T depth"
    ),
  },
  _preference,
)
