"""The doctor's input families, on the default implementation at a length that compiles fast."""

import dataclasses

import pytest

from experiments import doctor
from experiments.doctor_inputs import SUBJECTS, Shape
from tests.quick_compilation import quick_compilation as quick_compilation


@pytest.mark.parametrize(
  ("name", "implementation"),
  [
    ("linear_scan", "chunked"),
    ("selective_scan", "recurrent"),
    ("ssd", "chunked"),
    ("retention", "chunked"),
    ("gla", "chunked"),
    ("kda", "chunked"),
    ("gated_delta_rule", "parallel"),
  ],
)
def test_every_family_within_the_limits(name, implementation):
  (subject,) = (subject for subject in SUBJECTS if subject.name == name)
  subject = dataclasses.replace(subject, lengths=(Shape(15, packed=name == "kda"),))
  (examination,) = doctor.examine(subject, "float32", [implementation])
  assert {cell.family for cell in examination.cells} == {kind.name for kind in subject.families()}
  assert not examination.failures, examination.failures[:3]
