"""How fast each implementation of each op is on this device, beside the floor that memory sets.

python -m experiments.benchmark --op=selective_scan --shape=B4,T2048,D512,N16
python -m experiments.benchmark --peers        (beside Hugging Face transformers, if installed)
python run.py --config=configs/quickstart.py --mode=bench       (the ops and the step of a config)

Times are medians of whole calls after one that compiles and one that warms up, synchronised; the
implementations of one shape are timed in turn, round by round, so that a machine that slows down
slows all of them. `floor_ms` is the time in which the device copies the op's inputs and outputs,
each once, at the bandwidth of a large copy measured in the same run. `error` is the largest
deviation from the float64 oracle, of outputs (and gradients), in multiples of their root mean
square.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments import sharding, train_step, workspace
from experiments.errors import UserError
from experiments.memory import keep_memory
from lm_models import lm, mamba
from ops import reference


@dataclasses.dataclass(frozen=True)
class Case:
  """An op as the benchmark knows it: its default shape, inputs, and arithmetic for one call."""

  op: Callable
  oracle: Callable
  shape: dict[str, int]
  inputs: Callable[..., dict[str, np.ndarray]]  # float64 arrays by argument name
  flops: Callable[..., float]


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape)


def _decay(seed: int, *shape: int) -> np.ndarray:
  return 1 / (1 + np.exp(-2 - _normal(seed, *shape)))


CASES = {
  "linear_scan": Case(
    ops.linear_scan,
    reference.linear_scan,
    {"B": 4, "T": 2048, "D": 512},
    lambda B, T, D: {"a": _decay(0, B, T, D), "b": _normal(1, B, T, D)},
    lambda B, T, D: 2 * B * T * D,
  ),
  "selective_scan": Case(
    ops.selective_scan,
    reference.selective_scan,
    {"B": 4, "T": 2048, "D": 512, "N": 16},
    lambda B, T, D, N: {
      "x": _normal(0, B, T, D),
      "dt": np.exp(-4 + _normal(1, B, T, D)),
      "A": -np.tile(np.arange(1.0, N + 1), (D, 1)),
      "B": _normal(2, B, T, N),
      "C": _normal(3, B, T, N),
      "D": np.ones(D),
    },
    lambda B, T, D, N: B * T * D * (7 * N + 3),
  ),
  "causal_conv": Case(
    ops.causal_conv,
    reference.causal_conv,
    {"B": 4, "T": 2048, "D": 512, "W": 4},
    lambda B, T, D, W: {"x": _normal(0, B, T, D), "weight": _normal(1, W, D)},
    lambda B, T, D, W: 2 * B * T * D * W,
  ),
}
IMPLEMENTATIONS = ("recurrent", "parallel", "chunked", "pallas")
PASSES = ("forward", "forward_backward")


def parse_shape(text: str, default: dict[str, int]) -> dict[str, int]:
  """Reads B4,T2048,D512; letters left out keep the op's default.

  Raises:
    UserError: a letter that the op does not have, or a size below 1.
  """
  shape = dict(default)
  for part in filter(None, text.split(",")):
    match = re.fullmatch(r"([A-Z])(\d+)", part.strip())
    if not match or match[1] not in default or int(match[2]) < 1:
      allowed = ",".join(f"{letter}{size}" for letter, size in default.items())
      raise UserError(f"--shape has {part!r}, must be letters with sizes such as {allowed}")
    shape[match[1]] = int(match[2])
  return shape


def time_call(functions: Sequence[Callable[[], Any]], seconds: float = 2.0) -> list[float]:
  """Median milliseconds of each function, called in turn; each has been called once before.

  Args:
    functions: return arrays to wait for.
    seconds: to spend on all of them together, at least three rounds.
  """
  times: list[list[float]] = [[] for _ in functions]
  end = time.perf_counter() + seconds
  while time.perf_counter() < end or len(times[0]) < 3:
    for function, measured in zip(functions, times):
      began = time.perf_counter()
      jax.block_until_ready(function())
      measured.append(1e3 * (time.perf_counter() - began))
  return [float(np.median(measured)) for measured in times]


def copy_bandwidth() -> float:
  """Bytes read and written per second in a copy of 256 MiB on one device."""
  x = jnp.zeros(2**26, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  jax.block_until_ready(copy(x))
  (milliseconds,) = time_call([lambda: copy(x)], seconds=0.5)
  return 2 * x.nbytes / (milliseconds / 1e3)


def benchmark_op(
  name: str,
  shape: dict[str, int],
  *,
  dtype: str = "float32",
  implementations: Sequence[str] = IMPLEMENTATIONS,
  passes: Sequence[str] = PASSES,
  check: bool = True,
) -> list[dict]:
  """Rows for the implementations of one op at one shape that can run here; see the module."""
  case = CASES[name]
  exact = case.inputs(**shape)
  inputs = {key: jnp.asarray(value, dtype) for key, value in exact.items()}
  bandwidth, rows = copy_bandwidth(), []
  for pass_ in passes:
    wanted = _oracle(case, inputs, pass_) if check else None
    compiled = []
    for implementation in implementations:
      if ops.dispatch.refusal(case.op, implementation, **inputs):
        continue
      function = _pass(lambda i=implementation, **kw: case.op(**kw, implementation=i)[0], pass_)
      began = time.perf_counter()
      program = jax.jit(function).lower(inputs).compile()
      seconds = time.perf_counter() - began
      outputs = jax.block_until_ready(program(inputs))
      jax.block_until_ready(program(inputs))
      compiled.append((implementation, program, seconds, outputs))
    times = time_call([lambda p=program: p(inputs) for _, program, _, _ in compiled])
    for (implementation, program, seconds, outputs), milliseconds in zip(compiled, times):
      moved = sum(x.nbytes for x in jax.tree.leaves((inputs, outputs)))
      # A backward pass is about twice the forward one.
      flops = case.flops(**shape) * (3 if pass_ == "forward_backward" else 1)
      memory = program.memory_analysis()
      letters = {letter: shape.get(letter) for letter in "BTHKVDNW"}
      rows.append(
        {
          "op": name,
          "implementation": implementation,
          **letters,
          "dtype": dtype,
          "pass": pass_,
          "ms": milliseconds,
          "floor_ms": 1e3 * moved / bandwidth,
          "gb_per_s": moved / milliseconds / 1e6,
          "tflop_per_s": flops / milliseconds / 1e9,
          "peak_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
          "compile_s": seconds,
          "error": None if wanted is None else _error(outputs, wanted),
          **_environment(),
        }
      )
  return rows


def _pass(function: Callable, pass_: str) -> Callable:
  """Inputs to outputs, or to outputs and the gradients of their sum of squares."""
  if pass_ == "forward":
    return lambda inputs: function(**inputs)

  def loss(inputs):
    y = function(**inputs)
    return jnp.sum(jnp.square(y.astype(jnp.promote_types(y.dtype, jnp.float32)))), y

  return lambda inputs: jax.grad(loss, has_aux=True)(inputs)


def _oracle(case: Case, inputs: dict[str, jax.Array], pass_: str):
  """What the pass gives in float64, from the inputs as they were rounded."""
  with jax.enable_x64(True):
    exact = {key: jnp.asarray(np.asarray(x, np.float64)) for key, x in inputs.items()}
    function = _pass(lambda **kw: case.oracle(**kw)[0], pass_)
    return jax.tree.map(np.asarray, jax.jit(function)(exact))


def _error(outputs, wanted) -> float:
  def deviation(x, y):
    return np.max(np.abs(np.asarray(x, np.float64) - y)) / np.sqrt(np.mean(y * y))

  return float(max(map(deviation, jax.tree.leaves(outputs), jax.tree.leaves(wanted))))


def _environment() -> dict[str, Any]:
  return {
    "device": jax.devices()[0].device_kind,
    "versions": workspace.versions(),
    "date": datetime.date.today().isoformat(),
  }


def benchmark_config(config, workdir: str) -> None:
  """`--mode=bench`: the ops of the config's blocks at its shapes, and its training step.

  Prints the table and writes bench.json into the run's directory.
  """
  model = train_step.model_config(config)
  rows = []
  for name, shape in _shapes(config, model):
    rows += benchmark_op(name, shape, dtype=model.dtype, check=False)
  print(table(rows))
  rows.append(_benchmark_step(config, model))
  print(f"training step: {rows[-1]['ms']:.1f} ms, {rows[-1]['tokens_per_second']:,.0f} tokens/s")
  directory = pathlib.Path(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  write_rows(rows, directory / "bench.json")
  print(f"wrote {directory / 'bench.json'}")


def _shapes(config, model):
  """(op, shape) for each distinct op that the pattern's blocks call."""
  B, T = config.train.batch_size // config.train.accumulate, config.data.T
  for name in model.names:
    mixer = model.mixer(name)
    if isinstance(mixer, mamba.Config):
      yield "causal_conv", {"B": B, "T": T, "D": mixer.inner, "W": mixer.W}
      yield "selective_scan", {"B": B, "T": T, "D": mixer.inner, "N": mixer.N}


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

    (milliseconds,) = time_call([again], seconds=5.0)
  return {
    "op": "train_step",
    "B": rows,
    "T": T,
    "dtype": model.dtype,
    "ms": milliseconds,
    "tokens_per_second": rows * T / milliseconds * 1e3,
    "tflop_per_s": 3 * lm.flops_per_token(model, T) * rows * T / milliseconds / 1e9,
    "compile_s": seconds,
    **_environment(),
  }


def table(rows: Sequence[dict]) -> str:
  """The rows as a person reads them."""
  head = (
    f"{'op':<16}{'implementation':<16}{'shape':<28}{'dtype':<10}{'pass':<18}{'ms':>10}"
    f"{'of floor':>10}{'GB/s':>8}{'peak MB':>9}{'compile s':>11}{'error':>10}"
  )
  lines = [head]
  for row in rows:
    shape = " ".join(f"{letter}{row[letter]}" for letter in "BTHKVDNW" if row[letter])
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    lines.append(
      f"{row['op']:<16}{row['implementation']:<16}{shape:<28}{row['dtype']:<10}{row['pass']:<18}"
      f"{row['ms']:>10.3f}{row['floor_ms'] / row['ms']:>10.1%}{row['gb_per_s']:>8.1f}"
      f"{row['peak_bytes'] / 1e6:>9.1f}{row['compile_s']:>11.2f}{error:>10}"
    )
  return "\n".join(lines)


def write_rows(rows: Sequence[dict], path: pathlib.Path) -> None:
  """One JSON list of the rows."""
  path.write_text(json.dumps(list(rows), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
  """The command line of this module; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.benchmark", description="Times ops on the device at hand."
  )
  parser.add_argument("--op", choices=sorted(CASES), action="append", help="default: all")
  parser.add_argument("--shape", default="", help="sizes such as B4,T2048,D512,N16")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--implementation", choices=IMPLEMENTATIONS, action="append")
  parser.add_argument("--pass", dest="passes", choices=PASSES, action="append")
  parser.add_argument("--no-check", action="store_true", help="leave the oracle out")
  parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
  parser.add_argument(
    "--peers", action="store_true", help="train a small Mamba here and in transformers"
  )
  arguments = parser.parse_args(argv)
  try:
    if arguments.peers:
      from experiments import benchmark_peers

      rows = benchmark_peers.compare_training()
      print(benchmark_peers.table(rows))
    else:
      rows = []
      for name in arguments.op or sorted(CASES):
        rows += benchmark_op(
          name,
          parse_shape(arguments.shape, CASES[name].shape),
          dtype=arguments.dtype,
          implementations=arguments.implementation or IMPLEMENTATIONS,
          passes=arguments.passes or PASSES,
          check=not arguments.no_check,
        )
      print(table(rows))
    if arguments.json:
      write_rows(rows, arguments.json)
  except UserError as error:
    parser.exit(error.status, f"error: {error}\n")
  return 0


if __name__ == "__main__":
  keep_memory()
  main()
