"""One number per array that changes when a bit of the array does.

The checksum of an array of words w_i, at row-major positions i, is

    sum_i w_i (mix(i) | 1)   modulo 2^32,

where mix scrambles the position, so that words cannot trade places unnoticed. The factors are odd
and hence invertible: a change within one word is always noticed, any other all but 2^-32 of the
time. Sums of integers do not depend on their order, so an array has the same checksum under every
sharding; each device reads its shard once and exchanges one word.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import processes
from experiments.rules import path_name


def checksums(tree: Any) -> dict[str, int]:
  """The checksum of every array of a tree, computed where the array lives.

  Args:
    tree: Arrays of any dtype of whole bytes, typed PRNG keys included.

  Returns:
    Path of the array, "params/embedding" -> checksum, in the order of the tree.
  """
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  # Arrays on different devices cannot go through one jitted function.
  groups: dict[Any, list[str]] = {}
  for name, leaf in leaves.items():
    devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
    groups.setdefault(devices, []).append(name)
  pending = {}
  for names in groups.values():
    group = [leaves[name] for name in names]
    meshes = [
      leaf.sharding.mesh
      for leaf in group
      if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding)
    ]
    pending[tuple(names)] = _compiled(meshes[0] if meshes else None)(group)
  found = {}
  for names, sums in pending.items():
    found.update(zip(names, np.asarray(sums).tolist()))
  return {name: found[name] for name in leaves}


@functools.cache
def _compiled(mesh: jax.sharding.Mesh | None):
  if mesh is None:
    return jax.jit(_all)
  # Every process of a run must be able to read the result.
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return processes.lined_up(jax.jit(_all, out_shardings=everywhere))


def _all(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return _checksum(jnp.stack([x.real, x.imag]))
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  # Eight bytes become two words along a new last axis.
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  position, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    coordinate = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position += coordinate * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  # The finishing steps of MurmurHash3.
  mixed = (position ^ (position >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  mixed = mixed ^ (mixed >> 16)
  return jnp.sum(words * (mixed | jnp.uint32(1)), dtype=jnp.uint32)
