"""Reports of compiled steps: for CPUs, from texts as TPUs' compilers write them, and for a TPU."""

import contextlib
import importlib.util
import io
import json
import math
import os

import jax
import jax.numpy as jnp
import pytest

from experiments import aot, aot_memory, aot_report, configuration, hlo, topologies, traffic
from experiments.errors import UserError
from experiments.tasks import make_task
from experiments.topologies import Topology
from experiments.train_step import make_state
from tests.experiments.small import B, make_config

GIB = 2**30


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("v5e:16x16", Topology("v5e", (16, 16))),
    ("2xv5p:4x4x8", Topology("v5p", (4, 4, 8), 2)),
    ("v6e:1x1", Topology("v6e", (1, 1))),
    ("v4:4x4x12", Topology("v4", (4, 4, 12))),
    ("cpu:8", Topology("cpu", (8,))),
  ],
)
def test_topologies_by_name(text, expected):
  assert topologies.parse(text) == expected
  assert str(expected) == text


@pytest.mark.parametrize(
  ("text", "nearest"),
  [
    ("v5e-256", "v5e:16x16"),  # as Cloud TPU calls it, by chips
    ("v5p-128", "v5p:4x4x4"),  # by cores, two to a chip
    ("2xv5e:16x1", "2xv5e:16x16"),
    ("v6e:4x4x4", "v6e:4x4"),
    ("cpu:0", "cpu:8"),
    ("h100:8", "v4, v5e, v5p, v6e, tpu7x, cpu"),
    ("", "--mode=aot needs a --topology"),
  ],
)
def test_what_is_no_topology_is_told_with_the_nearest(text, nearest):
  with pytest.raises(UserError) as error:
    topologies.parse(text)
  assert nearest in str(error.value) and "\n" not in str(error.value)


def test_the_environment_is_set_for_jax_to_start_in(monkeypatch):
  given = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=3", "TPU_WORKER_ID": "7"}
  monkeypatch.setattr(os, "environ", dict(given))
  topologies.prepare(Topology("cpu", (5,)))
  assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=5"
  topologies.prepare(Topology("v5e", (4, 4)))
  assert os.environ["JAX_PLATFORMS"] == "cpu"
  assert os.environ["TPU_WORKER_ID"] == "7" and "TPU_SKIP_MDS_QUERY" in os.environ


def config_for(**fields):
  return make_config(**{"mesh__data": -1, **fields})


@pytest.fixture(scope="module")
def cpu_report(tmp_path_factory):
  """The config, what was printed and what was written, for four fake devices."""
  config = config_for(mesh__fsdp=2, data__mode="streaming", train__ema_decay=0.9)
  directory, printed = tmp_path_factory.mktemp("aot"), io.StringIO()
  with contextlib.redirect_stdout(printed):
    aot.report(config, str(directory), topology="cpu:4")
  return config, printed.getvalue(), json.loads((directory / "aot.json").read_text())


def test_parts_are_the_shards_of_what_a_step_takes(cpu_report):
  config, _, found = cpu_report
  shapes = jax.eval_shape(lambda: make_state(config, jax.random.key(0)))
  size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  parts = found["parts_bytes_per_device"]
  whole = size(shapes.params)
  assert whole / 2 <= parts["parameters"] < whole  # fsdp is 2; not all of them are split
  assert parts["averaged parameters"] == parts["parameters"]
  assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], abs=64)
  assert parts["carried state"] == size(shapes.carry) / 4
  assert parts["batch"] == 3 * 4 * B * config.data.T / 4 + B / 4
  assert found["needed_bytes_per_device"] == sum(parts.values())
  sizes = [array["bytes"] for array in found["largest_arrays"]]
  assert sizes == sorted(sizes, reverse=True)
  names = {array["name"]: array["shape"] for array in found["largest_arrays"]}
  assert names["params/blocks/0_mamba/mixer/in_proj/kernel"] == "f32[1,8,2,32]"


def test_operations_are_those_of_the_model_and_gradients_are_summed(cpu_report):
  config, printed, found = cpu_report
  task = make_task(config)
  targets = B * config.data.T
  assert found["flops_per_step"] == 3 * task.flops_per_target() * targets
  assert found["targets_per_step"] == targets and found["parameters"] == task.parameter_count()
  assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "seq": 1} and found["fits"]
  kinds = {row["kind"]: row for row in found["collectives"]}
  # The gradients of what both axes share, at least, are summed over devices.
  assert kinds["all-reduce"]["bytes_per_device"] > found["parts_bytes_per_device"]["parameters"] / 2
  for said in ("cpu:4: 4 devices", "fits", "optimizer state", "all-reduce", "aot.json"):
    assert said in printed
  assert "estimate" not in found


@pytest.mark.parametrize(
  ("fields", "topology", "said"),
  [
    ({"mesh__data": 2, "mesh__fsdp": 1}, "cpu:4", "fills 2 of the 4 devices of cpu:4: set one"),
    ({"mesh__fsdp": 3}, "cpu:4", "which 4 devices cannot fill"),
    ({"train__batch_size": 6}, "cpu:4", "set --config.train.batch_size=4"),
    ({"train__batch_size": 2, "train__accumulate": 2}, "cpu:4", "--config.train.batch_size=8"),
    ({"mesh__fsdp": 4, "model__D": 18}, "cpu:4", "mesh.fsdp is 4, which does not divide the 18"),
    ({}, "cpu:9", "JAX has started with 8 devices"),
    ({"largest_batch": "true"}, "cpu:4", "--largest_batch needs a TPU"),
  ],
)
def test_what_cannot_be_compiled_is_told_in_a_line(fields, topology, said, tmp_path):
  fields = dict(fields)
  largest = fields.pop("largest_batch", "")
  with pytest.raises(UserError) as error:
    aot.report(config_for(**fields), str(tmp_path), topology=topology, largest_batch=largest)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'recurrax\[aot\]'"):
    topologies.devices_of(Topology("v5e", (2, 2)))


@pytest.mark.parametrize("start", [1, 3, 64, 500])
@pytest.mark.parametrize(("fixed", "row"), [(9.0, 0.1), (15.0, 0.002), (1.0, 15.0)])
def test_the_largest_batch_is_found_in_few_guesses(start, fixed, row):
  needed = lambda n: fixed + row * n
  largest = int((15.75 - fixed) / row)
  known = {}
  guess = start
  while guess is not None:
    known[guess] = (needed(guess) <= 15.75, needed(guess))
    guess = aot.next_guess(known, 15.75)
  assert max((n for n, (fits, _) in known.items() if fits), default=0) == largest
  assert len(known) <= aot.COMPILATIONS


def test_the_search_goes_on_where_less_is_said_to_be_needed_than_is():
  """XLA recomputes as much as it can before it gives up, and then misses by little."""
  true = lambda n: 1.0 + 0.01 * n
  said = lambda n: true(n) if true(n) <= 15.75 else min(true(n), 15.76)
  known, guess = {}, 8
  while guess is not None and len(known) < aot.COMPILATIONS:
    known[guess] = (true(guess) <= 15.75, said(guess))
    guess = aot.next_guess(known, 15.75)
  assert max(n for n, (fits, _) in known.items() if fits) == 1475


def test_messages_of_memory_that_ran_out():
  short = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (33.50G) exceeds available HBM (15.75G)."
  )
  long = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile. Ran out of memory in memory space hbm. Used 512.00M of"
  )
  assert aot.needed_bytes(short) == 33.5 * GIB
  assert aot.needed_bytes(long) == 512 * 2**20
  assert aot.needed_bytes("RESOURCE_EXHAUSTED: out of memory") == math.inf
  assert aot.needed_bytes("INTERNAL: Mosaic failed") is None


PROGRAM = """HloModule jit__step, num_partitions=2

ENTRY %main (p.0: f32[8,8], p.1: f32[8,8], p.2: s32[2]) -> f32[8,8] {
  %p.0 = f32[8,8]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\\'head\\']"}
  %p.1 = f32[8,8]{1,0:T(8,128)} parameter(1), metadata={op_name="state.optimizer[1].mu[\\'head\\']"}
  %p.2 = s32[2]{0} parameter(2), metadata={op_name="batch[\\'inputs\\']"}
  ROOT %sum.1 = f32[1024,512]{1,0} add(%p.0, %p.1), metadata={op_name="jit(_step)/jvp(A)/b/add"}
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[8,8]| at ShapeIndex {}, maybe-live-out:
 value: <1 p.0 @0> (size=4096,offset=0): f32[8,8]{1,0:T(8,128)}
allocation 1: size 4096, parameter 1, shape |f32[8,8]| at ShapeIndex {}:
 value: <2 p.1 @0> (size=4096,offset=0): f32[8,8]{1,0:T(8,128)}
allocation 2: size 512, parameter 2, shape |s32[2]| at ShapeIndex {}:
 value: <3 p.2 @0> (size=512,offset=0): s32[2]{0}
allocation 3: size 6291456, preallocated-temp:
 value: <4 sum.1{0} @0> (size=4194304,offset=0): f32[1024,1024]{1,0:T(8,128)}
 value: <5 sum.1{1} @0> (size=2097152,offset=2097152): f32[1024,512]{1,0}
 value: <6 sum.1{2} @0> (size=1048576,offset=4194304): f32[512,512]{1,0}
allocation 4: size 9999999, color 1, preallocated-temp:
"""


def test_buffers_that_xla_has_assigned(tmp_path):
  (tmp_path / "m.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
  memory = aot_memory.of_dump(tmp_path, hlo.parse(PROGRAM))
  assert memory.parts == {
    "parameters": 4096,
    "optimizer state": 4096,
    "batch": 512,
    "temporaries": 6291456,
  }
  # The second shares memory with the first.
  assert [(b.name, b.shape, b.bytes) for b in memory.largest] == [
    ("A/b/add", "f32[1024,1024]", 4194304),
    ("A/b/add", "f32[512,512]", 1048576),
    ("params/head", "f32[8,8]", 4096),
    ("optimizer/1/mu/head", "f32[8,8]", 4096),
    ("batch/inputs", "s32[2]", 512),
  ]


def test_names_of_operations():
  name = "jit(_step)/transpose(jvp(M.nats))/while/body/closed_call/checkpoint/vmap()/jit(_take)/exp"
  assert aot_memory.readable(name) == "M.nats/exp, backward"
  assert aot_memory.readable("jit(_step)/jvp(M.nats)/blocks/dot_general") == (
    "M.nats/blocks/dot_general"
  )
  assert aot_memory.readable("state.optimizer[1].mu['a']['b']") == "optimizer/1/mu/a/b"


def test_the_array_at_fault():
  gradient = {"part": "temporaries", "name": "add", "shape": "f32[9]", "bytes": 5 * GIB}
  parameter = {"part": "parameters", "name": "params/w", "shape": "f32[9]", "bytes": 4 * GIB}
  logits = {"part": "temporaries", "name": "exp", "shape": "f32[8,9]", "bytes": 6 * GIB}
  found = {"topology": "v5e:2x2", "available_bytes_per_device": 16 * GIB}

  def said(needed, parts, *arrays):
    facts = {**found, "needed_bytes_per_device": needed * GIB, "largest_arrays": arrays}
    facts["parts_bytes_per_device"] = {name: size * GIB for name, size in parts.items()}
    return aot_report.at_fault(facts)

  message = said(20, {"parameters": 12, "temporaries": 8}, logits, gradient, parameter)
  assert "f32[8,9] exp (temporaries), 6.00 GiB; lower --config.train.batch_size" in message
  message = said(20, {"parameters": 12, "temporaries": 8}, gradient, parameter)
  assert "20.00 GiB on each device of v5e:2x2, which has 16.00 GiB" in message
  assert "f32[9] add (temporaries), 5.00 GiB; spread parameters" in message
  message = said(30, {"parameters": 22, "temporaries": 8}, logits, gradient, parameter)
  assert "f32[9] params/w (parameters), 4.00 GiB; spread parameters" in message


def test_the_estimate_adds_up():
  chip = topologies.CHIPS["v5e"]
  found = {
    "flops_per_step": 8 * 197e12,  # a second on each of eight
    "hbm_traffic_bytes_per_device": 819e9 / 2,
    "collectives": [
      {"kind": "all-reduce", "link": "ici", "bytes_per_device": 20e9},  # 0.1 s over four links
      {"kind": "collective-permute", "link": "ici", "bytes_per_device": 5e9},  # 0.1 s over one
      {"kind": "all-reduce", "link": "dcn", "bytes_per_device": 3.125e9 * 2},
    ],
  }
  estimate = aot_report.estimate(found, chip, 8)
  assert estimate["seconds"] == pytest.approx(
    {"operations": 1.0, "memory": 0.5, "links": 0.2, "network": 2.0}
  )
  assert estimate["bound_by"] == "network" and estimate["step_seconds_overlapped"] == 2.0
  assert estimate["mfu_overlapped"] == 0.5 and estimate["mfu_in_turn"] == pytest.approx(1 / 3.7)


def test_traffic_counts_loops_and_slices_as_they_are():
  def body(total, row):
    return total, jnp.sin(row)

  compiled = jax.jit(lambda x: jax.lax.scan(body, 0.0, x)[1]).lower(jnp.zeros((50, 1024))).compile()
  moved = traffic.hbm_bytes(hlo.parse(compiled.as_text()))
  # Each row is read and written, with few bytes for counters; and the result is cleared before.
  assert 2 * 50 * 4096 <= moved <= 4 * 50 * 4096


def test_flags_of_the_mode():
  parse = lambda *more: configuration.parse(["run.py", "--config=configs/quickstart.py", *more])
  asked = parse("--mode=aot", "--topology=cpu:2", "--largest_batch", "--json=x.json")
  assert asked.options == {"topology": "cpu:2", "largest_batch": "true", "json": "x.json"}
  with pytest.raises(UserError, match="--topology is a flag of --mode=aot; --mode is 'train'"):
    parse("--topology=cpu:2")
  with pytest.raises(UserError, match="true or false"):
    parse("--mode=aot", "--largest_batch=yes")


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'recurrax[aot]'",
)


def compile_tiny(program, topology, *arguments, **fields):
  """Exit status, output and errors of a report on the tiny Mamba; it waits as long as it takes."""
  asked = ("--config=configs/mamba_lm.py:tiny", "--mode=aot", f"--topology={topology}", *arguments)
  process = program.start(*asked, **fields)
  out, err = process.communicate()
  return process.returncode, out, err


@needs_libtpu
def test_a_tiny_step_for_a_tpu(program, tmp_path):
  """As a user asks for it, on a machine without a TPU."""
  status, out, err = compile_tiny(program, "v5e:2x4", f"--workdir={tmp_path}", mesh__fsdp=4)
  assert status == 0, err
  found = json.loads((tmp_path / "aot.json").read_text())
  assert found["fits"] and found["devices"] == 8
  assert found["available_bytes_per_device"] == 15.75 * GIB
  assert found["parts_bytes_per_device"]["program"] > 0
  assert "all-reduce" in {row["kind"] for row in found["collectives"]}
  assert 0 < found["estimate"]["mfu_overlapped"] < 1
  assert "MFU" in out


@needs_libtpu
def test_a_step_that_does_not_fit_names_the_array_at_fault(program, tmp_path):
  """An embedding of 5 GiB and two moments of the same size, on a chip of 16 GB."""
  path = tmp_path / "here.json"
  sizes = {"model__vocab_size": 40_000_000, "train__batch_size": 1, "data__T": 8}
  status, _, err = compile_tiny(program, "v5e:1x1", f"--json={path}", **sizes)
  assert status == 1
  (line,) = err.strip().splitlines()
  assert "on each device of v5e:1x1, which has 15.75 GiB" in line
  assert "f32[40000000,32]" in line and "--config.mesh.fsdp" in line
  found = json.loads(path.read_text())
  assert not found["fits"] and found["largest_arrays"][0]["bytes"] > 4 * GIB
