"""Time split over devices: every op of the table equals its oracle, and sends what it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import ops
from ops import sharded
from tests.ops.compare import cast, check, compiled, truth
from tests.ops.table import ROWS, case_name
from tests.quick_compilation import quick_compilation as quick_compilation

T = 32
METHODS = ("all_gather", "all_scan", "doubling")
# Devices along (data, tensor, seq), how states move, whether there are documents, the direction.
LAYOUTS = [
  ((2, 2, 2), "auto", True, False),
  ((1, 2, 4), "all_scan", True, True),
  ((1, 1, 8), "all_gather", False, True),
  ((1, 1, 8), "doubling", True, False),
  ((1, 1, 8), "all_scan", True, False),
]


def make_mesh(data=1, tensor=1, seq=8):
  devices = np.array(jax.devices()[: data * tensor * seq]).reshape(data, 1, tensor, seq)
  return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)


def documents():
  """Four rows for eight parts of four tokens: documents that end at a border, beside it and far
  from it, one without end, parts of padding alone, padding alone."""
  ids = np.zeros((4, T), np.int32)
  ids[0] = np.repeat([7, 1, 1, 2, 0, 2], [4, 5, 1, 6, 13, 3])
  ids[1, 3:19] = -1
  ids[2] = np.where(np.arange(T) < 9, -5, 6)
  ids[2, 20:] = np.where(np.arange(12) % 5 < 3, 6, -2)
  ids[3] = -1
  return ids


@functools.cache
def truth_of(row, packed, reverse):
  inputs = row.inputs(4, T)
  return truth(row.oracle, inputs, segment_ids=documents() if packed else None, reverse=reverse)


def run_split(op, inputs, ids, mesh, method, **options):
  """`compare.run` where time is split."""
  segments = {} if ids is None else {"segment_ids": jnp.asarray(ids)}
  with jax.set_mesh(mesh), sharded.exchange(method, blocks=4):
    function = functools.partial(op)  # what is compiled is kept by function, not by mesh
    program = compiled(function, **options)
    return jax.tree.map(np.asarray, program(jax.tree.map(jnp.asarray, inputs), segments))


@pytest.mark.parametrize("row", ROWS, ids=case_name)
@pytest.mark.parametrize(
  ("layout", "method", "packed", "reverse"), LAYOUTS, ids=lambda value: str(value)
)
def test_equals_oracle(row, layout, method, packed, reverse):
  with jax.enable_x64(True):
    inputs = cast(row.inputs(4, T), "float64")
    ids = documents() if packed else None
    options = dict(reverse=reverse, **row.short_chunks(row.implementations[-1]))
    actual = run_split(row.op, inputs, ids, make_mesh(*layout), method, **options)
  check(actual, truth_of(row, packed, reverse), "float64")


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_complex], ids=case_name)
def test_equals_oracle_in_bfloat16(row):
  inputs = cast(row.inputs(4, T), "bfloat16")
  expected = truth(row.oracle, inputs, segment_ids=documents())
  options = row.short_chunks(row.implementations[-1])
  actual = run_split(row.op, inputs, documents(), make_mesh(), "auto", **options)
  assert actual["o"].dtype == jnp.bfloat16 and actual["state"].dtype == np.float32
  check(actual, expected, "bfloat16")


def test_a_spoilt_document_spoils_no_other():
  """NaN stays in its document, forwards and backwards, on whichever device it lies."""
  row = next(row for row in ROWS if row.name == "gated_delta_rule")
  inputs = cast(row.inputs(4, T), "float32")
  ids = np.zeros((4, T), np.int32)
  ids[:, 6:18] = 1  # over four devices
  ids[:, 18:] = 2
  inputs["v"][:, 7] = np.nan
  o, state = _split_outputs(row.op, inputs, ids)
  spoilt = np.isnan(o).any((0, 2, 3))
  assert not spoilt[:7].any() and spoilt[7:18].all() and not spoilt[18:].any()
  assert np.isfinite(state).all()


def _split_outputs(op, inputs, ids):
  with jax.set_mesh(make_mesh()):
    return jax.tree.map(np.asarray, jax.jit(op)(**inputs, segment_ids=jnp.asarray(ids)))


def test_mistakes_are_told():
  q = jnp.ones((2, 16, 2, 4))
  message = "v has H = 3 heads, expected a multiple of q's Hq = 2"
  with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match=message):
    ops.linear_attention(q, q, jnp.ones((2, 16, 3, 4)))
  message = "method is 'ring', expected one of all_gather, all_scan, doubling or auto"
  with pytest.raises(ValueError, match=message), sharded.exchange("ring"):
    pass


def test_a_length_that_devices_do_not_divide_is_not_split():
  row = ROWS[0]
  inputs = cast(row.inputs(4, 17), "float32")
  expected = truth(row.oracle, inputs)
  check(run_split(row.op, inputs, None, make_mesh(), "auto"), expected)
