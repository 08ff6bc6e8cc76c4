"""What a compiled program sends between its devices, read from its text.

  compiled = jax.jit(step).lower(...).compile()
  for kind, total in totals(collectives(compiled.as_text())).items():
    print(kind, total.count, total.bytes)

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable

from experiments import hlo

# What a device sends, in operands' bytes, as rings of P devices do it; as much as it receives.
RING = {
  "all-gather": lambda P: P - 1,
  "all-reduce": lambda P: 2 * (P - 1) / P,
  "reduce-scatter": lambda P: (P - 1) / P,
  "all-to-all": lambda P: (P - 1) / P,
  "ragged-all-to-all": lambda P: (P - 1) / P,
  "collective-broadcast": lambda P: 1,
  "collective-permute": lambda P: 1,
}
STARTED = {f"{kind}-start": kind for kind in RING}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction of a program, and how often it runs.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all,
      collective-broadcast or collective-permute, whether it is asynchronous or not.
    count: how often it runs each time that the program does.
    bytes: what a device that takes part sends each time it runs: of operands of n bytes among P
      devices, (P - 1) n for an all-gather, 2 (P - 1) / P n for an all-reduce, (P - 1) / P n for a
      reduce-scatter and an all-to-all, n for the others.
    group_size: P, the devices that take part together; of a permutation, those that send.
    pairs: of a permutation, (source, target) numbers of devices; a device without one sends
      nothing.
    link: "ici" within a slice of a TPU or a host, "dcn" between slices.
    endless: whether it is in a loop whose length the text does not tell; counted as run once.
    arrays: its operands: "bf16[4096,2048]".
    source: the operation of the user's program that it comes from, as JAX names it.
  """

  kind: str
  count: int
  bytes: float
  group_size: int
  pairs: tuple[tuple[int, int], ...]
  link: str
  endless: bool
  arrays: str
  source: str


@dataclasses.dataclass(frozen=True)
class Total:
  """Of all collectives of one kind: how many are run, and the bytes that the device which sends the
  most sends."""

  count: int
  bytes: float


def collectives(text: str) -> list[Collective]:
  """The collectives of an optimised program, in the order in which they are met.

  Args:
    text: of the program, after XLA's passes: `compiled.as_text()`.

  Returns:
    One record for each instruction, those of a loop with the trips of all loops around them
    multiplied into `count`. Both branches of a condition count. What sends nothing, a collective of
    one device, is left out.
  """
  return collectives_of(hlo.parse(text))


def collectives_of(program: hlo.Program) -> list[Collective]:
  """As `collectives`, of a text that has been read."""
  found: Counter[Collective] = Counter()
  _visit(program, program.entry, 1, False, set(), found)
  return [dataclasses.replace(record, count=count) for record, count in found.items()]


def totals(records: Iterable[Collective], link: str | None = None) -> dict[str, Total]:
  """By kind, how many collectives run and the bytes sent by the device that sends the most.

  Args:
    records: from `collectives`.
    link: counts only those over "ici" or "dcn"; None counts all.
  """
  records = [record for record in records if link in (None, record.link)]
  kinds = dict.fromkeys(record.kind for record in records)
  return {kind: _total([r for r in records if r.kind == kind]) for kind in sorted(kinds)}


def _total(records: list[Collective]) -> Total:
  # Devices may send in different permutations: no one sends as much as all of these together.
  by_device: Counter[int] = Counter()
  everyone = 0.0
  for record in records:
    if record.pairs:
      for source, _ in record.pairs:
        by_device[source] += record.count * record.bytes
    else:
      everyone += record.count * record.bytes
  return Total(sum(r.count for r in records), everyone + max(by_device.values(), default=0))


def _visit(program, computation, count, endless, chains, found):
  """Adds the collectives of a computation that runs `count` times, and of those that it calls."""
  for instruction in computation.instructions.values():
    record = _collective(program, computation, instruction, endless)
    # A gather that XLA spreads over several fusions is written down in each, with the same channel.
    chain = instruction.chain
    if record and not (chain and chain in chains):
      found[record] += count
      chains.add(chain)
    if instruction.opcode == "while":
      trips = hlo.trip_count(program, computation, instruction)
      inner = (count * (1 if trips is None else trips), endless or trips is None, set())
      for name in (instruction.attribute("body"), instruction.attribute("condition")):
        _visit(program, program.computations[name], *inner, found)
    elif not record and instruction.opcode not in ("async-done", "async-update"):
      for name in instruction.called:
        _visit(program, program.computations[name], count, endless, chains, found)


def _collective(program, computation, instruction, endless) -> Collective | None:
  """The record of an instruction, to be counted once; None for one that sends nothing."""
  kind, link, pairs = STARTED.get(instruction.opcode, instruction.opcode), "ici", ()
  operands = [computation.instructions[name] for name in instruction.operands]
  if kind == "send" and instruction.slices:
    # Between the slices of a TPU: the operand's copy in the host's memory is sent on from there.
    kind, link, group_size = instruction.transfer, "dcn", len(instruction.slices)
    operands = operands[:1]
  elif kind not in RING:
    return None
  elif kind == "collective-permute":
    pairs = tuple((a, b) for a, b in instruction.pairs if a != b)
    group_size = len(pairs)
  else:
    group_size = instruction.group_size or program.devices
    # A fusion of a TPU in which each device keeps its slice of the sum.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
  if kind not in RING or group_size < (1 if kind == "collective-permute" else 2):
    return None
  size = sum(operand.bytes for operand in operands)
  return Collective(
    kind=kind,
    count=1,
    bytes=size * RING[kind](group_size),
    group_size=group_size,
    pairs=pairs,
    link=link,
    endless=endless,
    arrays=", ".join(operand.shape for operand in operands),
    source=instruction.source,
  )
