"""Nonlinear recurrences of any cell: `newton_scan`, in parallel over time or one token after the
other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import dispatch
from ops.affine_scan import Plan, choose_plan, from_windows, to_windows
from ops.kernels.gpu import newton as kernels
from ops.newton_cells import Cell, check_step, floating_dtype, guess_state_shape
from ops.newton_solve import Options, Report, Tokens, recurrent, solve
from ops.precision import varying_like
from ops.segments import find_segments, where_mask
from ops.time_axis import splits_time

METHODS = ("newton", "quasi", "jacobi")
POLICIES = ("ignore", "warn", "fallback", "nan")


@splits_time
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

  Where a mesh splits time (`ops.time_axis`), Newton's method exchanges one map per iteration; the
  loop runs on one device after the other, which splits the memory and not the time.

  Args:
    cell: the recurrence, see `ops.Cell`; whether its promises are true, `ops.check_cell` tells.
    params: any pytree of arrays, differentiable.
    x: any pytree of [B T ...] arrays, differentiable where floating.
    initial_state: [B D], or [B M D] for a "block" cell; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: scan from the right.
    implementation: "recurrent" (one token after the other, gradients by autodiff), "parallel"
      (Newton), "pallas" (the loop in one kernel; where channels are few, over segments at once,
      with Newton's method between them until they fit, whatever `iterations`), or None: the kernel
      where it can run; else Newton on accelerators, for cells that are not dense and have a box or
      are guarded by `policy`; else the loop.
    iterations: of Newton's method; with `tolerance`, at most.
    tolerance: stop at a residual of at most this; None makes exactly `iterations`.
    method: "newton"; "quasi" (the diagonal of the Jacobian: linear memory for dense cells, more
      iterations); "jacobi" (no Jacobian: one token further per iteration, more where the cell
      forgets fast). Gradients are exact all the same.
    damping: Jacobians are multiplied by 1 - damping.
    relaxation: increments are multiplied by it.
    window: solve so many tokens at a time, each window from the last state of the one before. Where
      a mesh splits time, Newton's method takes all tokens at once: None, or at least T.
    policy: where the residual exceeds `limit` or is not a number: "ignore"; "warn" (print, once
      per call); "fallback" (the sequential scan's states, bit for bit); "nan" (everything NaN).
      Under `jax.vmap` "fallback" computes both and selects: map over the batch axis instead. A
      chaotic cell has states that solve the recurrence to rounding and are not the loop's: no
      residual tells them apart, `ops.check_cell` does.
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
  problem = pose(cell, params, x, initial_state, segment_ids, reverse, options)
  _, run = problem.choose(implementation)
  h, result = run(cell, options, problem.params, problem.tokens, problem.state)
  return problem.answer(h, h[:, -1], result if report else None)


class Problem(NamedTuple):
  """The arguments of `newton_scan`, checked, in the order of time, in the dtype of the states."""

  cell: Cell
  options: Options
  params: Any
  tokens: Tokens
  state: Array  # before the first token
  segment_ids: Array | None
  reverse: bool
  dtype: Any  # of the states returned

  def choose(self, implementation: str | None, parts: int = 1) -> tuple[str, Callable]:
    """The implementation that runs it, these tokens being one of so many parts."""
    length = parts * jax.tree.leaves(self.tokens.x)[0].shape[1]
    return dispatch.choose(
      "newton_scan", implementation, cell=self.cell, params=self.params, x=self.tokens.x,
      initial_state=self.state, length=length, segment_ids=self.segment_ids, options=self.options,
      parts=parts,
    )  # fmt: skip

  def answer(self, h: Array, final_state: Array, report: Report | None):
    """What `newton_scan` returns, from the states of all tokens in the order of time."""
    real = self.tokens.real
    h = h if real is None else where_mask(real, h)
    h = (jnp.flip(h, 1) if self.reverse else h).astype(self.dtype)
    return (h, final_state) if report is None else (h, final_state, report)


def pose(cell, params, x, initial_state, segment_ids, reverse, options) -> Problem:
  """The problem that these arguments of `newton_scan` are; raises what it raises."""
  _check_options(options)
  if not isinstance(cell, Cell):
    raise ValueError(f"cell is a {type(cell).__name__}, expected an ops.Cell(step, structure)")
  params, x = jax.tree.map(jnp.asarray, (params, x))
  rows, _ = _check_tokens(x, segment_ids)
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
  state = varying_like(initial_state.astype(dtype), *jax.tree.leaves((params, x)), segment_ids)
  tokens = Tokens(x, None, None)
  if segment_ids is not None:
    segments = find_segments(segment_ids, reverse=reverse)
    x = jax.tree.map(lambda leaf: where_mask(segments.real, leaf), x)
    tokens = Tokens(x, segments.real, segments.start)
  if reverse:
    tokens = jax.tree.map(lambda leaf: jnp.flip(leaf, 1), tokens)
  return Problem(cell, options, params, tokens, state, segment_ids, reverse, out_dtype)


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


def _parallel(cell, options, params, tokens, state):
  T = jax.tree.leaves(tokens.x)[0].shape[1]
  plan = choose_plan(T, state.size, options.window)
  h, result = solve(cell, options, plan, params, fold(tokens, plan), state)
  return obey(options, from_windows(h, plan), result), result


def fold(tokens: Tokens, plan: Plan) -> Tokens:
  """Tokens [B T ...] as windows [S W B ...]; what fills them up is padding."""
  x, real, start = tokens
  if plan.filled and real is None:
    real = jnp.ones(jax.tree.leaves(x)[0].shape[:2], bool)
  masks = (None if mask is None else to_windows(mask, plan) for mask in (real, start))
  return Tokens(jax.tree.map(lambda leaf: to_windows(leaf, plan, edge=True), x), *masks)


def obey(options: Options, h: Array, result: Report, speaks: bool | Array = True) -> Array:
  """The states that `options.policy` makes of Newton's; of many devices one speaks."""
  if options.policy == "warn":
    residual = jnp.where(speaks, result.residual, 0)
    jax.debug.callback(_warn, residual, result.iterations, limit=options.limit)
  if options.policy == "nan":
    h *= jnp.where(result.residual <= options.limit, 1.0, jnp.nan).astype(h.dtype)
  return h


def _warn(residual, iterations, limit):
  if not residual <= limit:
    print(
      f"newton_scan: residual {residual:.3g} after {iterations} iterations, above the limit of"
      f" {limit:g}: states and gradients are not those of the recurrence",
      flush=True,
    )


def _preference(cell, length, options, **arguments):
  guarded = cell.box is not None or options.policy != "ignore"
  kernel = ["pallas"] if length > 1 else []
  # On a CPU Newton is about as fast as the loop, which is exact.
  if dispatch.platform() != "cpu" and guarded and length >= 64 and cell.structure != "dense":
    return [*kernel, "parallel", "recurrent"]
  return [*kernel, "recurrent", "parallel"]


dispatch.declare(
  "newton_scan",
  {
    "recurrent": dispatch.Implementation(
      recurrent, dispatch.anything, "T steps, exact, least memory"
    ),
    "parallel": dispatch.Implementation(
      _parallel, dispatch.anything, "Newton: a few linear scans, log T or sqrt T depth"
    ),
    "pallas": dispatch.Implementation(
      kernels.run, kernels.supports, "T steps in one kernel, exact, least memory"
    ),
  },
  _preference,
)
