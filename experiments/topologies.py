"""Devices that need not be here: TPUs by the name of their topology, and CPUs in any number.

  v5e:16x16      a slice of 256 chips
  2xv5p:4x4x4    two slices of 64 chips each, joined by the network of the data centre
  cpu:8          eight fake devices; needs nothing but JAX

TPUs are compiled for by libtpu, which needs no TPU.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

from experiments.chips import CHIPS
from experiments.errors import UserError

# The shapes of slices that Cloud TPU offers. Cubes: of 4 by 4 by 4 chips, joined in any number.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
CUBES = ((4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16))
LARGEST = (16, 16, 24)

# libtpu asks the machine for these; the answers serve on one without a TPU. Several programs may
# compile at once, since none of them holds a TPU. No files of logs.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Which devices: `slices` times `kind`, of chips in a torus of `shape`."""

  kind: str  # of CHIPS, or cpu
  shape: tuple[int, ...]
  slices: int = 1

  def __str__(self):
    times = f"{self.slices}x" if self.slices > 1 else ""
    return f"{times}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
  """Reads the name of a topology.

  Raises:
    UserError: in one line, with the name most like it that there is.
  """
  cpu = re.fullmatch(r"cpu:(\d+)", text)
  if cpu and 1 <= int(cpu[1]) <= 4096:
    return Topology("cpu", (int(cpu[1]),))
  match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)+)", text)
  if match:
    shape = tuple(map(int, match[3].split("x")))
    found = Topology(match[2], shape, int(match[1] or 1))
    if found.kind in CHIPS and found.slices >= 1 and _is_shape(found.kind, shape):
      return found
  said = f"--topology is {text!r}" if text else "--mode=aot needs a --topology"
  raise UserError(f"{said}; {_hint(text)}")


def prepare(topology: Topology) -> None:
  """Sets what JAX and libtpu read from the environment: to be called before JAX is imported."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # which keeps no account of memory
  if topology.kind == "cpu":
    count = "--xla_force_host_platform_device_count"
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if count not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{count}={topology.shape[0]}"])
  else:
    for name, value in ENVIRONMENT.items():
      os.environ.setdefault(name, value)


def devices_of(topology: Topology) -> list:
  """The devices, to make a mesh of and compile for; those of a TPU can do nothing else.

  Raises:
    UserError: libtpu is not installed or cannot be used.
  """
  import jax
  from jax.experimental import topologies

  if topology.kind == "cpu":
    devices = jax.devices("cpu")
    if len(devices) < topology.shape[0]:
      raise UserError(f"--topology is {topology}, but JAX has started with {len(devices)} devices")
    return devices[: topology.shape[0]]
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={topology} needs libtpu, which is not installed: pip install 'recurrax[aot]'"
    )
  options = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.kind in ("v4", "v5p"):
    options["chip_config_name"] = "megacore"  # one JAX device for the two cores of a chip
  if math.prod(topology.shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  name = str(dataclasses.replace(topology, slices=1))
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"libtpu cannot be used for {topology}: {_one_line(error)}") from None
  return list(described.devices)


def _is_shape(kind: str, shape: tuple[int, ...]) -> bool:
  if CHIPS[kind].axes == 2:
    return shape in FLAT
  cubes = len(shape) == 3 and all(n % 4 == 0 and 4 <= n <= most for n, most in zip(shape, LARGEST))
  return shape in SMALL or (cubes and tuple(sorted(shape)) == shape)


def _names() -> list[str]:
  shapes = {2: FLAT, 3: (*SMALL, *CUBES, LARGEST)}
  return [
    *(str(Topology(kind, shape)) for kind, chip in CHIPS.items() for shape in shapes[chip.axes]),
    "cpu:8",
  ]


def _hint(text: str) -> str:
  """What was probably meant: of this many chips, or the name spelt most alike."""
  kind = next((kind for kind in CHIPS if kind in text), None)
  if not re.match(r"(\d+x)?([a-z]\w*)", text) or (kind is None and "cpu" not in text):
    kinds = ", ".join([*CHIPS, "cpu"])
    return f"it takes one of {kinds}, such as v5e:16x16, v5p:4x4x4, 2xv5e:16x16 or cpu:8"
  names = [name for name in _names() if kind is None or name.startswith(kind + ":")]
  named = re.fullmatch(r"\w+-(\d+)", text)
  if named and kind:
    # Cloud TPU counts cores in the names of v4 and v5p, and chips in those of others.
    chips = int(named[1]) // (2 if kind in ("v4", "v5p") else 1)
    names = [
      n for n in names if math.prod(map(int, n.partition(":")[2].split("x"))) == chips
    ] or names
  slices = re.match(r"\d+x(?=[a-z])|", text)[0]
  nearest = slices + difflib.get_close_matches(text[len(slices) :], names, n=1, cutoff=0)[0]
  return f"there is no such slice; did you mean {nearest}?"


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
