"""One of two processes with four devices each: python -m tests.experiments.process_worker ADDRESS
PROCESS DIRECTORY. What goes wrong ends it with a traceback.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments import processes, sharding, workspace
from experiments.checkpoints import Checkpoints
from experiments.checksums import checksums
from experiments.data.batches import JoinedRows
from experiments.errors import UserError

ROWS, T = 16, 24
MESHES = (
  {"data": 8},
  {"data": 2, "fsdp": 4},
  {"fsdp": 2, "tensor": 4},
  {"data": 2, "tensor": 2, "seq": 2},
  {"data": 4, "seq": 2},
  {"seq": 8},
)
# Devices of the two processes in turn: each has rows that do not lie together.
INTERLEAVED = {"data": 4, "fsdp": 2}


def mesh_of(sizes):
  return sharding.make_mesh({axis: sizes.get(axis, 1) for axis in sharding.AXES})


def interleaved():
  devices = np.array(jax.devices()).reshape(2, 4).T.reshape(4, 2, 1, 1)
  return jax.sharding.Mesh(devices, sharding.AXES)


class Numbered:
  """Batches whose every number is another one, and which note the rows that were asked for."""

  read: list[slice] = []  # noqa: RUF012

  def __init__(self, rows: slice):
    self.read.append(rows)
    self._rows = rows

  def __getitem__(self, n: int):
    whole = np.arange(ROWS * T, dtype=np.int32).reshape(ROWS, T) + n
    images = np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 2, 3) + n
    batch = {"tokens": whole, "first": whole[:, 0], "images": images}
    return {name: array[self._rows] for name, array in batch.items()}


def check_batches(mesh, share: float):
  """Each device holds its part of the batch; the process has read this share of the rows."""
  Numbered.read.clear()
  rows = sharding.rows_of_process(mesh, ROWS)
  placed = sharding.place_batch(mesh, JoinedRows(Numbered, rows)[3])
  assert sum(len(range(ROWS)[part]) for part in Numbered.read) == share * ROWS, mesh
  for name, whole in Numbered(slice(None))[3].items():
    assert placed[name].shape == whole.shape
    for shard in placed[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index], f"{name} {mesh}")


def state_on(mesh):
  """Arrays of which this process holds a part."""
  spread = sharding.batch_sharding(mesh, 2)
  numbers = np.random.default_rng(0).normal(size=(ROWS, 4096)).astype(np.float32)
  place = lambda x: jax.make_array_from_callback(x.shape, spread, x.__getitem__)
  return {"a": place(numbers), "b": place(numbers + 1)}, {"a": numbers, "b": numbers + 1}


def check_checkpoints(directory: pathlib.Path):
  """Written by both, read by both; damage that one of them meets is a fall-back for both."""
  mesh = mesh_of({"data": 8})
  state, numbers = state_on(mesh)
  assert checksums(state) == checksums(numbers)
  open_it = lambda: Checkpoints(directory, keep_last=5, keep_best=0, keep_every_hours=0)
  checkpoints = open_it()
  for step in (1, 2, 3):
    checkpoints.save(step, state, {"next_batch": step}, wait=True)
  checkpoints.close()
  if processes.is_first():
    part = directory / "3" / "state" / "ocdbt.process_1" / "d"
    largest = max(part.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
  processes.all_agree(True)
  checkpoints = open_it()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  restored = checkpoints.restore(abstract)
  assert (restored.step, restored.data_state) == (2, {"next_batch": 2})
  assert checksums(restored.state) == checksums(numbers)
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()


def check_words(process: int):
  """What processes agree on."""
  assert processes.several() and processes.is_first() == (process == 0)
  assert not processes.all_agree(process == 0) and processes.all_agree(True)
  assert processes.any_says(process == 1) and not processes.any_says(False)
  assert processes.that_of_first(1234567890.123456 if process == 0 else 2.0) == 1234567890.123456


def check_order(directory: pathlib.Path, process: int):
  """The first process is through before the other begins; again and again."""
  for n in range(3):
    made = directory / f"made-{n}"
    with processes.first_before_others():
      assert made.exists() == (process == 1)
      if process == 0:
        made.touch()


def check_signals(process: int):
  """A signal to the second process is in the metrics of the next step, everywhere."""
  mesh, received = mesh_of({"data": 2, "tensor": 4}), []
  step = jax.jit(lambda state, batch: (state + batch.sum(), {"loss": batch.sum()}))
  placed = sharding.place_batch(mesh, {"x": np.ones(1, np.float32)})["x"]
  step = processes.with_signals(step, mesh, received)
  state = jax.device_put(jnp.zeros(()), sharding.replicated(mesh))
  seen = []
  for n in range(4):
    if n == 2 and process == 1:
      received.append(15)
    state, measured = step(state, placed)
    seen.append(int(measured[processes.SIGNALLED]))
  assert seen == [0, 0, 1, 1] and float(state) == 8.0 and float(measured["loss"]) == 2.0


def check_workdirs(directory: pathlib.Path, process: int):
  """A directory for each process is no run's directory."""
  workspace._require_shared(directory)
  own = directory / f"own-{process}"
  own.mkdir()
  try:
    workspace._require_shared(own)
  except UserError as error:
    assert "is not the same directory for all processes" in str(error)
  else:
    raise AssertionError("directories apart were taken for shared")
  processes.all_agree(True)  # the first process has removed its mark
  assert not list(directory.glob("**/.shared*"))


def main(address: str, process: int, directory: pathlib.Path):
  flags = {"coordinator": address, "processes": "2", "process": str(process)}
  with processes.together(flags):
    check_words(process)
    check_order(directory, process)
    check_workdirs(directory, process)
    for sizes, share in zip(MESHES, (0.5, 0.5, 0.5, 0.5, 0.5, 1.0), strict=True):
      check_batches(mesh_of(sizes), share)
    check_batches(interleaved(), 0.5)
    check_signals(process)
    check_checkpoints(directory / "checkpoints")
  print("all is well", flush=True)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
