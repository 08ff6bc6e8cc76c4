"""`--mode=bench`: the ops that a config's model calls, at its shapes, its training step and its
decoding."""

import pathlib
import time

import jax
import jax.numpy as jnp

from experiments import benchmark_report as report
from experiments import plots, sharding, train_step
from experiments.benchmark_cases import KNOWN, calls_of, workloads_of
from experiments.benchmark_measure import benchmark_op
from experiments.benchmark_timing import time_calls
from experiments.tasks import make_task
from lm_models import lm
from ops import dispatch

DECODED = 64  # tokens of each row that decoding is timed on
DECODED_ROWS = (1, 64)


def benchmark_config(config, workdir: str) -> None:
  """Prints the table; writes bench.json and roofline.png into the run's directory.

  The ops are found by tracing the model; they are timed without documents or a state.
  """
  task = make_task(config)
  calls = calls_of_task(task)
  found = workloads_of(calls)
  for workload, chosen in found.items():
    print(f"the model runs {workload.op} {report.shape_text(workload.sizes)} by {chosen}")
  others = dict.fromkeys((call.op, call.chosen) for call in calls if call.op not in KNOWN)
  for op, chosen in others:
    print(f"the model runs {op} by {chosen}, which is timed within the training step only")
  rows = []
  print(report.HEAD)
  for workload in found:
    for _, measured in benchmark_op(workload, check=False):
      rows += measured
      print(*report.lines(measured), sep="\n", flush=True)
  directory = pathlib.Path(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  written = [directory / "bench.json"]
  if any(row["ms"] for row in rows):
    written.append(directory / "roofline.png")
    plots.roofline(rows, written[1])
  rows.append(_benchmark_step(task))
  speed = rows[-1]["tokens_per_second"]
  print(f"training step: {rows[-1]['ms']:.1f} ms, {speed:,.0f} {task.unit}/s")
  if isinstance(task.model, lm.Config):
    for B in DECODED_ROWS:
      rows.append(benchmark_decoding(task.model, B))
      row = rows[-1]
      print(
        f"decoding {B} rows: {row['ms']:.3f} ms a token, {row['tokens_per_second']:,.0f} in all"
      )
  report.write_rows(rows, written[0])
  for path in written:
    print(f"wrote {path}")


def calls_of_task(task) -> list[dispatch.Call]:
  """The calls of ops in one forward pass over a microbatch."""
  rows = task.config.train.batch_size // task.config.train.accumulate
  shapes = {
    name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    for name, x in task.example_batch().items()
  }
  make = lambda key: (task.init(key), task.init_carry(rows), key)
  params, carry, key = jax.eval_shape(make, jax.random.key(0))
  return calls_of(lambda *arguments: task.forward(*arguments)[0], params, shapes, carry, key)


def _benchmark_step(task) -> dict:
  """A row on the whole training step."""
  config = task.config
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    step, state = train_step.make_step(config, mesh), train_step.initialise(config, mesh)
    batch = sharding.place_batch(mesh, task.example_batch())
    began = time.perf_counter()
    carried = [*step(state, batch)]
    jax.block_until_ready(carried)
    seconds = time.perf_counter() - began

    def again():
      carried[:] = step(carried[0], batch)
      return carried[1]

    (milliseconds,) = time_calls([again], seconds=5.0)
  targets = config.train.batch_size * task.targets_per_row
  return {
    "op": "train_step",
    "B": config.train.batch_size,
    "T": task.targets_per_row,
    "dtype": task.model.dtype,
    "ms": milliseconds,
    "tokens_per_second": targets / milliseconds * 1e3,
    "tflop_per_s": 3 * task.flops_per_target() * targets / milliseconds / 1e9,
    "compile_s": seconds,
    **report.environment(),
  }


def benchmark_decoding(model: lm.Config, B: int, **timing) -> dict:
  """A row on tokens made one after the other, the likeliest each, by one program.

  Args:
    model: with random parameters; its matrices are in the dtype that they multiply in.
    B: rows.
    **timing: of `time_calls`.
  """

  @jax.jit
  def initialise(key):
    return jax.tree_util.tree_map_with_path(narrow, lm.init(model, key))

  def narrow(path, x):
    is_matrix = jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding", "head")
    return x.astype(model.dtype) if is_matrix else x

  @jax.jit
  def decode(params, token, state):
    def step(carried, _):
      logits, state = lm.decode_step(model, params, *carried)
      token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return (token, state), token

    return jax.lax.scan(step, (token, state), length=DECODED)

  params = initialise(jax.random.key(0))
  arguments = params, jnp.zeros(B, jnp.int32), lm.init_state(model, B)
  began = time.perf_counter()
  jax.block_until_ready(decode(*arguments))
  seconds = time.perf_counter() - began
  (milliseconds,) = time_calls([lambda: decode(*arguments)], **timing)
  return {
    "op": "decode",
    "B": B,
    "T": 1,
    "dtype": model.dtype,
    "ms": milliseconds / DECODED,
    "tokens_per_second": B * DECODED / milliseconds * 1e3,
    "compile_s": seconds,
    **report.environment(),
  }
