"""How Newton's method converges on nonlinear recurrences: a table, and a figure.

  python -m experiments.newton_convergence [--png newton-convergence.png]

Cells are random, in float64; so are their inputs, normal. What is printed and drawn is the largest
difference to the sequential scan, after each iteration; drawn too is how many iterations bring the
residual below 1e-6, against the length of the sequence.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.plots import STYLE
from ops import Cell
from ops.check_cell import Convergence, convergence

CHANNELS = 64
ITERATIONS = 24
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # tokens
SMALL = 1e-6  # of a residual
COLORS = ("#4477aa", "#228855", "#aa3377", "#cc6633", "#ddaa33", "#999933")


def gru(a, h, u):
  """The diagonal GRU of ParaRNN (arXiv:2510.21450)."""
  z = jax.nn.sigmoid(a[0] * h + u[..., 0, :])
  r = jax.nn.sigmoid(a[1] * h + u[..., 1, :])
  c = jnp.tanh(a[2] * h * r + u[..., 2, :])
  return (1 - z) * h + z * c


def lstm(a, state, u):
  """The diagonal LSTM of ParaRNN: a [5 D] holds three recurrent weights and two peepholes."""
  c, h = state[..., 0, :], state[..., 1, :]
  f = jax.nn.sigmoid(a[0] * h + a[3] * c + u[..., 0, :])
  c = f * c + (1 - f) * jnp.tanh(a[1] * h + u[..., 1, :])
  o = jax.nn.sigmoid(a[2] * h + a[4] * c + u[..., 2, :])
  return jnp.stack([c, o * jnp.tanh(c)], axis=-2)


def flip_flop(a, h, u):
  """Keeps its sign, or turns it where the first input is negative."""
  return jnp.tanh(a[0] * h * jnp.sign(u[..., 0, :]))


@dataclass(frozen=True)
class Case:
  """One line of the table."""

  name: str
  step: Callable
  weights: str  # "fan_in" | "clipped" | "normal" | "three"
  box: float | None

  def converge(self, T: int, seed: int = 0) -> Convergence:
    """On one sequence of T tokens."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(5, CHANNELS))
    a = {
      "fan_in": a / np.sqrt(CHANNELS),
      "clipped": np.clip(a, -0.5, 0.5),
      "normal": a,
      "three": np.full_like(a, 3.0),
    }[self.weights]
    u = rng.normal(size=(1, T, 3, CHANNELS))
    is_lstm = self.step is lstm
    state = np.zeros((1, 2, CHANNELS) if is_lstm else (1, CHANNELS))
    if self.step is flip_flop:
      state += 1
    cell = Cell(self.step, "block" if is_lstm else "diagonal", box=self.box)
    with jax.enable_x64(True):
      arrays = (jnp.asarray(array) for array in (a, u, state))
      return convergence(cell, *arrays, iterations=ITERATIONS)


CASES = (
  Case("GRU, a ~ N(0, 1/n)", gru, "fan_in", None),
  Case("GRU, |a| <= 0.5", gru, "clipped", None),
  Case("LSTM, |a|, |w| <= 0.5", lstm, "clipped", None),
  Case("GRU, a ~ N(0, 1)", gru, "normal", None),
  Case("flip-flop, in its box", flip_flop, "three", 1.0),
  Case("flip-flop, unbounded", flip_flop, "three", None),
)


def table(courses: Sequence[Convergence], T: int) -> str:
  """The largest error after each of the first iterations, one line per case."""
  shown = (0, 1, 2, 3, 4, 5, 8, 16)
  lines = [f"largest error after K iterations, T = {T}, float64"]
  lines.append(f"{'K':<24}" + "".join(f"{k:>9}" for k in shown))
  for case, course in zip(CASES, courses):
    lines.append(f"{case.name:<24}" + "".join(f"{course.error[k]:9.0e}" for k in shown))
  return "\n".join(lines)


def draw(by_length: dict[int, Sequence[Convergence]], png: str | os.PathLike) -> None:
  """Left the residual against the iteration, of the longest; right the iterations needed against
  the length.

  Args:
    by_length: tokens -> one course per case.
    png: The file to write.
  """
  lengths = sorted(by_length)
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(10.0, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
      axes.grid(axis="y")
      axes.set_axisbelow(True)
    for i, (case, color) in enumerate(zip(CASES, COLORS)):
      style = dict(color=color, linewidth=1.8, marker="o", markersize=3.5, label=case.name)
      residual = by_length[lengths[-1]][i].residual
      left.plot(np.clip(residual, 1e-17, 1e12), **style)
      needed = [_first_below(by_length[T][i].residual) for T in lengths]
      right.plot(lengths, needed, **style)
    left.set_yscale("log")
    left.set_ylim(1e-17, 1e12)
    left.set_xlabel(f"iteration (T = {lengths[-1]})")
    left.set_ylabel("residual, max |h - f(h, x)|")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:.0f}")
    right.set_xticks(lengths)
    right.set_ylim(0, ITERATIONS + 1)
    right.set_xlabel("length (tokens)")
    right.set_ylabel("iterations to a residual of $10^{-6}$")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    scratch = f"{os.fspath(png)}.tmp"
    figure.savefig(scratch, format="png", facecolor="white")
    os.replace(scratch, png)


def _first_below(residual: np.ndarray) -> float:
  """The first iteration from which on the residual stays small; nan if there is none."""
  small = np.flatnonzero(~(residual <= SMALL))
  first = small[-1] + 1 if len(small) else 0
  return float(first) if first < len(residual) else float("nan")


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table and writes the figure."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--png", default="newton-convergence.png", help="the figure to write")
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
  options = parser.parse_args(arguments)
  by_length = {T: [case.converge(T) for case in CASES] for T in options.lengths}
  longest = max(options.lengths)
  print(table(by_length[longest], longest))
  draw(by_length, options.png)
  print(f"wrote {options.png}")


if __name__ == "__main__":
  main()
