"""Thread programs: what each of a warpgroup's 128 threads does with numbers in shared memory.

Recurrences along time are sequential, one thread per channel, for which Pallas's arrays have no
words. A program is a Python function `program(threads, *memories)` written once and run twice: on a
GPU it emits instructions, in the interpreter a number is an array with one element per thread, and
the program is proven there. Loops in Python are unrolled. It needs jax 0.11: import it inside
functions only.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ops.kernels.gpu import mosaic
from ops.kernels.gpu.threads_simulated import THREADS, Simulated, SimulatedMemory

# The programs order their accesses to shared memory themselves.
PARAMS = dataclasses.replace(mosaic.PARAMS, unsafe_no_auto_barriers=True)


def run_threads(program: Callable, *refs, flag=None, simulated: bool):
  """Runs `program(threads, *memories)`, `memories` being `refs` in shared memory.

  Args:
    program: the same for every thread; `threads.index` tells them apart.
    refs: bfloat16, float32 or int32, without transforms.
    flag: an int32 that all threads see as `threads.flag`.
    simulated: in the interpreter, which knows no instructions.
  """
  flag = jnp.int32(0) if flag is None else flag
  if simulated:
    memories = [SimulatedMemory(ref[...]) for ref in refs]
    program(Simulated(memories, flag), *memories)
    for ref, memory in zip(refs, memories):
      if memory.is_written:
        ref[...] = memory.array
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)))
  def emit(_, flag, *refs):
    program(Threads(Number(flag.registers.item())), *[Memory(ref) for ref in refs])

  emit(flag, *refs)


class Number:
  """A float32, int32 or truth value of each thread, with the operators of one."""

  def __init__(self, value: ir.Value):
    self.value = value

  def _with(self, other, of_floats, of_integers):
    other = _value(other, self.value.type)
    is_float = isinstance(self.value.type, ir.F32Type)
    return Number((of_floats if is_float else of_integers)(self.value, other))

  def __add__(self, other):
    return self._with(other, arith.addf, arith.addi)

  def __sub__(self, other):
    return self._with(other, arith.subf, arith.subi)

  def __mul__(self, other):
    return self._with(other, arith.mulf, arith.muli)

  def __floordiv__(self, other):
    return Number(arith.divui(self.value, _value(other, self.value.type)))

  def __mod__(self, other):
    return Number(arith.remui(self.value, _value(other, self.value.type)))

  def __and__(self, other):
    return Number(arith.andi(self.value, other.value))

  def __eq__(self, other):
    return self._with(
      other,
      lambda x, y: arith.cmpf(arith.CmpFPredicate.OEQ, x, y),
      lambda x, y: arith.cmpi(arith.CmpIPredicate.eq, x, y),
    )

  __radd__, __rmul__, __hash__ = __add__, __mul__, None


def _value(x, kind: ir.Type) -> ir.Value:
  if isinstance(x, Number):
    return x.value
  return utils.c(float(x) if isinstance(kind, ir.F32Type) else int(x), kind)


def _assembly(kind: ir.Type, operands: Sequence[ir.Value], text: str, constraints: str):
  return llvm.inline_asm(kind, list(operands), text, constraints)


def _pair(numbers: Sequence[Number], swapped: Number) -> list[Number]:
  pick = lambda x, y: Number(arith.select(swapped.value, x.value, y.value))
  return [pick(*reversed(numbers)), pick(*numbers)]


class Memory:
  """A place in an array in shared memory."""

  def __init__(self, ref=None, pointer=None, kind=None):
    self.pointer = utils.memref_ptr(ref) if pointer is None else pointer
    self.kind = ir.MemRefType(ref.type).element_type if kind is None else kind

  def at(self, index) -> "Memory":
    """The place so many elements further on."""
    index = index.value if isinstance(index, Number) else int(index)
    pointer = utils.getelementptr(self.pointer, [index], self.kind)
    return Memory(pointer=pointer, kind=self.kind)

  def load(self, offset: int = 0, count: int = 1) -> list[Number]:
    """`count` elements, loaded together, as float32 or int32; `offset` is a multiple of `count`."""
    pointer = self.at(offset).pointer
    integer = ir.IntegerType.get_signless(32)
    if isinstance(self.kind, ir.BF16Type):
      words = self._vector(pointer, integer, count // 2)
      halves = []
      for word in words:
        low = arith.shli(word, utils.c(16, integer))
        high = arith.andi(word, utils.c(-65536, integer))
        halves += [arith.bitcast(ir.F32Type.get(), half) for half in (low, high)]
      return [Number(half) for half in halves]
    return [Number(x) for x in self._vector(pointer, self.kind, count)]

  def load_pair(self, swapped: Number, offset: int = 0) -> list[Number]:
    """`load` of two, the second one first in the threads `swapped`."""
    if not isinstance(self.kind, ir.BF16Type):
      return _pair(self.load(offset, 2), swapped)
    integer = ir.IntegerType.get_signless(32)
    (word,), zero = self._vector(self.at(offset).pointer, integer, 1), utils.c(0, integer)
    # Which bytes of the word and zero make a float32 of one half.
    selectors = [Number(utils.c(bytes_, integer)) for bytes_ in (0x1044, 0x3244)]
    halves = [
      _assembly(integer, (word, zero, selector.value), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
      for selector in _pair(selectors, swapped)
    ]
    return [Number(arith.bitcast(ir.F32Type.get(), half)) for half in halves]

  def store_pair(self, numbers: Sequence[Number], swapped: Number, offset: int = 0):
    """`store` of two, as `load_pair` gave them."""
    self.store(_pair(numbers, swapped), offset)

  @staticmethod
  def _vector(pointer, kind, count):
    if count == 1:
      return [llvm.load(kind, pointer)]
    vector = llvm.load(ir.VectorType.get((count,), kind), pointer)
    place = lambda n: utils.c(n, ir.IntegerType.get_signless(32))
    return [llvm.extractelement(vector, place(n)) for n in range(count)]

  def store(self, numbers: Sequence[Number], offset: int = 0, where: Number | None = None):
    """Stores float32 numbers together, rounded to the array's dtype, in the threads `where`."""
    if where is not None:
      with utils.when(where.value):
        return self.store(numbers, offset)
    pointer = self.at(offset).pointer
    values = [number.value for number in numbers]
    kind = self.kind
    if isinstance(kind, ir.BF16Type):
      if len(values) == 1:
        return llvm.store(arith.truncf(kind, values[0]), pointer)
      kind = ir.IntegerType.get_signless(32)
      pairs = zip(values[1::2], values[::2])
      values = [_assembly(kind, p, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f") for p in pairs]
    if len(values) == 1:
      return llvm.store(values[0], pointer)
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), kind))
    for n, value in enumerate(values):
      place = utils.c(n, ir.IntegerType.get_signless(32))
      vector = llvm.insertelement(vector, value, place)
    return llvm.store(vector, pointer)


class Threads:
  """What a thread can do besides arithmetic, on a GPU."""

  def __init__(self, flag: Number):
    self.flag = flag
    self.index = Number(
      arith.remui(utils.thread_idx(), utils.c(THREADS, ir.IntegerType.get_signless(32)))
    )

  def constant(self, x: float) -> Number:
    return Number(utils.c(float(x), ir.F32Type.get()))

  def multiply_add(self, x: Number, y: Number, z: Number) -> Number:
    """x y + z, rounded once."""
    operands = (x.value, y.value, z.value)
    return Number(llvm.intr_fma(*operands))

  def exp2(self, x: Number) -> Number:
    kind = ir.F32Type.get()
    return Number(_assembly(kind, (x.value,), "ex2.approx.ftz.f32 $0, $1;", "=f,f"))

  def where(self, condition: Number, x, y) -> Number:
    kind = next(z.value.type for z in (x, y) if isinstance(z, Number))
    return Number(arith.select(condition.value, _value(x, kind), _value(y, kind)))

  def exchange(self, x: Number, distance: int) -> Number:
    """The number of the thread whose index differs in the bit `distance`, below 32."""
    return Number(utils.shfl_bfly(x.value, distance))

  def product(self, left, right, total) -> list[Number]:
    """total + left @ right of a warp, on the tensor cores: [16 8] + [16 8] @ [8 8].

    Of `left` and `right` only the first 10 bits after the point count. The lane 4 g + q has of
    `left` the places (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4), of `right` (q, g), (q + 4, g),
    of `total` (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).
    """
    integer, kind = ir.IntegerType.get_signless(32), ir.F32Type.get()
    operands = [arith.bitcast(integer, x.value) for x in (*left, *right)]
    operands += [x.value for x in total]
    results = llvm.inline_asm(
      ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"), operands,
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
      "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )  # fmt: skip
    place = lambda n: ir.DenseI64ArrayAttr.get([n])
    return [Number(llvm.extractvalue(kind, results, place(n))) for n in range(4)]

  def short(self, x: Number) -> Number:
    """x without the bits that `product` does not see."""
    integer = ir.IntegerType.get_signless(32)
    bits = arith.andi(arith.bitcast(integer, x.value), utils.c(-(2**13), integer))
    return Number(arith.bitcast(ir.F32Type.get(), bits))

  def wait_for_all(self):
    """Until all threads are here, and see what the others stored."""
    utils.warpgroup_barrier()

  def wait_for_warp(self):
    """`wait_for_all`, of this warp's threads."""
    utils.warp_barrier()

  def loop(self, steps: int, body: Callable, numbers: Sequence[Number]) -> list[Number]:
    """`numbers = body(step, numbers)` for so many steps, not unrolled."""
    bound = utils.c(steps, ir.IntegerType.get_signless(32))

    @utils.fori(bound, [number.value for number in numbers])
    def result(step, values):
      return [x.value for x in body(Number(step), [Number(value) for value in values])]

    return [Number(value) for value in result.results]
