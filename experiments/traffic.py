"""How many bytes a compiled program moves between a device and its main memory, loops included.

An estimate from the program's text: an instruction reads each of its operands once and writes its
result once, as XLA's own cost analysis has it, but as often as the loops around it run. What lies
in a memory on the chip, and what a slice leaves of an array, counts nothing. Padding of layouts,
and what a kernel reads twice, are not seen.
"""

from experiments import hlo

# Values that name memory, rather than move it, and what is counted where it begins.
FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
  "replica-id", "iota", "optimization-barrier", "opt-barrier", "domain",
}  # fmt: skip
CALLS = {"call", "conditional", "async-start"}


def hbm_bytes(program: hlo.Program) -> float:
  """Bytes read and written by one device each time that the program runs."""
  return _computation(program, program.entry, {})


def _computation(program, computation, known) -> float:
  if computation.name not in known:
    known[computation.name] = sum(
      _instruction(program, computation, instruction, known)
      for instruction in computation.instructions.values()
    )
  return known[computation.name]


def _instruction(program, computation, instruction, known) -> float:
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith(("-done", "-update")):
    return 0.0
  if opcode == "while":
    trips = hlo.trip_count(program, computation, instruction)
    body = program.computations[instruction.attribute("body")]
    return (1 if trips is None else trips) * _computation(program, body, known)
  if opcode in CALLS:
    return sum(_computation(program, program.computations[n], known) for n in instruction.called)
  operands = [computation.instructions[name] for name in instruction.operands]
  if opcode.endswith("-start"):
    # Its value is a tuple of source, target and flags: the target is the operand's size.
    source = operands[0]
    target_in_hbm = instruction.hbm_bytes > source.hbm_bytes
    return source.hbm_bytes + (source.bytes if target_in_hbm else 0)
  if opcode == "fusion":
    inner = program.computations[instruction.attribute("calls")]
    parameters = {i.number: i for i in inner.instructions.values() if i.opcode == "parameter"}
    reads = sum(_read(inner, parameters[n], operand) for n, operand in enumerate(operands))
    return reads + _written(inner, inner.root, instruction)
  if opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * instruction.hbm_bytes
  if opcode == "dynamic-update-slice":
    return 2 * operands[1].hbm_bytes
  return sum(operand.hbm_bytes for operand in operands) + instruction.hbm_bytes


def _read(inner: hlo.Computation, parameter: hlo.Instruction, operand: hlo.Instruction) -> float:
  """Of an operand of a fusion, what is read."""
  if not operand.hbm_bytes:
    return 0.0
  total, values = 0.0, [parameter]
  while values:
    value = values.pop()
    for user in inner.instructions.values():
      if value.name not in user.operands:
        continue
      if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
        total += user.bytes
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
        continue
      elif user.opcode == "bitcast":
        values.append(user)
      else:
        return operand.hbm_bytes
  return min(total, operand.hbm_bytes)


def _written(inner: hlo.Computation, root: hlo.Instruction, fusion: hlo.Instruction) -> float:
  """Of the result of a fusion, what is written: not what an update in place leaves alone."""
  if not fusion.hbm_bytes:
    return 0.0
  roots = [inner.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
  left = 0.0
  for value in roots:
    while value.opcode == "bitcast":
      value = inner.instructions[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
      left += value.bytes - inner.instructions[value.operands[1]].bytes
  return max(0.0, fusion.hbm_bytes - left)
