"""The least that an op must move and compute, and so the least time that it can take on a device.

Bytes: each input is read once and each output written once, at the width of its dtype. With q, k of
K numbers a head in bfloat16, vector gates of the same width and scalars in float32, that is for one
token and head

  SSD    forward 4K + 4V + 4    backward 8K + 6V + 8         with G groups K G/H instead of K
  GLA    forward 6K + 4V        backward 12K + 6V            float32 gates: 8K + 4V, 16K + 6V
  delta  forward 4K + 4V + 8    backward 8K + 6V + 16        the gated rule; 4 and 8 without gates

the backward pass reading the inputs and the output's cotangent and writing a gradient of each
input. States count nothing: they are small beside T tokens.

FLOP: two for a product and its sum, for the form in chunks of C = 64 with whole C by C tiles,
whichever implementation runs and whether or not it does as much.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

C = 64  # tokens in a chunk
PASSES = ("forward", "forward_backward")


class Work(NamedTuple):
  """What one call must do."""

  bytes: float
  flops: float
  exponentials: float


class Rates(NamedTuple):
  """What a device can do in a second beside copying."""

  bfloat16_flops: float
  exponentials: float


# By jax's device_kind. The products are what large matrices reach, not the data sheet's figure; the
# exponentials are 16 per clock and multiprocessor.
RATES = {
  "NVIDIA H100 80GB HBM3": Rates(800e12, 3.7e12),
  "NVIDIA H200": Rates(800e12, 3.7e12),
}


def least_work(
  op: str, shape: Mapping[str, int], inputs: Mapping[str, Any], output: Any, pass_: str
) -> Work:
  """The work of one call.

  Args:
    op: a name in `benchmark_cases.CASES`, or "causal_attention".
    shape: sizes by letter.
    inputs: what has a shape and a dtype, by name.
    output: likewise.
    pass_: forward or forward_backward.
  """
  read, written = sum(map(_bytes, inputs.values())), _bytes(output)
  moved = read + written
  forward, backward, exponentials = _arithmetic(op, shape)
  if pass_ == "forward_backward":
    moved += 2 * read + written
    return Work(moved, forward + backward, 2 * exponentials)
  return Work(moved, forward, exponentials)


def floor_seconds(work: Work, bandwidth: float, rates: Rates | None, dtype: str) -> float:
  """The longest of what the bytes, the exponentials and the products need.

  Args:
    work: from `least_work`.
    bandwidth: bytes per second of a large copy.
    rates: of the device; None if they are not known, and then only the bytes count.
    dtype: of the products; only those in bfloat16 have a known rate.
  """
  seconds = work.bytes / bandwidth
  if rates is None:
    return seconds
  if dtype == "bfloat16":
    seconds = max(seconds, work.flops / rates.bfloat16_flops)
  return max(seconds, work.exponentials / rates.exponentials)


def _bytes(array) -> int:
  return math.prod(array.shape) * array.dtype.itemsize


def _arithmetic(op, shape) -> tuple[float, float, float]:
  """FLOP of the forward and of the backward pass, and exponentials of either."""
  tokens = shape["B"] * shape["T"]
  if op == "linear_scan":
    return 2 * tokens * shape["D"], 3 * tokens * shape["D"], 0
  if op == "causal_conv":
    products = 2 * tokens * shape["D"] * shape["W"]
    return products, 2 * products, 0
  if op == "selective_scan":
    D, N = shape["D"], shape["N"]
    # Backward: the states again (5 each), then d, dA, dB, dC, ddt, du and the step before.
    return tokens * D * (6 * N + 3), tokens * D * (20 * N + 6), tokens * D * N
  heads, K, V = tokens * shape["H"], shape["K"], shape["V"]
  if op == "causal_attention":
    # Half of all pairs; backward forms the scores again and four products more.
    forward = heads * shape["T"] * (K + V)
    return forward, 2.5 * forward, heads * shape["T"] / 2
  if op in ("delta_rule", "gated_delta_rule", "kda"):
    inverse = C * C / 3
    forward = 6 * K * V + 4 * C * (K + V) + inverse
    backward = 16 * K * V + 2 * C * (6 * K + 5 * V) + inverse
  else:
    forward = 4 * K * V + 2 * C * (K + V)
    backward = 10 * K * V + 2 * C * (3 * K + 2 * V)
  if op in ("gla", "kda"):
    exponentials = 3 * K
  elif op in ("linear_attention", "delta_rule"):
    exponentials = 0
  else:
    exponentials = C / 2 + 2
  return heads * forward, heads * backward, heads * exponentials
