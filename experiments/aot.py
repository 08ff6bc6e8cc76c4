"""`--mode=aot`: the training step compiled for devices that need not be here, and what it takes.

The step is the one that `--mode=train` runs, lowered from shapes alone; libtpu compiles it for TPUs
on any machine. What cannot be had so is time: it is estimated from below by what the chip's data
sheet allows for the operations, the bytes of main memory and the bytes between chips.
"""

import dataclasses
import pathlib
import re
import tempfile
import time

import jax

from experiments import aot_memory, aot_report, errors, hlo, sharding, topologies, train_step
from experiments.errors import UserError
from experiments.tasks import make_task
from ops import dispatch

COMPILATIONS = 6  # at most, to find the largest batch


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A step that was compiled, or of which is known why not.

  Attributes:
    fits: whether each device has the memory that it takes.
    memory: what it takes; None where that is not known.
    needed_bytes: of each device's memory.
    program: its text, read.
    program_bytes: the size of the code, 0 where it does not fit.
    seconds: to lower and compile it.
  """

  fits: bool
  memory: aot_memory.Memory | None
  needed_bytes: float
  program: hlo.Program | None
  program_bytes: int
  seconds: float


def report(config, workdir: str, topology: str = "", json: str = "", largest_batch: str = ""):
  """Prints what the training step takes on the devices of `topology`, and writes aot.json.

  Args:
    config: the experiment.
    workdir: the run's directory.
    topology: as `topologies.parse` reads it.
    json: the file to write; by default aot.json in the run's directory.
    largest_batch: "true" searches for it.

  Raises:
    UserError: a topology, mesh or batch that cannot be; with status 1 a step that does not fit.
  """
  wanted = topologies.parse(topology)
  errors.check_writable("--json", json)
  if largest_batch == "true" and wanted.kind == "cpu":
    raise UserError(f"--largest_batch needs a TPU: how much memory {wanted} has is not known")
  mesh = _mesh(config, wanted)
  print(f"compiling the training step for {wanted}, which can take minutes", flush=True)
  compiled = compile_step(config, mesh, wanted)
  facts = aot_report.facts(config, wanted, mesh, compiled)
  print(*aot_report.lines(facts), sep="\n", flush=True)
  if largest_batch == "true":
    facts["largest_batch"] = find_largest_batch(config, mesh, wanted, compiled)
    print(aot_report.largest_batch_line(facts), flush=True)
  path = pathlib.Path(json or pathlib.Path(workdir) / "aot.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  aot_report.write(facts, path)
  print(f"wrote {path}")
  if not compiled.fits:
    raise UserError(aot_report.at_fault(facts), status=1)


def _mesh(config, topology: topologies.Topology) -> jax.sharding.Mesh:
  """The mesh of all devices of the topology, over which the batch must be spread evenly."""
  devices = topologies.devices_of(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  if mesh.size != len(devices):
    sizes = dict(mesh.shape)
    raise UserError(
      f"mesh is {sizes}, which fills {mesh.size} of the {len(devices)} devices of {topology}: set"
      " one of its axes to -1, as in --config.mesh.data=-1"
    )
  arrays = make_task(config).arrays
  rows = config.train.batch_size
  try:
    sharding.check_rows(mesh, arrays, "train.batch_size", rows, config.train.accumulate)
  except UserError as error:
    unit = batch_unit(config, mesh)
    fitting = max(unit, rows // unit * unit)
    raise UserError(f"{error}; set --config.train.batch_size={fitting}") from None
  return mesh


def batch_unit(config, mesh: jax.sharding.Mesh) -> int:
  """What the rows of a batch must be a multiple of."""
  unit = config.train.accumulate
  for axis in sharding.rows_over(make_task(config).arrays):
    unit *= mesh.shape[axis]
  return unit


def compile_step(config, mesh: jax.sharding.Mesh, topology: topologies.Topology) -> Compiled:
  """Compiles the training step of a config for the devices of a mesh.

  Raises:
    UserError: what the config asks for cannot be placed on the mesh, or XLA cannot compile it.
  """
  began = time.perf_counter()
  on_tpu = topology.kind != "cpu"
  with (
    jax.set_mesh(mesh),
    dispatch.for_platform("tpu" if on_tpu else "cpu"),
    tempfile.TemporaryDirectory() as scratch,
  ):
    directory = pathlib.Path(scratch)
    lowered = train_step.lower_step(config, mesh)
    try:
      # A compiler of CPUs dumps every kernel, in thousands of files, and says less.
      compiled = lowered.compile(compiler_options={"xla_dump_to": scratch} if on_tpu else {})
    except jax.errors.JaxRuntimeError as error:
      needed = needed_bytes(str(error))
      if needed is None:
        said = " ".join(str(error).split())[:400]
        raise UserError(f"XLA cannot compile the step for {topology}: {said}", status=1) from None
      program = _dumped_program(directory)
      memory = program and aot_memory.of_dump(directory, program)
      needed = memory.bytes if memory and needed == float("inf") else needed
      return Compiled(False, memory, needed, program, 0, time.perf_counter() - began)
    analysis = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    memory = aot_memory.of_dump(directory, program) if on_tpu else None
  memory = memory or aot_memory.of_program(program, analysis.temp_size_in_bytes)
  code = analysis.generated_code_size_in_bytes
  return Compiled(True, memory, memory.bytes + code, program, code, time.perf_counter() - began)


def find_largest_batch(config, mesh, topology: topologies.Topology, compiled: Compiled) -> dict:
  """The most rows with which the step still fits, by few compilations.

  Memory grows in proportion to rows, nearly: each guess is where the line through two compilations
  meets the memory that there is.

  Returns:
    `rows`, the most that fit, 0 where none do; `too_many`, the least that did not, None where none
    was found; and `compilations`.
  """
  limit = aot_report.memory_limit(topology)
  unit = batch_unit(config, mesh)
  known = {config.train.batch_size // unit: compiled}
  while len(known) < COMPILATIONS:
    guess = next_guess({n: (c.fits, c.needed_bytes) for n, c in known.items()}, limit)
    if guess is None:
      break
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.train.batch_size = guess * unit
    known[guess] = compile_step(changed.lock(), mesh, topology)
    said = "fit" if known[guess].fits else "do not fit"
    print(f"  {guess * unit} rows {said}", flush=True)
  fitting = [n for n, c in known.items() if c.fits]
  others = [n for n, c in known.items() if not c.fits]
  return {
    "rows": max(fitting, default=0) * unit,
    "too_many": min(others) * unit if others else None,
    "compilations": len(known),
  }


def next_guess(known: dict[int, tuple[bool, float]], limit: float) -> int | None:
  """The multiple to try next; None where the largest that fits is known.

  Args:
    known: whether it fits, and bytes needed, by multiple.
    limit: bytes that there are.
  """
  low = max((n for n, (fits, _) in known.items() if fits), default=0)
  high = min((n for n, (fits, _) in known.items() if not fits), default=None)
  if high is not None and high - low <= 1:
    return None
  if len(known) == 1:
    return 2 * low if low else max(1, high // 2)
  # What does not fit may need more than is said of it: XLA recomputes arrays while that helps.
  fitting = sorted(n for n, (fits, _) in known.items() if fits)[-2:]
  closest = sorted(known, key=lambda n: abs(known[n][1] - limit))[:2]
  one, other = fitting if len(fitting) == 2 else closest
  slope = (known[other][1] - known[one][1]) / (other - one)
  guess = int(one + (limit - known[one][1]) / slope) if slope > 0 else 2 * low
  if high is not None and guess >= high:
    return (low + high) // 2
  return max(low + 1, min(guess, 64 * max(low, 1)))


def needed_bytes(message: str) -> float | None:
  """Bytes that XLA says the program needs, where it says that there are not as many."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", message)
  return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else float("inf")


def _dumped_program(directory: pathlib.Path) -> hlo.Program | None:
  files = sorted(directory.glob("*.after_optimizations.txt"))
  return hlo.parse(files[-1].read_text()) if files else None
