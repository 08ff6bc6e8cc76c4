"""What `check_cell` says of true and of false cells, and what `newton_scan` refuses by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from tests.ops import cells
from tests.ops.cells import CELLS, D, draw, narrow
from tests.quick_compilation import quick_compilation as quick_compilation


@pytest.fixture(scope="module")
def data():
  return {name: narrow(draw(name, 2, 60)) for name in ("diagonal", "block")}


def test_a_true_cell_is_called_safe(data, capsys):
  params, x, state = data["block"]
  report = ops.check_cell(cells.LSTM, params, x, state)
  assert report.safe and not report.falsehoods and 3 <= report.iterations <= 6
  assert report.lyapunov < 0 and report.gradient_error < 1e-5
  assert 0.3 < report.largest_jacobian < 3
  assert f"Newton is safe: {report.iterations} iterations" in capsys.readouterr().out


def mixing(params, h, u):
  return cells.gru(params, h + 0.1 * jnp.roll(h, 1, axis=-1), u)


def test_false_declarations_are_named(data):
  params, x, state = data["diagonal"]
  falsehood = r"structure 'diagonal', which is false: channels mix, .* channel \d .* channel \d"
  with pytest.raises(ValueError, match=falsehood):
    ops.check_cell(ops.Cell(mixing, "diagonal"), params, x, state)
  with pytest.raises(ValueError, match=falsehood):
    jax.jit(lambda x: ops.newton_scan(ops.Cell(mixing, "diagonal"), params, x))(x)
  with pytest.raises(ValueError, match=r"box 0\.3, which is false: a state within it becomes"):
    ops.check_cell(dataclasses.replace(cells.GRU, box=0.3), params, x)
  wrong = dataclasses.replace(cells.GRU, jacobian=lambda params, h, x: 0.9 * jnp.ones_like(h))
  with pytest.raises(ValueError, match=r"cell\.jacobian is false: at entry"):
    ops.check_cell(wrong, params, x, state)
  report = ops.check_cell(wrong, params, x, state, raise_on_false=False)
  assert not report.safe and len(report.falsehoods) == 1 and "not safe" in report.verdict


def test_block_channels_that_mix_are_refused(data):
  params, x, state = data["block"]
  mixing = lambda params, h, u: cells.lstm(params, h[..., ::-1], u)
  with pytest.raises(ValueError, match="structure 'block', which is false: channels mix"):
    ops.newton_scan(ops.Cell(mixing, "block"), params, x, initial_state=state)


def test_a_chaotic_cell_is_called_unsafe():
  x = np.zeros((2, 300, D), np.float32)
  state = np.linspace(0.1, 0.6, 2 * D, dtype=np.float32).reshape(2, D)
  cell = ops.Cell(cells.logistic, "diagonal", box=1.0)
  report = ops.check_cell(cell, np.float32(1.9), x, jnp.asarray(state))
  assert not report.safe and report.iterations is None
  # The exponent of this map is 0.55 nats per step.
  assert report.lyapunov == pytest.approx(0.55, abs=0.1)


def test_true_structures_pass_whatever_the_width():
  for name, cell in CELLS.items():
    params, x, state = narrow(draw(name, 2, 4))
    jax.eval_shape(lambda p, x, s: ops.newton_scan(cell, p, x, initial_state=s), params, x, state)  # noqa: B023


@pytest.mark.parametrize(
  ("step", "structure", "message"),
  [
    (cells.gru, "tridiagonal", "structure is 'tridiagonal'"),
    (lambda params, h, x: h[..., :1], "diagonal", r"returns float32\[B, 1\] for a state of"),
    (lambda params, h, x: (h, h), "diagonal", "cell.step returns tuple"),
  ],
)
def test_cells_that_cannot_be(data, step, structure, message):
  params, x, state = data["diagonal"]
  with pytest.raises(ValueError, match=message):
    ops.newton_scan(ops.Cell(step, structure), params, x, initial_state=state)
