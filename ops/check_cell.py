"""Is a cell what it claims to be, and can Newton's method solve it? A report for a researcher."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ops.affine_scan import choose_plan, to_windows
from ops.newton import newton_scan
from ops.newton_cells import (
  Cell,
  false_structure,
  floating_dtype,
  guess_state_shape,
  value_and_jacobian,
)
from ops.newton_solve import Options, Tokens, initial_guess, iteration, recurrent

NEUTRAL = 0.01  # nats per token: above this a Lyapunov exponent counts as positive


class Convergence(NamedTuple):
  """How Newton's method went, from the guess (entry 0) on; all tokens in one window."""

  residual: np.ndarray  # max |h_t - f(h_{t-1}, x_t)|
  error: np.ndarray  # max |h - the sequential scan's h|


@dataclass(frozen=True)
class CellReport:
  """What `check_cell` found; `str` of it is the printed report.

  Attributes:
    falsehoods: what the cell declares and is not so, one sentence each; empty is good.
    iterations: after which the states equal the sequential scan's to `tolerance`; None: never.
    tolerance: largest error allowed, in units of the largest state, or of 1 if that is less.
    convergence: residual and error after each iteration.
    largest_jacobian: of all entries along the trajectory, absolute.
    lyapunov: the largest Lyapunov exponent, nats per token; where it is positive, errors grow
      along the sequence and no parallel method helps.
    gradient_error: largest error of the gradients against autodiff through the sequential scan,
      in units of the largest gradient of each array.
    safe: nothing is false, Newton converges, gradients agree, the exponent is not positive.
    verdict: that in a sentence.
  """

  falsehoods: tuple[str, ...]
  iterations: int | None
  tolerance: float
  convergence: Convergence
  largest_jacobian: float
  lyapunov: float
  gradient_error: float
  safe: bool
  verdict: str

  def __str__(self) -> str:
    errors = " ".join(f"{error:.0e}" for error in self.convergence.error[:9])
    needed = "never" if self.iterations is None else f"{self.iterations} iterations"
    lines = [f"false: {falsehood}" for falsehood in self.falsehoods] or ["declarations: true"]
    return "\n".join(
      [
        *lines,
        f"Newton equals the sequential scan to {self.tolerance:g}: {needed}",
        f"largest error after 0, 1, 2, ... iterations: {errors}",
        f"largest |Jacobian| {self.largest_jacobian:.3g},"
        f" largest Lyapunov exponent {self.lyapunov:+.3f} nats per token",
        f"gradients differ from the sequential scan's by {self.gradient_error:.1e}",
        self.verdict,
      ]
    )


def check_cell(
  cell: Cell,
  params: Any,
  x: Any,
  initial_state: Float[Array, "B ..."] | None = None,
  *,
  iterations: int = 16,
  tolerance: float | None = None,
  raise_on_false: bool = True,
  seed: int = 0,
) -> CellReport:
  """Tries everything that `cell` declares, and Newton's method on it, on the data given.

  The structure (a random direction against the declared Jacobian), an overriding Jacobian, and the
  box (random points and corners of it) are tried at every token of `x`, then Newton's method and
  its gradients against the sequential scan.

  Args:
    cell, params, x, initial_state: as `ops.newton_scan` takes them; concrete, and as in training:
      the answers depend on them. A few rows and a few hundred tokens do.
    iterations: how many one is ready to pay for.
    tolerance: see `CellReport`; None is 1e-5, or 1e-10 for float64.
    raise_on_false: raise what is declared falsely; else it stands in the report.
    seed: of the random numbers.

  Returns:
    The report, which is also printed.

  Raises:
    ValueError: something is declared falsely; the message says what.
  """
  params, x = jax.tree.map(jnp.asarray, (params, x))
  dtype = floating_dtype(params, x, initial_state)
  tolerance = tolerance or (1e-10 if dtype == jnp.float64 else 1e-5)
  wide = lambda leaf: jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None)
  params, x = jax.tree.map(wide, (params, x))
  first = jax.tree.map(lambda leaf: leaf[:, 0], x)
  if initial_state is None:
    rows = jax.tree.leaves(x)[0].shape[0]
    initial_state = jnp.zeros((rows, *guess_state_shape(cell, params, first)), dtype)
  state = jnp.asarray(initial_state, dtype)
  h, previous = _trajectory(cell, params, x, state)
  falsehoods = _falsehoods(cell, params, x, state, previous, seed)
  if falsehoods and raise_on_false:
    raise ValueError("; ".join(falsehoods))
  J = jax.jit(lambda *a: value_and_jacobian(cell, *a)[1])(params, previous, x)
  course = convergence(cell, params, x, state, iterations=iterations)
  scale = max(1.0, float(jnp.max(jnp.abs(h))))
  reached = np.flatnonzero(course.error <= tolerance * scale)
  needed = int(reached[0]) if len(reached) else None
  lyapunov = float(_lyapunov(cell, params, x, previous, seed))
  gradient_error = float("nan")
  if not any("structure" in falsehood for falsehood in falsehoods):
    enough = iterations if needed is None else min(iterations, needed + 1)
    gradient_error = _gradient_error(cell, params, x, state, enough, seed)
  safe, verdict = _verdict(
    falsehoods, needed, iterations, course.error[-1], lyapunov, gradient_error, tolerance
  )
  report = CellReport(
    falsehoods, needed, tolerance, course, float(jnp.max(jnp.abs(J))), lyapunov, gradient_error,
    safe, verdict,
  )  # fmt: skip
  print(report)
  return report


def convergence(
  cell: Cell,
  params: Any,
  x: Any,
  initial_state: Float[Array, "B ..."],
  *,
  iterations: int,
  method: str = "newton",
) -> Convergence:
  """Residual and error before and after each of so many iterations, all tokens in one window."""
  T = jax.tree.leaves(x)[0].shape[1]
  plan = choose_plan(T, initial_state.size, T)
  options = Options(iterations, None, method, 0.0, 1.0, T, "ignore", 1.0)
  course = _course(cell, options, plan, params, x, initial_state)
  return Convergence(*map(np.asarray, course))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _course(cell, options, plan, params, x, state):
  truth = to_windows(recurrent(cell, options, params, Tokens(x, None, None), state)[0], plan)[0]
  real = to_windows(jnp.ones(jax.tree.leaves(x)[0].shape[:2], bool), plan)[0]
  window = jax.tree.map(lambda leaf: to_windows(leaf, plan, edge=True)[0], x)
  tokens = Tokens(window, real if plan.filled else None, None)
  limits = cell.limits(state)
  guess = initial_guess(cell, limits, params, tokens, state, len(real))
  iterate, residual = iteration(cell, options, plan, limits, params, tokens, guess, state)
  mask = real.reshape(real.shape + (1,) * (truth.ndim - 2))
  measure = lambda h: (residual(h), jnp.max(jnp.where(mask, jnp.abs(h - truth), 0)))

  def step(h, _):
    h = iterate(h)
    return h, measure(h)

  _, later = jax.lax.scan(step, guess, length=options.iterations)
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), measure(guess), later)


def _trajectory(cell, params, x, state):
  """The sequential scan's states, and those before each token, [B T ...]."""
  h = jax.jit(lambda *a: recurrent(cell, None, a[0], Tokens(a[1], None, None), a[2])[0])(
    params, x, state
  )
  return h, jnp.concatenate([state[:, None], h[:, :-1]], axis=1)


def _falsehoods(cell, params, x, state, previous, seed) -> tuple[str, ...]:
  h, tokens = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (previous, x))
  found = [false_structure(cell, params, h, tokens)] if cell.structure != "dense" else []
  if cell.jacobian is not None:
    found.append(_false_jacobian(cell, params, h, tokens))
  if cell.box is not None:
    found.append(_false_box(cell, params, x, state, seed))
  return tuple(falsehood for falsehood in found if falsehood)


def _false_jacobian(cell, params, h, x):
  own = value_and_jacobian(cell, params, h, x, own=True)[1]
  exact = value_and_jacobian(cell, params, h, x)[1]
  worst = np.unravel_index(np.argmax(np.abs(own - exact)), exact.shape)
  if np.abs(own - exact).max() <= 1e-4 * max(1e-3, np.abs(exact).max()):
    return None
  return (
    f"cell.jacobian is false: at entry {tuple(int(i) for i in worst[1:])} it is {own[worst]:.4g},"
    f" and the derivative of step is {exact[worst]:.4g}"
  )


def _false_box(cell, params, x, state, seed):
  """Random points of the box, and its corners, at every token."""
  rng = np.random.default_rng(seed)
  limits = np.broadcast_to(np.asarray(cell.limits(state))[:, None], _all_states(x, state))
  reach = np.where(np.isfinite(limits), limits, 3.0)
  inside = rng.uniform(-1, 1, size=reach.shape) * reach
  corners = rng.choice([-1.0, 1.0], size=reach.shape) * reach
  worst = None
  for h in (inside, corners):
    new = np.abs(jax.jit(cell.step)(params, jnp.asarray(h, state.dtype), x))
    excess = new / limits
    if not excess.max() <= 1 + 1e-5 and (worst is None or not excess.max() <= worst[0]):
      at = np.unravel_index(np.argmax(excess), excess.shape)
      worst = excess[at], new[at], limits[at], tuple(int(i) for i in at[2:])
  if worst is None:
    return None
  return (
    f"cell declares box {cell.box}, which is false: a state within it becomes {worst[1]:.4g} at"
    f" entry {worst[3]}, beyond {worst[2]:.4g}"
  )


def _all_states(x, state):
  return (*jax.tree.leaves(x)[0].shape[:2], *state.shape[1:])


def _lyapunov(cell, params, x, previous, seed):
  """Mean log growth of random directions along the trajectory: of each channel on its own where
  channels do not mix; the largest channel, the mean over rows."""
  axes = {"diagonal": (), "block": (-2,), "dense": (-1,)}[cell.structure]
  tiny = float(jnp.finfo(previous.dtype).tiny)
  norm = lambda v: jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True)) if axes else jnp.abs(v)

  @jax.jit
  def mean_growth(params, x, previous, v):
    def step(v, token):
      h, x = token
      v = jax.jvp(lambda h: cell.step(params, h, x), (h,), (v,))[1]
      size = jnp.maximum(norm(v), tiny)
      v = jnp.where(size > tiny, v / size, 1.0)
      return v, jnp.log(size)

    by_time = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (previous, x))
    logs = jax.lax.scan(step, v / norm(v), by_time)[1]
    return jnp.max(jnp.mean(logs, axis=(0, 1)))

  v = np.random.default_rng(seed).normal(size=previous[:, 0].shape)
  return mean_growth(params, x, previous, jnp.asarray(v, previous.dtype))


def _gradient_error(cell, params, x, state, iterations, seed) -> float:
  shape = _all_states(x, state)
  weights = np.random.default_rng(seed).normal(size=shape)
  floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
  leaves, treedef = jax.tree.flatten((params, x, state))
  moved = [i for i, leaf in enumerate(leaves) if floating(leaf)]

  def gradients(implementation):
    def loss(given):
      full = list(leaves)
      for i, leaf in zip(moved, given):
        full[i] = leaf
      params, x, state = jax.tree.unflatten(treedef, full)
      h, final_state = newton_scan(
        cell, params, x, initial_state=state, implementation=implementation, iterations=iterations
      )
      return jnp.sum(h * jnp.asarray(weights, h.dtype)) + jnp.sum(final_state)

    return jax.jit(jax.grad(loss))([leaves[i] for i in moved])

  size = lambda g: float(jnp.max(jnp.abs(g)))
  pairs = zip(gradients("parallel"), gradients("recurrent"))
  return float(np.max([size(a - b) / max(size(b), 1e-30) for a, b in pairs]))


def _verdict(falsehoods, needed, iterations, error, lyapunov, gradient_error, tolerance):
  if falsehoods:
    return False, "Newton is not safe: what is declared falsely makes its answers wrong"
  if needed is None:
    why = f"after {iterations} iterations the error is {error:.1e}"
    if lyapunov > NEUTRAL:
      why += ", and the cell is chaotic here"
    return False, f"Newton is not safe: {why}; run it sequentially, or with policy='fallback'"
  if lyapunov > NEUTRAL:
    return False, (
      f"Newton is not safe: it took {needed} iterations here, but the cell is chaotic and longer"
      " sequences take more; use policy='fallback'"
    )
  if not gradient_error <= 100 * tolerance:
    return False, f"Newton is not safe: gradients are wrong by {gradient_error:.1e}"
  return True, f"Newton is safe: {needed} iterations reach {tolerance:g}"
