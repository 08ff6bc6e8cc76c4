"""What a training step takes of a device's memory, its time on one device and split over several.

The step is that of `--mode=train`, compiled from shapes alone as `--mode=aot` does it, for fake
devices: nothing is run. The models are small, so that activations are what takes memory.
"""

from collections.abc import Mapping
from typing import Any

import jax

from configs import defaults
from experiments import aot, sharding
from experiments.benchmark_report import environment
from experiments.topologies import Topology

MODELS = ("mamba", "mamba2", "gla", "gated_deltanet", "plstm", "paragru")
D, L = 64, 2
HEAD = f"{'model':<16}{'T':>8}{'P':>4}{'unsplit MiB':>14}{'split MiB':>12}{'ratio':>9}"


def make_config(model: str, T: int, P: int):
  """The `tiny` experiment with one row of T tokens over P devices."""
  config = defaults.get_config("tiny")
  config.data.T = T
  config.model.pattern, config.model.D, config.model.L = (model,), D, L
  config.model.remat = "full"
  config.train.batch_size = 1
  config.mesh.data, config.mesh.seq = 1, P
  return config


def measure(model: str, T: int, P: int) -> dict[str, Any]:
  """Compiles the step of a model twice.

  Args:
    model: of MODELS.
    T: tokens of the row, a multiple of P.
    P: devices that share time.

  Returns:
    A row: bytes of a device, by part, unsplit and split, the ratio of their sums, and the largest
    arrays of the split step, each with its bytes. Arguments and results are one: they are donated.
  """
  parts, arrays = {}, []
  for count in (1, P):
    config = make_config(model, T, count)
    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu")[:count])
    memory = aot.compile_step(config, mesh, Topology("cpu", (count,))).memory
    parts[count], arrays = memory.parts, memory.largest
  unsplit, split = (sum(parts[count].values()) for count in (1, P))
  return {
    "model": model,
    "T": T,
    "P": P,
    "D": D,
    "L": L,
    "unsplit_bytes": unsplit,
    "split_bytes": split,
    "ratio": split / unsplit,
    "unsplit_parts_bytes": parts[1],
    "split_parts_bytes": parts[P],
    "largest_split_arrays": [
      {"bytes": array.bytes, "array": f"{array.shape} {array.name} ({array.part})"}
      for array in arrays
    ],
    **environment(),
  }


def line(row: Mapping[str, Any]) -> str:
  """The row as a person reads it, under HEAD."""
  unsplit, split = (row[name] / 2**20 for name in ("unsplit_bytes", "split_bytes"))
  return (
    f"{row['model']:<16}{row['T']:>8}{row['P']:>4}{unsplit:>14,.1f}{split:>12,.1f}"
    f"{'1/' + format(1 / row['ratio'], '.2f'):>9}"
  )
