"""The doctor passes what is right, fails what is wrong, and says where."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import doctor
from experiments.doctor_inputs import FAMILIES, SUBJECTS, Shape, documents
from experiments.doctor_limits import judge
from experiments.errors import UserError
from ops.kernels.gpu import linear_attention as kernels
from ops.linear_attention_chunked import chunked
from tests.quick_compilation import quick_compilation as quick_compilation

CONV = dataclasses.replace(
  next(subject for subject in SUBJECTS if subject.name == "causal_conv"),
  lengths=(Shape(5), Shape(9, packed=True)),
)


def ill(change):
  """The convolution, its output and state changed by `change(o, state, x)`."""

  def causal_conv(**inputs):
    return change(*CONV.op(**inputs), inputs["x"])

  return dataclasses.replace(CONV, op=causal_conv)


def examine(subject, dtype="float32"):
  (examination,) = doctor.examine(subject, dtype, ["parallel"])
  return examination


@pytest.mark.parametrize("dtype", doctor.DTYPES)
def test_what_is_right_passes(dtype):
  examination = examine(CONV, dtype)
  families = len(CONV.families())
  shapes = {"float32": 2, "bfloat16": 1, "float64": 1}[dtype]
  assert len(examination.cells) == families * shapes * 6
  assert not examination.failures
  assert all(0 <= cell.verdict.share < 0.7 for cell in examination.cells)


@pytest.mark.parametrize(
  ("change", "tensor"),
  [
    (lambda o, state, x: (o * (1 + 1e-4), state), "o"),
    (lambda o, state, x: (o, state * (1 + 1e-4)), "state"),
    (lambda o, state, x: (o, jnp.where(state > 2, jnp.nan, state)), "state"),
    (lambda o, state, x: (o + 1e-3 * (x - jax.lax.stop_gradient(x)), state), "dx"),
  ],
)
def test_what_is_wrong_fails(change, tensor):
  failed = {cell.tensor for cell in examine(ill(change)).failures}
  assert tensor in failed


def test_kernels_get_the_widths_they_are_for(monkeypatch):
  def supports(*, q, segment_ids, **arguments):
    return "too narrow" if q.shape[3] < 64 else "documents" if segment_ids is not None else None

  def run(tokens, state, scale, chunk_size, precision):
    return chunked(tokens._replace(q=scale * tokens.q), state, chunk_size, precision)

  stand_in = types.SimpleNamespace(supports=supports, run=run)
  monkeypatch.setattr(kernels, "_kernels", lambda *arguments: stand_in)
  wide = (Shape(3, K=64, V=64), Shape(2, K=64, V=64, packed=True))
  subject = next(subject for subject in SUBJECTS if subject.name == "retention")
  subject = dataclasses.replace(subject, wide=wide, traits=frozenset({"gate"}))
  (examination,) = doctor.examine(subject, "bfloat16", ["pallas"])
  assert {cell.shape for cell in examination.cells} == {"T3 K64 V64"}
  assert not examination.failures
  of_kernels = {(shape.K, shape.V) for subject in SUBJECTS for shape in subject.wide}
  assert of_kernels >= {(64, 64), (64, 128), (128, 64), (128, 128)}


def test_limits():
  ones = np.ones(4)
  assert judge("o", ones * (1 + 1e-5), ones, "float32").passed
  assert not judge("o", ones * (1 + 3e-5), ones, "float32").passed
  assert judge("dq", ones * (1 + 3e-5), ones, "float32").passed
  assert not judge("dq", ones * (1 + 1e-9), ones, "float64").passed
  assert not judge("o", ones * np.nan, ones, "float32").passed
  assert not judge("o", np.ones(3), ones, "float32").passed
  # Where zeros are expected, zeros pass and nothing else does, unless large terms cancel.
  assert judge("dg", np.zeros(4), np.zeros(4), "float32").passed
  assert not judge("dg", np.full(4, 1e-9), np.zeros(4), "float32").passed
  assert judge("dg", np.full(4, 1e-9), np.zeros(4), "float32", terms=1.0).passed
  # In bfloat16 one value far from the others is rounded coarsely, the others are not excused.
  outlier = np.array([1000.0] + [0.1] * 399)
  assert judge("o", outlier * (1 + 2**-9), outlier, "bfloat16").passed
  assert not judge("o", outlier * (1 + 2**-7), outlier, "bfloat16").passed
  assert not judge("o", outlier + 3 * (outlier < 1), outlier, "bfloat16").passed


def test_the_program_prints_writes_and_fails(monkeypatch, tmp_path, capsys):
  sick = ill(lambda o, state, x: (o * 1.01, state))
  monkeypatch.setattr(doctor, "SUBJECTS", (CONV,))
  files = [f"--json={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'a.md'}"]
  assert doctor.main(["--op=causal_conv", "--dtype=float32", *files]) == 0
  text = capsys.readouterr().out
  assert text.count("causal_conv") == 2 and "0 of" not in text and "pass" in text
  found = json.loads((tmp_path / "a.json").read_text())
  assert found["date"] and found["versions"]["jax"] and found["device"] == "cpu"
  assert {cell["implementation"] for cell in found["cells"]} == {"recurrent", "parallel"}
  assert all(cell["pass"] and cell["error"] <= cell["limit"] for cell in found["cells"])
  assert "| causal_conv | parallel | float32 |" in (tmp_path / "a.md").read_text()

  monkeypatch.setattr(doctor, "SUBJECTS", (sick,))
  assert doctor.main(["--implementation=parallel", "--dtype=float32", *files]) == 1
  out, err = capsys.readouterr()
  assert "FAIL causal_conv parallel float32 T5, plain: o " in out
  assert err.startswith("error: ") and "comparisons fail" in err and err.count("\n") == 1
  assert "FAIL" in (tmp_path / "a.md").read_text()
  assert not all(cell["pass"] for cell in json.loads((tmp_path / "a.json").read_text())["cells"])


def test_mistakes_are_one_line():
  with pytest.raises(UserError, match=r"--op is 'mamba', must be of linear_scan, .*kda, plstm_1d$"):
    doctor.run(op="mamba")
  with pytest.raises(UserError, match="--dtype is 'int8', must be of float32, bfloat16, float64"):
    doctor.run(dtype="int8")
  with pytest.raises(UserError, match="no such implementation of these ops can run here"):
    doctor.run(op="causal_conv", implementation="chunked")


def test_the_table_covers_what_it_claims():
  lengths = {shape.T for subject in SUBJECTS for shape in subject.lengths}
  assert lengths >= {1, 15, 16, 17, 63, 64, 65, 127, 257, 1000}
  concerns = {family.concerns for family in FAMILIES}
  assert concerns == set.union(*(set(subject.traits) for subject in SUBJECTS))
  for subject in SUBJECTS:
    for family in subject.families():
      for shape in subject.lengths[:2]:
        assert all(np.isfinite(x).all() for x in subject.inputs(family, shape).values())
  ids = documents(65)
  assert (ids < 0).any(axis=1).all() and (ids[:, 1:] != ids[:, :-1]).sum() > 8
