"""The tool that makes the table of the kernels' cuts."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments import tune_kernels
from ops import dispatch
from ops.kernels.gpu import heuristics

needs_mosaic = pytest.mark.skipif(
  tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="the kernels need jax 0.11"
)


def test_the_fewest_chunks_that_pay():
  pays = {"scalar_wide": (32, 64), "scalar_narrow": (8, 32, 64), "scalar_backward": ()}

  def measure(field, pieces, chunks, cut):
    assert pieces == (2 if field == "scalar_narrow" else 4)
    return 1.0 if cut == (chunks in pays.get(field, (8, 16, 32, 64))) else 2.0

  said = []
  found = tune_kernels.tune(measure, 132, said.append)
  assert found == {"scalar_wide": 32, "scalar_narrow": 32, "scalar_backward": 128, "vector": 8}
  assert said[0] == "scalar_wide: 4 segments of 8 chunks 2.0000 ms, uncut 1.0000 ms"
  assert set(found) == set(heuristics.Heuristics._fields) - {"multiprocessors"}


def test_without_a_gpu_it_says_so(capsys):
  assert tune_kernels.main() == 2
  assert capsys.readouterr().err.startswith("error: cpu is none of H100 PCIe, H100")


@needs_mosaic
@pytest.mark.parametrize("field", tune_kernels.PROGRAMS)
def test_what_it_times_lowers(field, monkeypatch):
  from jax.sharding import AbstractDevice

  monkeypatch.setattr(tune_kernels, "H", 1)
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  for cut in (True, False):
    run, arguments = tune_kernels.kernel(field, 2, 8, cut)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.sharding.use_abstract_mesh(mesh), dispatch.for_platform("gpu"):
      text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
