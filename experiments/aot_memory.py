"""What lies in the memory of one device while a compiled step runs, part by part.

XLA writes down which buffers it has assigned, for a TPU even of a program that does not fit.
"""

import dataclasses
import pathlib
import re

from experiments import hlo

# What the arguments of a step are, by the beginnings of their names.
PARTS = {
  "state.params": "parameters",
  "state.optimizer": "optimizer state",
  "state.average": "averaged parameters",
  "state.carry": "carried state",
  "batch": "batch",
}
TEMPORARIES = "temporaries"
# Of the names of operations, what loops and transformations have added.
WRAPPERS = {
  "while",
  "body",
  "cond",
  "closed_call",
  "checkpoint",
  "rematted_computation",
  "shard_map",
}


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array in the memory of a device.

  Attributes:
    part: what it is of: one of PARTS, "counters", or temporaries.
    name: of a parameter its path, of a temporary the operation that makes it.
    shape: on one device: "f32[48,2048,8192]".
    bytes: with the padding of its layout, where that is known.
  """

  part: str
  name: str
  shape: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
  """The memory that a step takes on each device.

  Attributes:
    parts: bytes by part, the largest that are in use at a time.
    largest: the largest arrays, in descending order; of temporaries such as are never in the same
      place.
  """

  parts: dict[str, int]
  largest: list[Buffer]

  @property
  def bytes(self) -> int:
    """All parts together: what the device must have."""
    return sum(self.parts.values())


def of_dump(directory: pathlib.Path, program: hlo.Program) -> Memory | None:
  """Memory from what XLA has dumped of its assignment of buffers; None where it has not.

  Args:
    directory: that `xla_dump_to` named when the program was compiled.
    program: the program that is there too.
  """
  files = sorted(directory.glob("*.after_optimizations-buffer-assignment.txt"))
  if not files:
    return None
  arguments = {i.number: i for i in program.entry.instructions.values() if i.number is not None}
  sources = {
    name: instruction.source
    for computation in program.computations.values()
    for name, instruction in computation.instructions.items()
  }
  buffers, parts = [], dict.fromkeys([*PARTS.values(), "counters", TEMPORARIES], 0)
  for size, number, values in _allocations(files[-1].read_text()):
    if number is None:
      parts[TEMPORARIES] += size
      buffers += _apart(values, sources)
    else:
      buffer = _argument(arguments[number], size)
      parts[buffer.part] += size
      buffers.append(buffer)
  return Memory(_present(parts), _largest(buffers))


def of_program(program: hlo.Program, temporary_bytes: int) -> Memory:
  """Memory from a program's text: exact but for padding, and without the places of temporaries.

  Args:
    program: whose largest values count as the largest temporaries.
    temporary_bytes: all temporaries together, as XLA says.
  """
  buffers = [
    _argument(instruction, instruction.bytes)
    for instruction in program.entry.instructions.values()
    if instruction.number is not None
  ]
  parts = dict.fromkeys([*PARTS.values(), "counters"], 0)
  for buffer in buffers:
    parts[buffer.part] += buffer.bytes
  inner = {name for c in program.computations.values() for name in _inside_fusions(c)}
  values = {
    (i.shape, i.source): Buffer(TEMPORARIES, readable(i.source) or i.name, i.shape, i.bytes)
    for computation in program.computations.values()
    if computation.name not in inner
    for i in computation.instructions.values()
    if i.opcode not in ("parameter", "get-tuple-element", "bitcast") and "(" not in i.shape
  }
  buffers += [value for value in values.values() if value.bytes <= temporary_bytes]
  return Memory(_present({**parts, TEMPORARIES: temporary_bytes}), _largest(buffers))


def readable(name: str) -> str:
  """A name that JAX has given, without what says nothing to a person.

  `state.params['blocks']['norm']` becomes `params/blocks/norm`, and
  `jit(_step)/transpose(jvp(Model.nats))/while/body/blocks/exp` becomes `Model.nats/blocks/exp,
  backward`.
  """
  if name.startswith(("state.", "batch")):
    return re.sub(r"\['?|\.", "/", name.removeprefix("state.")).replace("']", "").replace("]", "")
  parts = re.sub(r"\bjit\([^/]*\)(/|$)|\b(transpose|jvp|vmap)\(|\)", "", name).split("/")
  kept = [part for part in parts if part and part not in WRAPPERS]
  return "/".join(kept[-5:]) + (", backward" if "transpose(" in name else "")


def _allocations(text: str):
  """(bytes, number of the argument or None, values as (name, bytes, offset, shape)) of all
  allocations in main memory."""
  for block in re.split(r"^allocation \d+: ", text, flags=re.MULTILINE)[1:]:
    head, _, rest = block.partition("\n")
    if "color" in head:  # memories on the chip
      continue
    number = re.search(r"parameter (\d+)", head)
    values = re.findall(r"value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): (\S+)", rest)
    yield (
      int(re.match(r"size (\d+)", head)[1]),
      number and int(number[1]),
      [(name, int(size), int(offset), shape) for name, size, offset, shape in values],
    )


def _argument(instruction: hlo.Instruction, size: int) -> Buffer:
  part = next((p for start, p in PARTS.items() if instruction.source.startswith(start)), "counters")
  return Buffer(part, readable(instruction.source), instruction.shape, size)


def _apart(values, sources) -> list[Buffer]:
  """The largest values of an allocation of which no two share a place, those of 1 MiB at least."""
  chosen: list[tuple[int, int, Buffer]] = []
  for name, size, offset, shape in sorted(values, key=lambda value: -value[1]):
    if size < 2**20 or len(chosen) == 16:
      break
    if all(offset + size <= start or end <= offset for start, end, _ in chosen):
      name = name.partition("{")[0]
      made_by = readable(sources.get(name, "")) or name
      shape = re.sub(r"\{.*", "", shape)
      chosen.append((offset, offset + size, Buffer(TEMPORARIES, made_by, shape, size)))
  return [buffer for _, _, buffer in chosen]


def _inside_fusions(computation: hlo.Computation) -> set[str]:
  return {
    name
    for instruction in computation.instructions.values()
    if instruction.opcode not in ("while", "call", "conditional")
    for name in instruction.called
  }


def _largest(buffers: list[Buffer]) -> list[Buffer]:
  """Eight of what a step is given, and eight temporaries."""
  ordered = sorted(buffers, key=lambda buffer: -buffer.bytes)
  given = [buffer for buffer in ordered if buffer.part != TEMPORARIES][:8]
  temporary = [buffer for buffer in ordered if buffer.part == TEMPORARIES][:8]
  return sorted(given + temporary, key=lambda buffer: -buffer.bytes)


def _present(parts: dict[str, int]) -> dict[str, int]:
  return {name: size for name, size in parts.items() if size}
