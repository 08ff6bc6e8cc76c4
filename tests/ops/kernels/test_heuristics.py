"""The table of the kernels' cuts: whose entry it is, and what it says."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from ops import dispatch
from ops.kernels.gpu import heuristics, scalar_decay

needs_mosaic = pytest.mark.skipif(
  tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="the kernels need jax 0.11"
)


def test_each_kind_has_its_own_entry():
  multiprocessors = lambda kind: heuristics.of_kind(kind).multiprocessors
  assert multiprocessors("NVIDIA H100 80GB HBM3") == multiprocessors("NVIDIA GH200 480GB") == 132
  assert multiprocessors("NVIDIA H100 PCIe") == 114
  assert multiprocessors("NVIDIA H20") == 78 and multiprocessors("NVIDIA H200") == 132
  assert heuristics.of_kind("NVIDIA A100-SXM4-80GB") is None
  assert heuristics.here() == heuristics.KINDS["H100"]


@needs_mosaic
def test_cuts_follow_the_device():
  from jax.sharding import AbstractDevice

  def tilings(kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), dispatch.for_platform("gpu"):
      return [scalar_decay.choose_tiling(heads, 256, 128).segments for heads in (32, 16, 200)]

  assert tilings("NVIDIA H100 80GB HBM3") == [4, 8, 1]
  assert tilings("NVIDIA H20") == [2, 4, 1]
