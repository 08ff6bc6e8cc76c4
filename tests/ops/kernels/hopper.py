"""A Hopper GPU that is not there, for which kernels are lowered."""

import contextlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from ops import dispatch

H100 = "NVIDIA H100 80GB HBM3"
# Mosaic GPU has what the kernels use from then on; .ci/run tests under such a jax too, and under
# older ones `supports` gives this as its reason.
needs_mosaic = pytest.mark.skipif(
  tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="the kernels need jax 0.11"
)


@contextlib.contextmanager
def on_hopper(kind: str = H100, **axes: int):
  """Within it, ops are traced for a mesh of such GPUs, of one unless its axes are given."""
  from jax.sharding import AbstractDevice

  axes = axes or {"x": 1}
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  kinds = (AxisType.Auto,) * len(axes)
  mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh), dispatch.for_platform("gpu"):
    yield


def lowered(function, *arguments, **axes: int) -> str:
  """What `function`, jitted here unless it is already, becomes on such GPUs."""
  with on_hopper(**axes):
    function = function if hasattr(function, "trace") else jax.jit(function)
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
