"""Checksums notice each bit, follow their formula, and do not depend on where an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checksums


def make_mesh(*shape):
  return Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool", "complex64"]
)
def test_checksums_notice_each_bit_and_each_exchange(dtype):
  rng = np.random.default_rng(0)
  content = rng.integers(0, 2 if dtype == "bool" else 256, (3, 5, 64), np.uint8)
  original = np.ascontiguousarray(content[:, :, : 16 * 4]).view(jnp.dtype(dtype))

  def of(array):
    return checksums.checksums({"x": jnp.asarray(array)})["x"]

  seen = {of(original)}
  for _ in range(20):
    changed = original.copy()
    raw = changed.view(np.uint8)
    place = tuple(rng.integers(size) for size in raw.shape)
    raw[place] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
    assert of(changed) != of(original)
  swapped = original.copy()
  swapped[0, 0], swapped[2, 1] = original[2, 1], original[0, 0]
  assert of(swapped) not in seen
  assert of(original.reshape(5, 3, -1)) == of(original)


def test_checksums_do_not_depend_on_the_sharding_and_follow_the_formula():
  x = jax.random.normal(jax.random.key(0), (16, 24))
  sums = [
    checksums.checksums({"x": jax.device_put(x, NamedSharding(make_mesh(2, 4), spec))})["x"]
    for spec in (PartitionSpec(), PartitionSpec("data", "fsdp"), PartitionSpec("fsdp"))
  ]
  mask, total = 2**32 - 1, 0
  for position, word in enumerate(np.asarray(x).view(np.uint32).ravel().tolist()):
    mixed = (position ^ (position >> 16)) * 0x85EBCA6B & mask
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & mask
    total += word * ((mixed ^ (mixed >> 16)) | 1)
  assert sums == [total & mask] * 3


def test_checksums_of_mixed_trees():
  tree = {
    "key": jax.random.key(3),
    "host": np.arange(4.0),
    "one": jax.device_put(jnp.ones(3), jax.devices()[5]),
    "sharded": jax.device_put(jnp.ones(8), NamedSharding(make_mesh(8, 1), PartitionSpec("data"))),
    "empty": jnp.zeros((0, 3)),
  }
  sums = checksums.checksums(tree)
  assert list(sums) == sorted(tree) and sums["empty"] == 0
  assert sums["key"] == checksums.checksums({"x": jax.random.key_data(tree["key"])})["x"]
