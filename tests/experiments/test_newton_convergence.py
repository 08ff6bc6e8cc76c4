"""Newton's convergence is what was measured once, and its figure gets drawn."""

import numpy as np
import pytest

from experiments import newton_convergence
from ops.check_cell import Convergence
from tests.quick_compilation import quick_compilation as quick_compilation

# Largest errors after 0, 1, ... iterations on 2048 tokens of 64 channels, measured independently.
MEASURED = {
  "GRU, |a| <= 0.5": (9e-1, 1e-1, 3e-3, 2e-6, 5e-13),
  "LSTM, |a|, |w| <= 0.5": (9e-1, 2e-1, 1e-2, 3e-5, 2e-10),
}


@pytest.mark.parametrize("name", MEASURED)
def test_errors_are_within_ten_of_those_measured(name):
  case = next(case for case in newton_convergence.CASES if case.name == name)
  error = case.converge(2048).error[: len(MEASURED[name])]
  assert (np.abs(np.log10(error / MEASURED[name])) <= 1).all(), error


def test_the_figure_and_the_table(tmp_path):
  course = Convergence(*np.geomspace(1, 1e-16, 2 * 25).reshape(2, 25))
  png = tmp_path / "figure.png"
  newton_convergence.draw({T: [course] * 6 for T in (16, 32)}, png)
  assert png.read_bytes().startswith(b"\x89PNG")
  text = newton_convergence.table([course] * 6, 32)
  assert "T = 32" in text and len(text.splitlines()) == 8
