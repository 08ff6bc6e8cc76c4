"""The doctor's input families, on the default implementation at a length that compiles fast."""

import dataclasses

import pytest

from experiments import doctor
from experiments.doctor_inputs import SUBJECTS, Shape
from tests.quick_compilation import quick_compilation as quick_compilation


@pytest.mark.parametrize(
  ("name", "implementation", "dtype", "shape"),
  [
    ("linear_scan", "chunked", "float32", Shape(15)),
    ("selective_scan", "recurrent", "float32", Shape(15)),
    ("ssd", "chunked", "float32", Shape(15, packed=True)),
    ("gla", "chunked", "float32", Shape(15)),
    ("kda", "chunked", "float32", Shape(8, packed=True)),
    ("gated_delta_rule", "parallel", "float32", Shape(7, K=1)),
    ("retention", "recurrent", "bfloat16", Shape(257)),
  ],
)
def test_every_family_within_the_limits(name, implementation, dtype, shape):
  (subject,) = (subject for subject in SUBJECTS if subject.name == name)
  subject = dataclasses.replace(subject, lengths=(shape,))
  (examination,) = doctor.examine(subject, dtype, [implementation])
  assert {cell.family for cell in examination.cells} == {kind.name for kind in subject.families()}
  assert not examination.failures, examination.failures[:3]
