"""The floors are those of the published byte and operation counts."""

import jax
import pytest

from experiments import floors
from experiments.benchmark_cases import CASES

BANDWIDTH = 3.0e12
HOPPER = floors.RATES["NVIDIA H100 80GB HBM3"]


def shapes(op, gate_dtype="float32", dtype="bfloat16", **sizes):
  """Arguments of an op without arrays, from what it draws at B1 T1."""
  case = CASES[op]
  tiny = case.inputs(**{**sizes, "B": 1, "T": 1})
  arrays = {}
  for name, x in tiny.items():
    # Arguments with a time axis are [B T ...]; the parameters have no axes of size one.
    shape = (sizes["B"], sizes["T"], *x.shape[2:]) if x.shape[:2] == (1, 1) else x.shape
    arrays[name] = jax.ShapeDtypeStruct(shape, gate_dtype if name in case.gates else dtype)
  return arrays


def work(op, pass_, gate_dtype="float32", **sizes):
  arrays = shapes(op, gate_dtype, **sizes)
  output = next(arrays[name] for name in ("v", "x", "b") if name in arrays)
  return floors.least_work(op, sizes, arrays, output, pass_)


def both(op, **sizes):
  return [work(op, pass_, **sizes) for pass_ in floors.PASSES]


@pytest.mark.parametrize(
  "op, forward, total",
  [
    ("gla", lambda K, V: 8 * K + 4 * V, lambda K, V: 24 * K + 10 * V),
    ("ssd", lambda K, V: 4 * K + 4 * V + 4, lambda K, V: 12 * K + 10 * V + 12),
    ("gated_delta_rule", lambda K, V: 4 * K + 4 * V + 8, lambda K, V: 12 * K + 10 * V + 24),
    ("delta_rule", lambda K, V: 4 * K + 4 * V + 4, lambda K, V: 12 * K + 10 * V + 12),
    ("kda", lambda K, V: 8 * K + 4 * V + 4, lambda K, V: 24 * K + 10 * V + 12),
    ("linear_attention", lambda K, V: 4 * K + 4 * V, lambda K, V: 12 * K + 10 * V),
  ],
)
def test_bytes_of_a_token_and_head(op, forward, total):
  B, T, H, K, V = 2, 500, 3, 128, 64
  first, second = both(op, B=B, T=T, H=H, G=H, K=K, V=V)
  assert first.bytes / (B * T * H) == pytest.approx(forward(K, V), rel=1e-4)
  assert second.bytes / (B * T * H) == pytest.approx(total(K, V), rel=1e-4)


def test_bytes_of_groups_and_narrow_gates():
  sizes = {"B": 2, "T": 500, "H": 8, "G": 2, "K": 128, "V": 64}
  grouped = work("ssd", "forward", **sizes).bytes / (2 * 500 * 8)
  assert grouped == pytest.approx(4 * 128 * 2 / 8 + 4 * 64 + 4, rel=1e-4)
  narrow = work("gla", "forward_backward", "bfloat16", **{**sizes, "G": 8}).bytes
  assert narrow / (2 * 500 * 8) == 18 * 128 + 10 * 64


def test_bytes_and_exponentials_of_diagonal_scans():
  scan = both("linear_scan", B=4, T=2048, D=2048)
  assert [w.bytes for w in scan] == [6 * 4 * 2048**2, 16 * 4 * 2048**2]
  sizes = {"B": 8, "T": 2048, "D": 2048, "N": 16}
  forward, total = both("selective_scan", gate_dtype="bfloat16", **sizes)
  channels = 8 * 2048 * 2048
  assert forward.bytes / channels == pytest.approx(6, rel=0.02)
  assert total.bytes / channels == pytest.approx(16, rel=0.02)
  # The exponentials take longer: .145 ms and twice that.
  milliseconds = [
    1e3 * floors.floor_seconds(w, BANDWIDTH, HOPPER, "bfloat16") for w in (forward, total)
  ]
  assert milliseconds == pytest.approx([0.145, 0.290], abs=1e-3)
  assert 1e3 * floors.floor_seconds(forward, BANDWIDTH, None, "bfloat16") < 0.07


# Milliseconds forward, and forward and backward: of bytes at 3.0 TB/s, of products at 800 TFLOP/s.
TABLE = [
  ("gla", (8, 2048, 16, 128), (0.112, 0.313), (0.032, 0.113)),
  ("gla", (2, 16384, 16, 128), (0.224, 0.626), (0.064, 0.225)),
  ("gla", (8, 2048, 32, 256), (0.447, 1.253), (0.215, 0.752)),
  ("ssd", (8, 2048, 16, 64), (0.045, 0.124), (0.011, 0.038)),
  ("ssd", (4, 2048, 16, 128), (0.045, 0.124), (0.016, 0.056)),
  ("gated_delta_rule", (2, 16384, 16, 128), (0.180, 0.498), (0.108, 0.399)),
  ("gated_delta_rule", (8, 2048, 16, 64), (0.045, 0.126), (0.019, 0.071)),
  ("gated_delta_rule", (8, 2048, 32, 256), (0.359, 0.990), (0.344, 1.269)),
]


@pytest.mark.parametrize("op, shape, by_bytes, by_flops", TABLE)
def test_published_floors(op, shape, by_bytes, by_flops):
  B, T, H, K = shape
  gate_dtype = "bfloat16" if op == "gla" else "float32"
  passes = both(op, gate_dtype=gate_dtype, B=B, T=T, H=H, G=H, K=K, V=K)
  for w, bytes_ms, flops_ms in zip(passes, by_bytes, by_flops):
    assert 1e3 * w.bytes / BANDWIDTH == pytest.approx(bytes_ms, rel=0.008, abs=6e-4)
    assert 1e3 * w.flops / HOPPER.bfloat16_flops == pytest.approx(flops_ms, abs=6e-4)
    floor = 1e3 * floors.floor_seconds(w, BANDWIDTH, HOPPER, "bfloat16")
    assert floor == pytest.approx(max(bytes_ms, flops_ms), rel=0.01, abs=6e-4)
    # Of products in float32 no rate is known.
    assert 1e3 * floors.floor_seconds(w, BANDWIDTH, HOPPER, "float32") == pytest.approx(
      bytes_ms, rel=0.01, abs=6e-4
    )


def test_attention_counts_half_of_all_pairs():
  sizes = {"B": 1, "T": 100, "H": 2, "K": 8, "V": 8}
  array = jax.ShapeDtypeStruct((1, 100, 2, 8), "bfloat16")
  w = floors.least_work("causal_attention", sizes, dict.fromkeys("qkv", array), array, "forward")
  assert w.flops == 2 * 2 * 8 * 2 * 100 * 100 / 2 and w.bytes == 4 * 2 * array.size
