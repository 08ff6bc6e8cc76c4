"""Whether every implementation of every op is right on this device, and by how much.

python -m experiments.doctor
python -m experiments.doctor --op=gla,kda --implementation=chunked --dtype=float32 --json=gla.json
python run.py --config=configs/quickstart.py --mode=doctor --op=gla --json=gla.json

Outputs, final states and the gradients of all inputs are compared with loops over tokens in float64
(`ops/reference.py`) on the inputs as they were rounded, for the input families and lengths of
`doctor_inputs.py`, by the limits of `doctor_limits.py`. The exit status is 1 if anything is beyond
them, or not finite.
"""

import argparse
import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments import doctor_inputs, doctor_report
from experiments.doctor_inputs import SUBJECTS, Shape, Subject
from experiments.doctor_limits import Verdict, judge
from experiments.doctor_report import Cell, Examination
from experiments.errors import UserError, check_writable
from ops.dispatch import IMPLEMENTATIONS

DTYPES = ("float32", "bfloat16", "float64")


def examine(
  subject: Subject, dtype: str, implementations: Sequence[str] = IMPLEMENTATIONS
) -> Iterator[Examination]:
  """Compares the implementations of one op that can run here with the oracle.

  Args:
    subject: a row of `doctor_inputs.SUBJECTS`.
    dtype: "float32", "bfloat16" or "float64".
    implementations: those wanted.

  Yields:
    The cells of each implementation.
  """
  inputs: dict[Shape, list[dict]] = {}
  references: dict[Shape, list[dict]] = {}
  for implementation in implementations:
    began, cells = time.perf_counter(), []
    for shape in subject.shapes(dtype, implementation):
      with _precision(dtype):
        if not _can_run(subject, implementation, shape, dtype):
          continue
      if shape not in references:
        inputs[shape] = [cast(subject.inputs(kind, shape), dtype) for kind in subject.families()]
        references[shape] = _oracle(subject, shape, inputs[shape])
      function = functools.partial(subject.op, implementation=implementation)
      with _precision(dtype):
        results = _run_all(function, inputs[shape], shape)
      place = (subject.name, implementation, dtype, shape.name)
      compared = zip(subject.families(), results, references[shape], inputs[shape])
      for family, actual, wanted, arrays in compared:
        for tensor, verdict in compare(subject, actual, wanted, arrays, dtype).items():
          cells.append(Cell(*place, family.name, tensor, verdict))
    if cells:
      yield Examination(subject.name, implementation, dtype, cells, time.perf_counter() - began)


def cast(inputs: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
  """Inputs rounded to `dtype`, complex ones to its partner; the state to float32 at least."""
  wide = "float64" if dtype == "float64" else "float32"
  partner = np.complex128 if dtype == "float64" else np.complex64

  def one(name, x):
    if np.iscomplexobj(x):
      return np.asarray(x, partner)
    return np.asarray(x, jnp.dtype(wide if name == "initial_state" else dtype))

  return {name: one(name, x) for name, x in inputs.items()}


def value_and_gradients(function: Callable) -> Callable:
  """A program: (inputs, segments) -> output "o", final "state" and "d" + name for each input.

  What is differentiated weighs every number of the output and of the state by another eighth, which
  is exact in bfloat16.
  """

  def loss(inputs, segments):
    o, state = function(**inputs, **segments)
    parts = [part for x in (o, state) for part in ((x.real, x.imag) if _is_complex(x) else (x,))]
    return sum(jnp.sum(part * _weights(i, part)) for i, part in enumerate(parts)), (o, state)

  def run(inputs, segments):
    (_, (o, state)), gradients = jax.value_and_grad(loss, has_aux=True)(inputs, segments)
    return {"o": o, "state": state, **{"d" + name: x for name, x in gradients.items()}}

  return jax.jit(run)


def compare(
  subject: Subject, actual: dict, wanted: dict, inputs: dict, dtype: str
) -> dict[str, Verdict]:
  """The verdict on every tensor that the oracle names."""
  terms = _terms(subject, wanted, inputs, dtype)
  return {
    name: judge(name, actual[name], reference, dtype, terms.get(name, 0.0))
    for name, reference in wanted.items()
  }


def _terms(subject, wanted, inputs, dtype) -> dict[str, float]:
  """The size of the terms that a tensor is a sum of, where they may cancel."""
  if not subject.query:
    return {}
  terms = np.abs(inputs[subject.query].astype(np.float64) * wanted["d" + subject.query])
  narrow = dtype == "bfloat16"
  size = np.sqrt(np.mean(terms**2)) if narrow else max(terms.max(), np.abs(wanted["state"]).max())
  found = {"d" + name: size * float(get(inputs)) for name, get in subject.factors.items()}
  if not narrow:
    found["dinitial_state"] = size
    if "beta" in inputs:  # what is written is what the state lacks
      found["state"] = max(float(np.abs(inputs[name]).max()) for name in ("v", "initial_state"))
  return found


def _is_complex(x):
  return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _weights(i, like):
  rng = np.random.default_rng([i, *like.shape])
  return jnp.asarray(rng.integers(-12, 13, size=like.shape) / 8, like.dtype)


def _segments(shape):
  return {"segment_ids": doctor_inputs.documents(shape.T)} if shape.packed else {}


def _precision(dtype):
  return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _can_run(subject, implementation, shape, dtype) -> bool:
  inputs = cast(subject.inputs(subject.families()[0], shape), dtype) | _segments(shape)
  with ops.dispatch.recorded() as calls:
    jax.eval_shape(lambda inputs: subject.op(**inputs)[0], inputs)
  op = getattr(ops, calls[0].op)
  return ops.dispatch.refusal(op, implementation, **calls[0].arguments) is None


def _oracle(subject, shape, inputs) -> list[dict[str, np.ndarray]]:
  """Of each family, in float64 on the CPU, which is exact and quick with small steps."""
  wide = lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
  with jax.enable_x64(True), jax.default_device(_cpu()):
    return _run_all(subject.oracle, jax.tree.map(wide, inputs), shape)


def _run_all(function, inputs, shape) -> list[dict[str, np.ndarray]]:
  """Values and gradients for each of `inputs`, by one program."""
  segments = _segments(shape)
  program = value_and_gradients(function).lower(inputs[0], segments).compile()
  return [jax.tree.map(np.asarray, program(arrays, segments)) for arrays in inputs]


def _cpu():
  """A CPU of this process; None, the default device, where JAX was told to use none."""
  allowed = jax.config.jax_platforms
  return jax.local_devices(backend="cpu")[0] if not allowed or "cpu" in allowed else None


def run(
  op: str = "", implementation: str = "", dtype: str = "", json: str = "", markdown: str = ""
) -> None:
  """Examines what is asked for, prints as it goes, and writes the table.

  Args:
    op, implementation, dtype: names with commas between; empty is all.
    json: a file for all cells, one object each.
    markdown: a file for the table.

  Raises:
    UserError: a name that does not exist, a file that cannot be written; or, with status 1,
      something failed.
  """
  names = _chosen("op", op, [subject.name for subject in SUBJECTS])
  implementations = _chosen("implementation", implementation, IMPLEMENTATIONS)
  # TPUs compute in no float64.
  possible = [name for name in DTYPES if name != "float64" or ops.dispatch.platform() != "tpu"]
  dtypes = _chosen("dtype", dtype, possible)
  check_writable("--json", json)
  check_writable("--markdown", markdown)
  began = time.perf_counter()
  print(f"{doctor_report.environment()}\n\n{doctor_report.HEAD}", flush=True)
  examinations = []
  for examination in _all(names, dtypes, implementations):
    print(doctor_report.line(examination), flush=True)
    examinations.append(examination)
  if not examinations:
    raise UserError("nothing to examine: no such implementation of these ops can run here")
  cells = [cell for examination in examinations for cell in examination.cells]
  failures = [cell for cell in cells if not cell.verdict.passed]
  for cell in failures:
    print(doctor_report.describe(cell))
  seconds = time.perf_counter() - began
  verdict = f"{len(cells) - len(failures)} of {len(cells)} comparisons pass, in {seconds:.0f} s"
  print(f"\n{verdict}")
  if json:
    doctor_report.write_json(cells, pathlib.Path(json))
  if markdown:
    pathlib.Path(markdown).write_text(doctor_report.markdown(examinations, verdict))
  if failures:
    raise UserError(f"{len(failures)} of {len(cells)} comparisons fail", status=1)


def _chosen(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
  chosen = [name for name in text.split(",") if name] or list(allowed)
  for name in chosen:
    if name not in allowed:
      raise UserError(f"--{flag} is {name!r}, must be of {', '.join(allowed)}")
  return chosen


def _all(names, dtypes, implementations) -> Iterator[Examination]:
  """In the order of the table. One after the other: on CPUs, jaxlib 0.10.2 hangs now and then where
  one thread compiles and another runs."""
  wanted = [
    (subject, dtype)
    for subject in SUBJECTS
    for dtype in dtypes
    if subject.name in names and not (subject.is_complex and dtype == "bfloat16")
  ]
  for case in wanted:
    yield from examine(*case, implementations)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line of this module; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.doctor", description="Checks every op on the device at hand."
  )
  parser.add_argument("--op", default="", help="names with commas between; default: all")
  parser.add_argument("--implementation", default="", help=", ".join(IMPLEMENTATIONS))
  parser.add_argument("--dtype", default="", help=", ".join(DTYPES))
  parser.add_argument("--json", default="", help="also write every comparison here")
  parser.add_argument("--markdown", default="", help="also write the table here")
  try:
    run(**vars(parser.parse_args(argv)))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.status
  return 0


if __name__ == "__main__":
  sys.exit(main())
