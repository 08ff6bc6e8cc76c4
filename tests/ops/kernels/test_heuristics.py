"""The table of the kernels' cuts: whose entry it is, and what it says."""

from ops.kernels.gpu import heuristics, scalar_decay
from tests.ops.kernels.hopper import needs_mosaic, on_hopper


def test_each_kind_has_its_own_entry():
  multiprocessors = lambda kind: heuristics.of_kind(kind).multiprocessors
  assert multiprocessors("NVIDIA H100 80GB HBM3") == multiprocessors("NVIDIA GH200 480GB") == 132
  assert multiprocessors("NVIDIA H100 PCIe") == 114
  assert multiprocessors("NVIDIA H20") == 78 and multiprocessors("NVIDIA H200") == 132
  assert heuristics.of_kind("NVIDIA A100-SXM4-80GB") is None
  assert heuristics.here() == heuristics.KINDS["H100"]


@needs_mosaic
def test_cuts_follow_the_device():
  def tilings(kind):
    with on_hopper(kind):
      return [scalar_decay.choose_tiling(heads, 256, 128).segments for heads in (32, 16, 200)]

  assert tilings("NVIDIA H100 80GB HBM3") == [4, 8, 1]
  assert tilings("NVIDIA H20") == [2, 4, 1]
