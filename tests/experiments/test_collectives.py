"""Collectives of programs compiled for eight devices, and of a text such as TPUs have."""

import jax
import jax.numpy as jnp
import pytest

from experiments.collectives import Total, collectives, totals

SIZE = 4 * 32 * 16  # bytes of what each of the eight devices holds


def program(function):
  """The text of `function`, of float32 [32, 16] on each of two by four devices."""
  mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.P(("data", "seq"))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  argument = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32)
  return jax.jit(mapped).lower(argument).compile().as_text()


def shift(x, *pairs):
  return jax.lax.ppermute(x, "seq", pairs)


# By kind: a program with one of them, and what each device sends in it.
KINDS = {
  "all-gather": (lambda x: jax.lax.all_gather(x, "seq", tiled=True)[:32] + x, 3 * SIZE),
  "all-reduce": (lambda x: jax.lax.psum(x, "seq"), 1.5 * SIZE),
  "reduce-scatter": (
    lambda x: jnp.tile(jax.lax.psum_scatter(x, "seq", tiled=True), (4, 1)),
    0.75 * SIZE,
  ),
  "all-to-all": (lambda x: jax.lax.all_to_all(x, "seq", 0, 1, tiled=True), 0.75 * SIZE),
  "collective-permute": (lambda x: shift(x, (0, 1), (2, 3)), SIZE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_and_its_bytes(kind):
  function, size = KINDS[kind]
  (record,) = collectives(program(lambda x: function(x).reshape(x.shape)))
  assert (record.kind, record.count, record.bytes, record.group_size) == (kind, 1, size, 4)
  assert record.link == "ici" and not record.endless and "shard_map" in record.source
  assert totals([record]) == {kind: Total(1, size)}


def test_loops_count_as_often_as_they_run():
  def inner(x, _):
    return jnp.sin(jax.lax.psum(x, "data")), None

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x, None, length=5)
    return shift(x, (0, 1)), None

  def function(x):
    x, _ = jax.lax.scan(outer, x, None, length=3)
    return jax.lax.fori_loop(2, 9, lambda i, y: y + i * jax.lax.all_gather(y, "seq").sum(0), x)

  found = totals(collectives(program(function)))
  assert found == {
    "all-gather": Total(7, 7 * 3 * SIZE),
    "all-reduce": Total(15, 15 * 1.0 * SIZE),
    "collective-permute": Total(3, 3 * SIZE),
  }


def test_a_loop_of_unknown_length_counts_once_and_is_marked():
  keep_on = lambda x: jax.lax.pmax(x.sum(), ("data", "seq")) < 3
  text = program(lambda x: jax.lax.while_loop(keep_on, lambda x: shift(x, (0, 1)), x))
  found = collectives(text)
  assert {(r.kind, r.count, r.endless) for r in found} == {
    ("all-reduce", 1, True),
    ("collective-permute", 1, True),
  }


def test_permutations_are_summed_for_each_device():
  def function(x):
    for pairs in ([(0, 1)], [(0, 1), (1, 2)], [(1, 2), (2, 3)], [(3, 3)]):
      x = jnp.cos(shift(x, *pairs))
    return x

  found = totals(collectives(program(function)))
  assert found == {"collective-permute": Total(3, 2 * SIZE)}


def test_collectives_of_one_device_send_nothing():
  text = program(lambda x: x + 0 * jax.lax.psum(x, ()))
  assert collectives(text) == []


LOOP = """HloModule step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (p.0: bf16[64,8]) -> bf16[8,8] {
  %p.0 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%p.0), channel_id=3, \
replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = bf16[8,8]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={8,8}
}

%fused.1 (p.1: bf16[8,8]) -> bf16[64,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=9, \
replica_groups=mesh['a'=2,'b'=8] {'b':(1)4}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused.2 (p.2: bf16[8,8]) -> bf16[64,8] {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,8]{1,0} all-gather(%p.2), channel_id=9, \
replica_groups=mesh['a'=2,'b'=8] {'b':(1)4}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%raised (p.3: s32[], p.4: s32[]) -> s32[] {
  %p.3 = s32[]{:T(128)} parameter(0)
  %p.4 = s32[]{:T(128)} parameter(1)
  ROOT %more = s32[]{:T(128)} add(%p.4, %p.3)
}

%body (arg: (s32[], bf16[8,8], s32[])) -> (s32[], bf16[8,8], s32[]) {
  %arg = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)S(1)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %n = s32[] get-tuple-element(%arg), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} fusion(%two, %i), kind=kLoop, calls=%raised
  %first = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %second = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
  %started = (bf16[8,8]{1,0}, bf16[8,8]{1,0:T(8,128)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1},{1,2}}, \
metadata={op_name="move"}
  %done = bf16[8,8]{1,0:T(8,128)} collective-permute-done(%started)
  %part.1 = bf16[8,8]{1,0} fusion(%first), kind=kCustom, calls=%all-reduce-scatter.1
  %sent = (bf16[8,8]{1,0}, u32[], token[]) send(%part.1, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %token = token[] after-all()
  ROOT %out = (s32[]{:T(128)}, /*index=1*/bf16[8,8]{1,0}, s32[]) tuple(%next, %part.1, %n)
}

%condition (arg.1: (s32[], bf16[8,8], s32[])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %n.1 = s32[] get-tuple-element(%arg.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x.1: bf16[8,8]) -> bf16[8,8] {
  %x.1 = bf16[8,8]{1,0} parameter(0), metadata={op_name="x"}
  %one = s32[]{:T(128)} constant(1)
  %zero.1 = s32[]{:T(128)} copy(%one)
  %ten = s32[] constant(10)
  %before = (s32[]{:T(128)}, bf16[8,8]{1,0}, s32[]) tuple(%zero.1, %x.1, %ten)
  %loop = (s32[]{:T(128)}, bf16[8,8]{1,0}, s32[]) while(%before), condition=%condition, \
body=%body, metadata={op_name="while"}
  ROOT %y = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_only_tpus_have():
  """A counter from 1 to 10 by 2 is five trips, though the text does not say so."""
  found = collectives(LOOP)
  assert {(r.kind, r.link, r.count, r.bytes, r.group_size, r.arrays) for r in found} == {
    ("all-gather", "ici", 5, 3 * 128, 4, "bf16[8,8]"),  # once, though written down twice
    ("reduce-scatter", "ici", 5, 1024 * 7 / 8, 8, "bf16[64,8]"),
    ("collective-permute", "ici", 5, 128, 2, "bf16[8,8]"),
    ("all-reduce", "dcn", 5, 1.5 * 128, 4, "bf16[8,8]"),
  }
  assert totals(found, link="dcn") == {"all-reduce": Total(5, 5 * 1.5 * 128)}


REORDERED = """HloModule look_up, num_partitions=8

ENTRY %main (p: f32[12,4]) -> f32[24,4] {
  %p = f32[12,4]{1,0} parameter(0)
  ROOT %gather = f32[24,4]{1,0} all-gather(%p), channel_id=2, \
replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}, dimensions={0}
}
"""


def test_groups_along_an_axis_of_devices_in_another_order():
  (found,) = collectives(REORDERED)
  assert (found.kind, found.group_size, found.bytes) == ("all-gather", 2, 12 * 4 * 4)


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    collectives("module @jit_f {}")
