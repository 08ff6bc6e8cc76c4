"""What the doctor accepts: errors against float64, in units that fit the dtype.

float32 and float64 are judged by the largest error in units of the largest entry of the tensor,
bfloat16 by the largest and by the root mean square of the error in units of the root mean square.
Where a tensor nearly vanishes, because terms of the size of 1 cancel, rounding does not shrink with
it. For that the limits of gates' gradients, and in float32 and float64 those of states, have an
absolute part, made of the size of those terms: with L what is differentiated, x dL/dx has one unit
for all inputs x, and q dL/dq is a sample of its terms.
"""

from typing import NamedTuple

import numpy as np

# Of the largest entry: outputs and states, gradients.
OF_LARGEST = {"float64": (1e-10, 1e-10), "float32": (2e-5, 1e-4)}
# Of the root mean square, for bfloat16: the largest error, beyond what rounding the reference
# itself can cost, and the root mean square of the error.
OF_RMS = {"o": (5e-2, 5e-3), "state": (5e-2, 4e-3), "gradient": (8e-2, 8e-3)}
# Of |q dL/dq|, times the square root of a chunk's length: the absolute part.
ABSOLUTE = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 4e-3}
CHUNK = 64  # tokens
HALF_ULP = 2.0**-8  # of bfloat16, relative, at most
# Errors below this are none: float32 has no numbers there that arithmetic does not flush to zero.
SMALLEST = {"float64": 1e-300, "float32": 1e-37, "bfloat16": 1e-37}


class Verdict(NamedTuple):
  """How one tensor compares with the oracle's."""

  error: float  # in units of the largest entry or, bfloat16, of the root mean square
  limit: float

  @property
  def passed(self) -> bool:
    return bool(self.error <= self.limit)

  @property
  def share(self) -> float:
    """The error in units of its limit."""
    return self.error / self.limit


def judge(
  name: str, actual: np.ndarray, reference: np.ndarray, dtype: str, terms: float = 0.0
) -> Verdict:
  """The verdict on one tensor.

  Args:
    name: "o", "state", or "d" and the input's name.
    actual: of the implementation.
    reference: of the oracle, float64 or complex128.
    dtype: of the inputs.
    terms: the size of the terms that the tensor is a sum of; 0 where it needs no absolute part.

  Returns:
    The error and its limit; infinite where anything is NaN or infinite.
  """
  kind = name if name in ("o", "state") else "gradient"
  if actual.shape != reference.shape or not np.isfinite(actual.astype(reference.dtype)).all():
    return Verdict(np.inf, 1.0)
  deviation = np.abs(actual.astype(reference.dtype) - reference)
  absolute = ABSOLUTE[dtype] * np.sqrt(CHUNK) * terms + SMALLEST[dtype]
  if dtype in OF_LARGEST:
    limit = OF_LARGEST[dtype][kind == "gradient"]
    return Verdict(float(deviation.max() / (np.abs(reference).max() + absolute / limit)), limit)
  largest, typical = OF_RMS[kind]
  rms = np.sqrt(np.mean(np.abs(reference) ** 2))
  beyond = np.maximum(deviation - HALF_ULP * np.abs(reference), 0.0).max()
  verdicts = (
    Verdict(float(beyond / (rms + absolute / largest)), largest),
    Verdict(float(np.sqrt(np.mean(deviation**2)) / (rms + absolute / typical)), typical),
  )
  return max(verdicts, key=lambda verdict: verdict.share)
