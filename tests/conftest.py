"""Eight CPU devices and checked shapes, before anything imports JAX or the packages tested."""

import os
import pathlib
import shutil

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  flags = os.environ.get("XLA_FLAGS", "")
  if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["ops", "lm_models"], "beartype.beartype")


# Of the 65,530 mappings of memory that Linux allows a process. Each program that XLA compiles for a
# CPU takes tens; a compilation that gets none ends the process with a segmentation fault.
MAPPINGS = 25_000


@pytest.fixture(autouse=True)
def few_mappings():
  """Drops what JAX has compiled before a test process runs out of mappings."""
  yield
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and mappings.read_bytes().count(b"\n") > MAPPINGS:
    jax.clear_caches()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
  """A directory for what the processes of a session share."""
  return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="session")
def program(scratch):
  """run.py as a user starts it."""
  from tests.processes import Program

  return Program(scratch)


@pytest.fixture(scope="session")
def references(scratch, program):
  """Directories of runs of 200 steps that nothing interrupted, by data.mode."""
  from tests.processes import LONG

  made = {}

  def get(mode):
    if mode not in made:
      made[mode] = scratch / f"reference-{mode}"
      program.train(made[mode], data__mode=mode, **LONG)
    return made[mode]

  return get


@pytest.fixture
def packed(references, tmp_path):
  """A copy of the packed run, to do anything to."""
  return pathlib.Path(shutil.copytree(references("packed"), tmp_path / "packed"))
