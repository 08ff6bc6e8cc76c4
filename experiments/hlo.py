"""The text of a program that XLA has optimised: computations, instructions, the trips of loops.

Only what is asked of it elsewhere; the grammar is that of `HloModule::ToString`.
"""

import dataclasses
import functools
import math
import re

# %name = shape opcode(operands), attributes. Shapes hold no lower-case word before a parenthesis.
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: `%name = shape opcode(operands), attributes`."""

  name: str
  written_shape: str  # with its layout: "f32[8,16]{1,0:T(8,128)S(1)}"
  opcode: str
  rest: str  # behind the opening parenthesis of the operands

  @functools.cached_property
  def shape(self) -> str:
    """Without layouts: "f32[8,16]"; of a tuple "(f32[8], s32[])"."""
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", self.written_shape)

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions whose values it takes."""
    return tuple(re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0]))

  @functools.cached_property
  def bytes(self) -> int:
    """Size of its value, without padding of layouts."""
    return sum(size for size, _ in self._arrays)

  @functools.cached_property
  def hbm_bytes(self) -> int:
    """Size of what of its value lies in the device's main memory, not in a memory on the chip."""
    return sum(size for size, layout in self._arrays if "S(" not in layout)

  @functools.cached_property
  def _arrays(self) -> list[tuple[int, str]]:
    """Bytes and layout of each array of its value."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", self.written_shape)
    return [
      (math.prod(int(size) for size in sizes.split(",") if size) * _item_bits(kind) // 8, layout)
      for kind, sizes, layout in found
    ]

  @property
  def number(self) -> int | None:
    """Of a parameter, which one it is."""
    return int(self.rest.partition(")")[0]) if self.opcode == "parameter" else None

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    listed = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
    return (*CALLED.findall(self.rest), *listed)

  @property
  def source(self) -> str:
    """JAX's name of the operation that it comes from, or nothing."""
    return (self._find(r'op_name="([^"]*)"') or "").replace("\\'", "'")

  @property
  def chain(self) -> tuple[str, str, str] | None:
    """What instructions have in common that are together one collective on a TPU."""
    chain_id = self._find(r'chain_id="(\w+)"')
    return chain_id and (self.opcode, chain_id, self._find(r"channel_id=(\d+)"))

  @property
  def group_size(self) -> int | None:
    """How many devices take part in a collective together; None where all do."""
    groups = self._find(r"replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)") or ""
    if groups.startswith("{{"):
      return groups[2:].partition("}")[0].count(",") + 1
    if groups.startswith("["):  # [groups,devices]<=[...]
      return int(re.match(r"\[(?:\d+,)*(\d+)\]", groups)[1])
    if groups.startswith("mesh["):  # mesh['a'=2,'b'=4] {'b'}; part of an axis: {'b':(1)2}
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
      axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups.rpartition("{")[2])
      return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return None

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """(source, target) of a permutation."""
    listed = self._find(r"source_target_pairs=\{(.*?)\}(?:, [a-z_]+=|$)") or ""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed)]

  @property
  def transfer(self) -> str:
    """Of what is sent to other slices of a TPU, the kind of collective; else nothing."""
    kind = self._find(r'_xla_megascale_transfer_type="(\w+)"') or ""
    kind = kind.lower().replace("_", "-")
    return {"one-to-one": "collective-permute"}.get(kind, kind)

  @property
  def slices(self) -> list[int]:
    """The slices of a TPU that take part in what is sent between them."""
    listed = self._find(r'_xla_megascale_target="\{([\d,:]*)\}') or ""
    found = []
    for part in filter(None, listed.split(",")):
      first, _, last = part.partition(":")
      found += range(int(first), int(last or first) + 1)
    return found

  def attribute(self, name: str) -> str:
    """The computation that an attribute names."""
    return self._find(rf"\b{name}=%([\w.\-]+)")

  def _find(self, pattern: str) -> str | None:
    match = re.search(pattern, self.rest)
    return match and match[1]


@dataclasses.dataclass
class Computation:
  """A function of a program: its instructions by name, and the one whose value it returns."""

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root: Instruction | None = None


@dataclasses.dataclass
class Program:
  """All computations of a program by name, the first one to run, and for how many devices it is."""

  computations: dict[str, Computation]
  entry: Computation
  devices: int


def parse(text: str) -> Program:
  """Reads the text of an optimised program, `compiled.as_text()`.

  Raises:
    ValueError: a text without an entry computation.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is not None and (match := INSTRUCTION.match(line)):
      root, name, shape, opcode, rest = match.groups()
      instruction = current.instructions[name] = Instruction(name, shape, opcode, rest)
      current.root = instruction if root else current.root
    elif match := COMPUTATION.match(line):
      current = computations[match[2]] = Computation(match[2])
      entry = current if match[1] else entry
  if entry is None:
    raise ValueError("text holds no ENTRY computation; expected that of compiled.as_text()")
  header = text.partition("\n")[0]
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  return Program(computations, entry, math.prod(map(int, counts)))


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
  """How often the body of a `while` instruction of `computation` runs; None where it is not told.

  XLA writes it down where it knows it, but not on every device; else a counter is looked for that
  the condition compares with a constant.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if known:
    return int(known[1])
  condition = program.computations[loop.attribute("condition")]
  compared = _comparison(program, condition)
  if compared is None:
    return None
  counter, limit = (_scalar(condition, name) for name in compared)
  before = computation.instructions[loop.operands[0]]
  start = lambda element: _scalar(computation, before.operands[element])
  if isinstance(limit, tuple) and before.opcode == "tuple":
    limit = start(limit[0])
  if not isinstance(counter, tuple) or not isinstance(limit, int) or before.opcode != "tuple":
    return None
  first = start(counter[0])
  step = _increment(program, program.computations[loop.attribute("body")], counter[0])
  if not isinstance(first, int) or not step:
    return None
  return max(0, math.ceil((limit - first) / step))


def _comparison(program: Program, condition: Computation) -> list[str] | None:
  """Names, in the condition, of the two values of which the first has to be less."""
  root = condition.root
  if root.opcode == "fusion":
    inner = program.computations[root.attribute("calls")]
    test = inner.root
    parameters = [_parameter(inner, name) for name in test.operands]
    if None in parameters:
      return None
    names = [root.operands[number] for number in parameters]
  else:
    test, names = root, root.operands
  return list(names) if test.opcode == "compare" and "direction=LT" in test.rest else None


def _parameter(computation: Computation, name: str) -> int | None:
  return computation.instructions[name].number


def _scalar(computation: Computation, name: str) -> int | tuple[int] | None:
  """The value of a constant, or as (number,) the element of the computation's argument that a value
  is; None for anything else."""
  instruction = computation.instructions[name]
  while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    instruction = computation.instructions[instruction.operands[0]]
  if instruction.opcode == "constant":
    match = re.match(r"(-?\d+)\)", instruction.rest)
    return int(match[1]) if match else None
  if instruction.opcode == "get-tuple-element":
    whole = computation.instructions[instruction.operands[0]]
    if whole.opcode == "parameter":
      return (int(instruction._find(r"\bindex=(\d+)")),)
    if whole.opcode == "tuple":
      return _scalar(computation, whole.operands[int(instruction._find(r"\bindex=(\d+)"))])
  return None


def _increment(program: Program, body: Computation, element: int) -> int | None:
  """By how much the body raises an element of its argument; None where it is something else."""
  if body.root.opcode != "tuple":
    return None
  instruction = body.instructions[body.root.operands[element]]
  while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
    instruction = body.instructions[instruction.operands[0]]
  values = [_scalar(body, name) for name in instruction.operands]
  sum_ = instruction
  if instruction.opcode == "fusion":
    inner = program.computations[instruction.attribute("calls")]
    sum_ = inner.root
    numbers = [_parameter(inner, name) for name in sum_.operands]
    values = [
      _scalar(inner, name) if number is None else values[number]
      for name, number in zip(sum_.operands, numbers)
    ]
  if sum_.opcode != "add" or (element,) not in values:
    return None
  values.remove((element,))
  return values[0] if isinstance(values[0], int) else None


def _item_bits(kind: str) -> int:
  """Of a type's name, as bf16, s32, f8e4m3fn or c64; a token has no size."""
  match = re.match(r"[a-z]+(\d+)", kind)
  return 8 if kind == "pred" else int(match[1]) if match else 0
