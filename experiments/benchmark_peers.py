"""Other libraries' ops at the same shapes: flash-linear-attention's, and causal softmax attention.

Their rows are as ours; `implementation` names the library, `compile_s` is the first call, which in
Triton includes minutes of tuning, and there is no `error`. What is not installed is said in a line.
"""

import functools
import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_report as report
from experiments import benchmark_timing as timing
from experiments import floors
from experiments.benchmark_cases import CASES, Workload, abstract
from experiments.benchmark_error import make_cotangent, make_pass

FLA = "flash-linear-attention"
# Module and function of flash-linear-attention for each op of ours.
FLA_OPS = {
  "linear_attention": ("fla.ops.linear_attn", "chunk_linear_attn"),
  "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"),
  "ssd": ("fla.ops.simple_gla", "chunk_simple_gla"),
  "gla": ("fla.ops.gla", "chunk_gla"),
  "delta_rule": ("fla.ops.delta_rule", "chunk_delta_rule"),
  "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
  "kda": ("fla.ops.kda", "chunk_kda"),
  "retention": ("fla.ops.retention", "chunk_retention"),
}
FLA_OPTIONS = {"linear_attention": {"normalize": False}, "ssd": {"scale": 1.0}}


class Peers:
  """The peers that are installed."""

  def __init__(self, say: Callable[[str], None] = print):
    self._say, self._attended = say, set()
    self._cuda = jax.default_backend() == "gpu"
    self._torch = _import("torch")
    if self._torch is None:
      say(f"peers: no torch, so no rows of {FLA} and torch")
    elif self._cuda and not self._torch.cuda.is_available():
      say(f"peers: torch has no CUDA here, so no rows of {FLA} and torch")
      self._torch = None
    self._fla = self._torch is not None and self._cuda and _import("fla") is not None
    if self._torch is not None and not self._fla:
      say(f"peers: no {FLA}" if self._cuda else f"peers: no rows of {FLA}, which needs CUDA")

  def op_rows(self, workload: Workload, pass_: str) -> list[dict]:
    """The row of flash-linear-attention for this op, if there is one."""
    if not self._fla or workload.op not in FLA_OPS:
      return []
    module, name = FLA_OPS[workload.op]
    function = getattr(_import(module), name, None)
    if function is None:
      self._say(f"peers: this {FLA} has no {name}")
      return []
    arrays = workload.inputs()
    output = jax.eval_shape(CASES[workload.op].op, **abstract(arrays))[0]
    work = floors.least_work(workload.op, workload.sizes, arrays, output, pass_)

    def make():
      options = FLA_OPTIONS.get(workload.op, {})
      call = lambda **tensors: function(**tensors, **options)[0]
      return call, self._fla_inputs(workload.op, arrays), self._tensor(make_cotangent(output))

    return [self._torch_row(workload, f"{FLA} {name}", pass_, work, make)]

  def attention_rows(self, workload: Workload, passes: Sequence[str]) -> Iterator[list[dict]]:
    """Rows of causal attention at the heads and widths of an op with a matrix state, once each."""
    sizes = {**workload.sizes}
    if "K" not in sizes or sizes["K"] != sizes["V"]:
      return
    sizes["G"] = sizes["H"]
    attention = Workload("causal_attention", tuple(sizes.items()), workload.dtype, workload.dtype)
    if attention in self._attended:
      return
    self._attended.add(attention)
    shape = tuple(sizes[letter] for letter in "BTHK")
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.standard_normal(shape, np.float32), workload.dtype)
    arrays = {name: draw() for name in "qkv"}
    for pass_ in passes:
      work = floors.least_work(attention.op, sizes, arrays, arrays["v"], pass_)
      rows = [_jax_attention_row(attention, arrays, pass_, work)]
      if self._torch is not None:
        rows.append(self._torch_attention_row(attention, arrays, pass_, work))
      yield rows

  def _torch_attention_row(self, workload, arrays, pass_, work) -> dict:
    heads_first = {name: jnp.swapaxes(x, 1, 2) for name, x in arrays.items()}

    def make():
      attend = self._torch.nn.functional.scaled_dot_product_attention
      tensors = {name: self._tensor(x) for name, x in heads_first.items()}
      call = lambda q, k, v: attend(q, k, v, is_causal=True)
      return call, tensors, self._tensor(make_cotangent(heads_first["v"]))

    return self._torch_row(workload, "torch sdpa", pass_, work, make)

  def _fla_inputs(self, op: str, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    if op == "ssd":
      x, dt, A, B, C = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
      arrays = {"q": C, "k": B, "v": (dt[..., None] * x).astype(x.dtype), "g": dt * A}
    repeats = arrays["v"].shape[2] // arrays["q"].shape[2]
    arrays |= {name: jnp.repeat(arrays[name], repeats, axis=2) for name in "qk"}
    return {name: self._tensor(x) for name, x in arrays.items()}

  def _tensor(self, x: jax.Array):
    dtype = getattr(self._torch, x.dtype.name)
    tensor = self._torch.tensor(np.asarray(x, np.float32))
    return tensor.to("cuda" if self._cuda else "cpu", dtype)

  def _torch_row(self, workload, implementation, pass_, work, make) -> dict:
    """Times what `make` returns: a function, its tensors by name, the output's cotangent."""
    torch, measured = self._torch, {}
    wait = (lambda _: torch.cuda.synchronize()) if self._cuda else lambda _: None
    try:
      function, tensors, cotangent = make()
      names = list(tensors)
      for tensor in tensors.values():
        tensor.requires_grad_(pass_ == "forward_backward")

      def call():
        output = function(**tensors)
        if pass_ == "forward":
          return output
        return torch.autograd.grad(output, [tensors[name] for name in names], cotangent)

      before = self._reset_peak()
      began = time.perf_counter()
      wait(call())
      measured["compile_s"] = time.perf_counter() - began
      if self._cuda:
        measured["peak_bytes"] = torch.cuda.max_memory_allocated() - before
      (measured["ms"],) = timing.time_calls([call], wait=wait, queued=self._cuda)
    except _failures() as failure:
      measured = {"failure": timing.describe(failure)}
    device = torch.cuda.get_device_name() if self._cuda else None
    return report.make_row(
      workload, implementation, pass_, work, timing.copy_bandwidth(), **measured, device=device,
      versions=_versions(),
    )  # fmt: skip

  def _reset_peak(self) -> int:
    if not self._cuda:
      return 0
    self._torch.cuda.reset_peak_memory_stats()
    return self._torch.cuda.memory_allocated()


def _jax_attention_row(workload, arrays, pass_, work) -> dict:
  # cuDNN's kernel takes no float32.
  fast = jax.default_backend() == "gpu" and workload.dtype == "bfloat16"
  kind = "cudnn" if fast else "xla"

  def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)

  arguments = arrays, make_cotangent(arrays["v"])
  try:
    program = timing.compile_program(make_pass(attend, pass_), *arguments)
    if program.needed_bytes > timing.device_memory():
      raise MemoryError(f"it needs {program.needed_bytes / 1e9:.1f} GB, more than this device has")
    jax.block_until_ready(program.run(*arguments))
    (ms,) = timing.time_calls([lambda: program.run(*arguments)])
    measured = {"ms": ms, "compile_s": program.compile_s, "peak_bytes": program.peak_bytes}
  except (*timing.FAILURES, MemoryError) as failure:
    measured = {"failure": timing.describe(failure)}
  return report.make_row(workload, f"jax {kind}", pass_, work, timing.copy_bandwidth(), **measured)


def _import(name: str):
  try:
    return importlib.import_module(name)
  except ImportError:
    return None


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
  errors = _import("triton.errors")
  return timing.FAILURES if errors is None else (*timing.FAILURES, errors.TritonError)


@functools.cache
def _versions() -> dict[str, str]:
  found = {}
  for package in ("torch", "triton", FLA):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
