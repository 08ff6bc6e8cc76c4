"""Thread programs in the interpreter: a number is an array with one element per thread; see
`threads.py`, which says what the methods do.
"""

import jax
import jax.numpy as jnp
from jax import lax

THREADS = 128  # a warpgroup


class SimulatedMemory:
  """`Memory` for the interpreter; the places in one array share it.

  Nothing is beyond an array: loading there gives NaN, storing there makes all of the array NaN.
  """

  def __init__(self, array: jax.Array):
    self.root, self.start = self, 0
    self.shape, self.flat, self.is_written = array.shape, array.reshape(-1), False

  @property
  def array(self) -> jax.Array:
    return self.flat.reshape(self.shape)

  def at(self, index) -> "SimulatedMemory":
    place = object.__new__(SimulatedMemory)
    place.root, place.start = self.root, self.start + index
    return place

  def load(self, offset=0, count=1):
    flat = self.root.flat
    wide = flat.dtype if jnp.issubdtype(flat.dtype, jnp.integer) else jnp.float32
    indices = [self._inside(self.start + (offset + n)) for n in range(count)]
    return [flat.at[index].get(mode="fill").astype(wide) for index in indices]

  def _inside(self, index):
    """The index, or the first one beyond the array for those that are not in it."""
    return jnp.where((index >= 0) & (index < self.root.flat.size), index, self.root.flat.size)

  def load_pair(self, swapped, offset=0):
    x, y = self.load(offset, 2)
    return [jnp.where(swapped, y, x), jnp.where(swapped, x, y)]

  def store_pair(self, numbers, swapped, offset=0):
    x, y = numbers
    self.store([jnp.where(swapped, y, x), jnp.where(swapped, x, y)], offset)

  def store(self, numbers, offset=0, where=None):
    root = self.root
    root.is_written = True
    for n, number in enumerate(numbers):
      index, stores = self._inside(self.start + (offset + n)), True if where is None else where
      is_beyond = jnp.any((index == root.flat.size) & stores)
      index = jnp.where(stores, index, root.flat.size)
      stored = root.flat.at[index].set(number.astype(root.flat.dtype), mode="drop")
      root.flat = jnp.where(is_beyond, jnp.nan, stored)


class Simulated:
  """`Threads` for the interpreter: a number is an array [128], or one for all threads."""

  def __init__(self, memories, flag):
    self.memories, self.flag, self.index = memories, flag, jnp.arange(THREADS)

  def constant(self, x):
    return jnp.full((THREADS,), x, jnp.float32)

  def multiply_add(self, x, y, z):
    return x * y + z

  def exp2(self, x):
    return jnp.exp2(x)

  def where(self, condition, x, y):
    return jnp.where(condition, x, y)

  def exchange(self, x, distance):
    return x[self.index ^ distance]

  def product(self, left, right, total):
    grid = lambda x: jnp.broadcast_to(self.short(x), (THREADS,)).reshape(-1, 8, 4)
    rows = [jnp.concatenate([grid(x), grid(y)], axis=2) for x, y in (left[::2], left[1::2])]
    columns = [jnp.swapaxes(grid(x), 1, 2) for x in right]
    left, right = jnp.concatenate(rows, axis=1), jnp.concatenate(columns, axis=1)
    sums = jnp.matmul(left, right, precision="highest").reshape(-1, 2, 8, 4, 2)
    return [x + sums[:, n // 2, :, :, n % 2].reshape(-1) for n, x in enumerate(total)]

  def short(self, x):
    bits = lax.bitcast_convert_type(jnp.broadcast_to(x, (THREADS,)), jnp.int32) & -(2**13)
    return lax.bitcast_convert_type(bits, jnp.float32)

  def wait_for_all(self):
    pass

  def wait_for_warp(self):
    pass

  def loop(self, steps, body, numbers):
    def step(i, carry):
      arrays, numbers = carry
      for memory, array in zip(self.memories, arrays):
        memory.flat = array
      numbers = body(i, numbers)
      return [memory.flat for memory in self.memories], numbers

    start = [memory.flat for memory in self.memories], list(numbers)
    arrays, numbers = lax.fori_loop(0, steps, step, start)
    for memory, array in zip(self.memories, arrays):
      memory.flat = array
    return numbers
