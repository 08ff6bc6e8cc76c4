"""How the kernels cut their work on each kind of GPU: one table, by times, and nothing is timed
when they run.

A sequence is cut in segments where there are fewer heads than multiprocessors; finding the states
between segments costs a pass over keys and values, so that short segments cost more than they gain.
`python -m experiments.tune_kernels` times the cuts on the GPU at hand and prints its entry.
"""

import re
from typing import NamedTuple

import jax

from ops import dispatch


class Heuristics(NamedTuple):
  """An entry; chunks are of 64 tokens."""

  multiprocessors: int = 132
  scalar_wide: int = 32  # fewest chunks of a segment of the scalar decay, in blocks of 128 columns
  scalar_narrow: int = 8  # in blocks of 64
  scalar_backward: int = 8  # of its gradients
  vector: int = 16  # of the vector decay, both ways

  def segments(self, programs: int, chunks: int, fewest: int) -> int:
    """Into how many pieces of at least `fewest` chunks to cut sequences of so many programs."""
    return max(1, min(self.multiprocessors // programs, chunks // fewest))


# By words of jax's device_kind, the first that fits. Times are an H100's (132 multiprocessors, jax
# 0.11.2, 2026-11-22); the others differ from it by their multiprocessors.
KINDS = {
  "H100 PCIe": Heuristics(multiprocessors=114),
  "H100": Heuristics(),
  "H200": Heuristics(),
  "H800": Heuristics(),
  "GH200": Heuristics(),
  "H20": Heuristics(multiprocessors=78),
}


def device_kind() -> str:
  """Of the GPU that is compiled for: that of the mesh in force, else the first of jax."""
  return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def of_kind(kind: str) -> Heuristics | None:
  """The entry of a device kind; None where there is none, and so no kernel."""
  return next((KINDS[name] for name in KINDS if re.search(rf"\b{name}\b", kind)), None)


def no_hopper() -> dispatch.Reason:
  """Why no kernel can run on this device under this jax; None if one can."""
  if dispatch.platform() != "gpu":
    return f"it is for Hopper GPUs, this is a {dispatch.platform()}"
  if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
    return f"it needs jax 0.11, this is {jax.__version__}"
  if jax.config.jax_enable_x64:
    return "it has numbers of 32 bits at most, jax_enable_x64 is on"
  kind = device_kind()
  return None if of_kind(kind) else f"it is for Hopper GPUs, this is {kind}"


def here() -> Heuristics:
  """The entry of the GPU that is compiled for; an H100's where kernels are interpreted."""
  found = of_kind(device_kind()) if dispatch.platform() == "gpu" else None
  return found or KINDS["H100"]
