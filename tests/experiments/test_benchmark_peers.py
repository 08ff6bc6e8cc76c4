"""Other libraries' ops, where they are installed, and a line where they are not."""

import importlib.util
import types

import pytest

from experiments import benchmark_peers, benchmark_timing
from experiments.benchmark_cases import make_workload
from experiments.benchmark_peers import Peers

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="torch, an optional peer, is not installed"
)
WORKLOAD = make_workload("ssd", "B1,T6,H4,G2,K8,V8", "bfloat16")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
  """Bandwidth from nowhere, and the fewest rounds."""
  monkeypatch.setattr(benchmark_timing, "copy_bandwidth", lambda: 1e10)
  time_calls = benchmark_timing.time_calls
  monkeypatch.setattr(
    benchmark_timing, "time_calls", lambda calls, **kw: time_calls(calls, **kw, seconds=0)
  )


def test_what_is_not_installed_is_said(monkeypatch):
  monkeypatch.setattr(benchmark_peers, "_import", lambda name: None)
  said = []
  peers = Peers(said.append)
  assert said == ["peers: no torch, so no rows of flash-linear-attention and torch"]
  assert peers.op_rows(WORKLOAD, "forward") == []
  ((row,),) = peers.attention_rows(WORKLOAD, ["forward"])
  assert (row["op"], row["implementation"]) == ("causal_attention", "jax xla")
  assert row["failure"] is None and row["ms"] > 0 and row["H"] == 4
  # Once for a shape, and not where there are no heads.
  assert list(peers.attention_rows(WORKLOAD, ["forward"])) == []
  scan = make_workload("linear_scan", "", "float32")
  assert list(peers.attention_rows(scan, ["forward"])) == []


@needs_torch
def test_attention_of_torch():
  said = []
  passes = ["forward", "forward_backward"]
  for pass_, rows in zip(passes, Peers(said.append).attention_rows(WORKLOAD, passes)):
    ours, theirs = rows
    assert theirs["implementation"] == "torch sdpa" and theirs["pass"] == pass_
    assert theirs["failure"] is None and theirs["ms"] > 0 and "torch" in theirs["versions"]
    assert theirs.keys() == ours.keys() and theirs["floor_ms"] == ours["floor_ms"]
  assert said == ["peers: no rows of flash-linear-attention, which needs CUDA"]


@needs_torch
def test_a_library_is_called_by_its_own_names(monkeypatch):
  seen = {}

  def chunk_simple_gla(q, k, v, g, scale):
    seen.update(q=q.shape, k=k.shape, v=v.shape, g=g.shape, dtypes=(q.dtype, g.dtype), scale=scale)
    return v * g.to(v.dtype)[..., None] * q.sum() * k.sum(), None

  library = types.SimpleNamespace(chunk_simple_gla=chunk_simple_gla)
  real = benchmark_peers.importlib.import_module
  monkeypatch.setattr(
    benchmark_peers.importlib,
    "import_module",
    lambda name: library if name == "fla.ops.simple_gla" else real(name),
  )
  said = []
  peers = Peers(said.append)
  peers._fla = True
  for pass_ in ("forward", "forward_backward"):
    (row,) = peers.op_rows(WORKLOAD, pass_)
    assert row["implementation"] == "flash-linear-attention chunk_simple_gla"
    assert row["failure"] is None and row["ms"] > 0 and row["error"] is None
  import torch

  # It has as many heads of q as of v, and the gate as a logarithm.
  assert seen == {
    **dict.fromkeys("qkv", (1, 6, 4, 8)),
    **{"g": (1, 6, 4), "dtypes": (torch.bfloat16, torch.float32), "scale": 1.0},
  }
  # A release without an op.
  assert peers.op_rows(make_workload("kda", "B1,T6,H1,K8,V8", "bfloat16"), "forward") == []
  assert said[-1] == "peers: this flash-linear-attention has no chunk_kda"
  # What it refuses is a row too.
  library.chunk_simple_gla = lambda **tensors: 1 / 0
  monkeypatch.setattr(benchmark_timing, "FAILURES", (ZeroDivisionError,))
  benchmark_peers._failures.cache_clear()
  (row,) = peers.op_rows(WORKLOAD, "forward")
  benchmark_peers._failures.cache_clear()
  assert row["failure"] == "ZeroDivisionError: division by zero" and row["ms"] is None
