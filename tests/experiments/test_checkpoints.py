"""Checkpoints come back bit for bit; damage to the files is neither fatal nor unnoticed."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checkpoints
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
BPB = "validation/bits_per_byte"

# Reads that orbax abandons next to a damaged array; a program prints none of them, pytest sees all.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make(directory, *, keep_last=2, keep_best=0, keep_every_hours=0, **others):
  return Checkpoints(
    directory,
    keep_last=keep_last,
    keep_best=keep_best,
    keep_every_hours=keep_every_hours,
    **others,
  )


def mesh(*shape):
  return Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))


def train_state():
  """All that a train state is made of: sharded and not, several dtypes, a typed key, optax."""
  weights = jax.random.normal(jax.random.key(1), (16, 24))
  params = {
    "kernel": jax.device_put(weights, NamedSharding(mesh(2, 4), PartitionSpec("data", "fsdp"))),
    "bias": jax.device_put(
      jnp.array([1.5, -0.0, np.nan], jnp.bfloat16), NamedSharding(mesh(2, 4), PartitionSpec())
    ),
  }
  return {
    "params": params,
    "optimizer": optax.adamw(1e-3).init(params),
    "key": jax.random.key(7),
    "mask": jnp.array([True, False]),
    "count": np.int32(3),
  }


def abstract(state, sharding=lambda leaf: getattr(leaf, "sharding", None)):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state
  )


def bits(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def nothing_unfinished(directory):
  """Whether no temporary directory is left; a thread removes them, so it may take a moment."""
  for _ in range(100):
    if not list(directory.glob("*tmp*")):
      return True
    time.sleep(0.1)
  return False


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and bits(x) == bits(y)


@pytest.fixture
def saved(tmp_path):
  """A directory with the sound checkpoints 1 and 2, and their state."""
  state = train_state()
  saver = make(tmp_path / "c")
  for step in (1, 2):
    saver.save(step, state, {"position": step})
  saver.close()
  return tmp_path / "c", state


def test_restores_bit_for_bit_with_shardings_and_data_state(saved):
  directory, state = saved
  restored = make(directory).restore(abstract(state))
  assert restored.step == 2 and restored.data_state == {"position": 2}
  assert_same(restored.state, state)
  assert restored.state["params"]["kernel"].sharding == state["params"]["kernel"].sharding


def test_restores_an_older_step_and_onto_another_mesh(saved):
  directory, state = saved
  flat = NamedSharding(mesh(8, 1), PartitionSpec("data"))
  everywhere = NamedSharding(mesh(8, 1), PartitionSpec())
  wanted = abstract(state, lambda leaf: flat if leaf.shape == (16, 24) else everywhere)
  restored = make(directory).restore(wanted, step=1)
  assert restored.step == 1 and restored.data_state == {"position": 1}
  assert_same(restored.state, state)
  assert restored.state["params"]["kernel"].sharding == flat


TWO = """
import sys, jax, jax.numpy as jnp
index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jax.sharding import NamedSharding, PartitionSpec
from experiments.checkpoints import Checkpoints
sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
x = jax.jit(lambda: jnp.arange(8.0), out_shardings=sharding)()
saver = Checkpoints(directory, keep_last=2, keep_best=0, keep_every_hours=0)
saver.save(1, {"x": x}, {"said by": index}, wait=True)
wanted = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
print(saver.restore(wanted).data_state["said by"])
saver.close()
"""


def test_the_data_state_of_process_0_serves_any_number_of_processes(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [run(TWO, index, port, tmp_path) for index in range(2)]
  try:
    outcomes = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [out.splitlines()[-1:] for out, _ in outcomes] == [["0"]] * 2, outcomes
  restored = make(tmp_path).restore({"x": jax.ShapeDtypeStruct((8,), jnp.float32)})
  assert restored.data_state == {"said by": 0}
  np.testing.assert_array_equal(restored.state["x"], np.arange(8.0))


def test_a_checkpoint_with_a_data_state_per_process_is_read(tmp_path, monkeypatch):
  sealed = checkpoints._sealed
  states = {"data": [{"position": 3}, {"position": 4}]}
  monkeypatch.setattr(checkpoints, "_sealed", lambda record: sealed({**record, **states}))
  saver = make(tmp_path)
  saver.save(1, {"x": jnp.ones(3)}, {}, wait=True)
  monkeypatch.undo()
  restored = saver.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
  assert restored.data_state == {"position": 3}
  saver.close()


def test_there_may_be_nothing_to_restore(tmp_path, saved):
  directory, state = saved
  assert make(tmp_path / "empty").restore(abstract(state)) is None
  with pytest.raises(UserError, match=r"no checkpoint of step 3; there are 1, 2"):
    make(directory).restore(abstract(state), step=3)


def test_donated_buffers_are_copied_before_save_returns(tmp_path):
  scramble = jax.jit(lambda x: -x, donate_argnums=0)
  saver = make(tmp_path)
  state = {"x": jnp.arange(2.0**20)}
  saver.save(1, state, {})
  x = state["x"]
  for _ in range(3):
    x = scramble(x)
  x.block_until_ready()
  restored = saver.restore({"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
  np.testing.assert_array_equal(restored.state["x"], np.arange(2.0**20, dtype=np.float32))
  saver.close()


def test_keeps_the_last_and_the_best(tmp_path):
  saver = make(tmp_path, keep_last=2, keep_best=2)
  scores = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 2.5, 7: None, 8: 4.0}
  for step, score in scores.items():
    metrics = None if score is None else {BPB: score}
    saver.save(step, {"x": jnp.ones(3)}, {}, metrics, wait=True)
  assert saver.steps() == [2, 5, 7, 8] and saver.best() == 2
  saver.close()
  # Scores are remembered by the files, not by the program.
  saver = make(tmp_path, keep_last=1, keep_best=1)
  saver.save(9, {"x": jnp.ones(3)}, {}, {BPB: 1.0}, wait=True)
  assert saver.steps() == [9] and saver.best() == 9
  saver.close()


def test_keeps_one_checkpoint_an_hour_for_ever(tmp_path, monkeypatch):
  now = [1e9]
  monkeypatch.setattr(checkpoints.time, "time", lambda: now[0])
  for session in range(2):
    saver = make(tmp_path, keep_last=1, keep_every_hours=2)
    for step in range(1, 9):
      now[0] += 3600 / 2
      saver.save(8 * session + step, {"x": jnp.ones(3)}, {}, wait=True)
    saver.close()
  # Half an hour between steps: two hours are over at 4, 8, 12 and 16, whatever the session.
  assert saver.steps() == [4, 8, 12, 16]


def test_a_saved_step_is_left_as_it_is(saved):
  directory, state = saved
  before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
  saver = make(directory)
  saver.save(2, jax.tree.map(lambda x: x, state), {"position": 99}, wait=True)
  saver.close()
  assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def damaging_files(directory):
  """The files of checkpoint 2 without which it cannot be read, or that hold its numbers."""
  step = directory / "2"
  names = ["record/metadata", "state/_METADATA", "state/manifest.ocdbt"]
  names += ["state/array_metadatas/process_0"]
  # Below ocdbt.process_0 there may be larger ones, which nothing refers to.
  largest = max((step / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
  return [*(step / name for name in names), largest]


def flip(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
  "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "empty": lambda path: path.write_bytes(b""),
  "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
  "flipped bit": lambda path: path.write_bytes(flip(path.read_bytes())),
  "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", range(5))
def test_falls_back_from_damaged_files(saved, capsys, damage, which):
  directory, state = saved
  DAMAGE[damage](damaging_files(directory)[which])
  saver = make(directory)
  restored = saver.restore(abstract(state))
  assert_same(restored.state, state)
  lines = capsys.readouterr().err.splitlines()
  if restored.step == 2:
    # Some bits of orbax's own descriptions change nothing.
    assert (damage, which) == ("flipped bit", 3) and not lines
    return
  assert restored.step == 1 and restored.data_state == {"position": 1}
  assert len(lines) == 2 and lines[0].startswith(f"checkpoint 2 in {directory} is damaged: ")
  assert (directory / "2.corrupt").is_dir() and saver.steps() == [1]
  # The step is free again.
  saver.save(2, state, {"position": 22}, wait=True)
  assert saver.restore(abstract(state)).data_state == {"position": 22}
  saver.close()


def test_notices_one_wrong_bit_of_an_array(saved, capsys, monkeypatch):
  # Compression usually notices first; here the files are sound and the array is not.
  directory, state = saved
  restore = checkpoints.ocp.CheckpointManager.restore

  def scrambled(manager, step, args):
    result = restore(manager, step, args=args)
    if step == 2 and "state" in result:
      bias = result["state"]["params"]["bias"]
      word = jax.lax.bitcast_convert_type(bias, jnp.uint16).at[1].set(0)  # -0.0 becomes 0.0
      result["state"]["params"]["bias"] = jax.lax.bitcast_convert_type(word, jnp.bfloat16)
    return result

  monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", scrambled)
  assert make(directory).restore(abstract(state)).step == 1
  assert "the checksum of params/bias is wrong" in capsys.readouterr().err


def test_when_all_are_damaged_the_run_ends_and_nothing_moves(saved, capsys):
  directory, state = saved
  for step in ("1", "2"):
    (directory / step / "state" / "manifest.ocdbt").write_bytes(b"")
  for _ in range(2):
    with pytest.raises(UserError, match=f"no checkpoint in {directory} can be read") as caught:
      make(directory).restore(abstract(state))
    assert "\n" not in str(caught.value)
    assert len(capsys.readouterr().err.splitlines()) == 2
  assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_reading_a_run_moves_nothing(saved):
  directory, state = saved
  (directory / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
  (directory / "3.orbax-checkpoint-tmp").mkdir()
  assert make(directory, read_only=True).restore(abstract(state)).step == 1
  names = sorted(path.name for path in directory.iterdir())
  assert names == ["1", "2", "3.orbax-checkpoint-tmp"]


def test_another_model_is_no_damage(saved):
  directory, state = saved
  saver = make(directory)
  other = abstract(state)
  other["params"]["kernel"] = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  with pytest.raises(UserError) as caught:
    saver.restore(other)
  assert "params/kernel is float32[16, 24] there, float32[16, 32] here" in str(caught.value)
  other = abstract(state)
  other["params"]["kernel"] = jax.ShapeDtypeStruct((16, 24), jnp.bfloat16)
  with pytest.raises(UserError, match=r"float32\[16, 24\] there, bfloat16\[16, 24\] here"):
    saver.restore(other)
  other = abstract(state)
  other["params"]["gate"] = other["params"].pop("bias")
  with pytest.raises(UserError, match=r"params/gate is absent there, bfloat16\[3\] here"):
    saver.restore(other)
  other = abstract(state)
  del other["mask"]
  with pytest.raises(UserError, match=r"mask is bool\[2\] there, absent here"):
    saver.restore(other)
  assert saver.steps() == [1, 2] and saver.restore(abstract(state)).step == 2


def test_interrupted_saves_are_cleared_away(saved):
  directory, state = saved
  (directory / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  saver = make(directory)
  assert saver.steps() == [1, 2]
  saver.save(3, state, {}, wait=True)
  assert saver.steps() == [2, 3] and nothing_unfinished(directory)


def test_arguments_are_checked(tmp_path):
  with pytest.raises(ValueError, match=r"checkpoint\.keep_last is 0; it must be at least 1"):
    make(tmp_path, keep_last=0)
  with pytest.raises(ValueError, match=r"checkpoint\.keep_every_hours is -1"):
    make(tmp_path, keep_every_hours=-1)


def run(program, *arguments, **options):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
    **options,
  )


DAMAGED = """
import sys, jax, jax.numpy as jnp
from experiments.checkpoints import Checkpoints
for directory in sys.argv[1:]:
  saver = Checkpoints(directory, keep_last=2, keep_best=0, keep_every_hours=0)
  wanted = {str(i): jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(20)}
  assert saver.restore(wanted).step == 1
"""


def test_a_damaged_checkpoint_is_two_lines_on_the_terminal(tmp_path):
  saver = make(tmp_path / "0")
  for step in (1, 2):
    saver.save(step, {str(i): jnp.ones((64, 64)) for i in range(20)}, {}, wait=True)
  saver.close()
  (tmp_path / "0" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
  directories = [tmp_path / str(number) for number in range(5)]
  for directory in directories[1:]:
    shutil.copytree(directories[0], directory)
  _, err = run(DAMAGED, *directories).communicate(timeout=120)
  assert len(err.splitlines()) == 2 * len(directories), err


SAVING = """
import sys, jax, jax.numpy as jnp
from experiments.checkpoints import Checkpoints
saver = Checkpoints(sys.argv[1], keep_last=2, keep_best=0, keep_every_hours=0)
step = jax.jit(lambda x: x + 1, donate_argnums=0)
x = jax.random.normal(jax.random.key(0), (1024, 1024))
for i in range(1, 100):
  x = step(x)
  saver.save(i, {"x": x}, {"position": i})
  print(i, flush=True)
"""


def test_kill_during_an_asynchronous_save(tmp_path):
  process = run(SAVING, tmp_path)
  while process.stdout.readline().strip() != "3":
    assert process.poll() is None, process.stderr.read()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  restored = make(tmp_path).restore({"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
  assert restored.step in (2, 3) and restored.data_state == {"position": restored.step}
  x = jax.random.normal(jax.random.key(0), (1024, 1024))
  for _ in range(restored.step):
    x = x + 1
  assert bits(restored.state["x"]) == bits(x)
  assert nothing_unfinished(tmp_path)


GROWING = """
import sys, jax, jax.numpy as jnp
from experiments.checkpoints import Checkpoints
from experiments.metrics import resident_gib
saver = Checkpoints(sys.argv[1], keep_last=2, keep_best=1, keep_every_hours=0)
state = {str(i): jax.random.normal(jax.random.key(i), (512, 2048)) for i in range(10)}
for i in range(25):
  saver.save(i, state, {"position": i}, {"validation/bits_per_byte": 1.0}, wait=True)
  print(resident_gib(), flush=True)
"""


def test_twenty_saves_do_not_grow(tmp_path):
  out, err = run(GROWING, tmp_path).communicate(timeout=120)
  sizes = [float(line) for line in out.split()]
  assert len(sizes) == 25, err
  # A twentieth of the 40 MiB of the state for each save: allocators keep half of it, in some runs.
  assert min(sizes[-5:]) - sizes[4] < 0.05 * 20 * 40 / 1024, sizes


FULL = """
import os, sys, jax, jax.numpy as jnp
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
saver = Checkpoints(sys.argv[1], keep_last=1, keep_best=0, keep_every_hours=0)
saver.save(1, {"x": jax.random.normal(jax.random.key(0), (512, 512))}, {}, wait=True)
try:
  saver.save(2, {"x": jax.random.normal(jax.random.key(0), (4096, 1024))}, {})
  saver.close()
except UserError as error:
  print(error.status, error, sep="\\n")
saver = Checkpoints(sys.argv[1], keep_last=1, keep_best=0, keep_every_hours=0)
found = saver.restore({"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)})
print(found.step, os.listdir(sys.argv[1]))
"""


def test_full_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip("needs the right to mount a small tmpfs")
  try:
    out, err = run(FULL, disk).communicate(timeout=120)
  finally:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
  status, message, found = out.splitlines()
  assert status == "1" and found == "1 ['1']" and not err
  assert message.startswith(f"checkpoint 2 needs 16.0 MiB in {disk}, which has ")
  assert message.endswith(" MiB left: no space left on device; older checkpoints are intact")


def test_failing_writes_end_the_run_in_one_line(saved, monkeypatch):
  # As on a full disk, for those who may not mount one.
  directory, state = saved
  saver = make(directory, keep_last=1)

  def fail(*_, **__):
    raise OSError(28, "No space left on device", "somewhere")

  monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
  with pytest.raises(UserError) as caught:
    saver.save(3, state, {})
  assert caught.value.status == 1 and str(caught.value) == (
    f"checkpoint 3 cannot be written to {directory}: no space left on device; "
    "older checkpoints are intact"
  )
  assert saver.steps() == [1, 2]
