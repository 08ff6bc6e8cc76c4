"""`--mode=bench`: the ops that a config's model calls, at its shapes, and its training step."""

import pathlib
import time

import jax
import numpy as np

from experiments import benchmark_report as report
from experiments import models, plots, sharding, train_step
from experiments.benchmark_cases import calls_of_model, workloads_of
from experiments.benchmark_measure import benchmark_op
from experiments.benchmark_timing import time_calls
from lm_models import lm


def benchmark_config(config, workdir: str) -> None:
  """Prints the table; writes bench.json and roofline.png into the run's directory.

  The ops are found by tracing the model; they are timed without documents or a state.
  """
  model = models.language_model(config)
  B = config.train.batch_size // config.train.accumulate
  found = workloads_of(calls_of_model(model, B, config.data.T))
  for workload, chosen in found.items():
    print(f"the model runs {workload.op} {report.shape_text(workload.sizes)} by {chosen}")
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
  rows.append(_benchmark_step(config, model))
  print(f"training step: {rows[-1]['ms']:.1f} ms, {rows[-1]['tokens_per_second']:,.0f} tokens/s")
  report.write_rows(rows, written[0])
  for path in written:
    print(f"wrote {path}")


def _benchmark_step(config, model) -> dict:
  """A row on the whole training step, on batches of random tokens."""
  mesh = sharding.make_mesh(config.mesh)
  rows, T = config.train.batch_size, config.data.T
  tokens = np.random.default_rng(0).integers(0, 256, (rows, T + 1)).astype(np.int32)
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": np.zeros((rows, T), np.int32),
    "continues": np.ones(rows, bool),
  }
  with jax.set_mesh(mesh):
    step, state = train_step.make_step(config, mesh), train_step.initialise(config, mesh)
    batch = sharding.place_batch(mesh, batch)
    began = time.perf_counter()
    carried = [*step(state, batch)]
    jax.block_until_ready(carried)
    seconds = time.perf_counter() - began

    def again():
      carried[:] = step(carried[0], batch)
      return carried[1]

    (milliseconds,) = time_calls([again], seconds=5.0)
  return {
    "op": "train_step",
    "B": rows,
    "T": T,
    "dtype": model.dtype,
    "ms": milliseconds,
    "tokens_per_second": rows * T / milliseconds * 1e3,
    "tflop_per_s": 3 * lm.flops_per_token(model, T) * rows * T / milliseconds / 1e9,
    "compile_s": seconds,
    **report.environment(),
  }
