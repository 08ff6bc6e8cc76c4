"""The laws that every op of the table obeys, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.ops.compare import cast, check, compiled, run, segment_ids, truth, widen
from tests.ops.table import ROWS, case_name, cases
from tests.quick_compilation import quick_compilation as quick_compilation

every_case = pytest.mark.parametrize(("row", "implementation"), cases(), ids=case_name)
every_row = pytest.mark.parametrize("row", ROWS, ids=case_name)
# Arithmetic that another JAX does not change: proven once.
slow = pytest.mark.slow


@functools.cache
def inputs_of(row, T, dtype="float32", B=4):
  return cast(row.inputs(B, T), dtype)


@functools.cache
def truth_of(row, T, dtype="float32", packed=True, reverse=False):
  ids = segment_ids(T) if packed else None
  return truth(row.oracle, inputs_of(row, T, dtype), segment_ids=ids, reverse=reverse)


@pytest.mark.parametrize(
  ("row", "implementation", "T"),
  [
    pytest.param(row, implementation, T, marks=[] if T in (1, 65) else slow)
    for row, implementation in cases()
    for T in row.lengths_of(implementation)
  ],
  ids=case_name,
)
def test_equals_oracle(row, implementation, T):
  options = row.short_chunks(implementation)
  if T in (2, 17, 64, 65, 1000):
    options = dict(implementation=implementation)
  actual = run(row.op, inputs_of(row, T), segment_ids=segment_ids(T), **options)
  check(actual, truth_of(row, T))


@every_case
@pytest.mark.parametrize("T", [1, 17, pytest.param(65, marks=slow)])
def test_equals_oracle_without_segments(row, implementation, T):
  actual = run(row.op, inputs_of(row, T), **row.short_chunks(implementation))
  check(actual, truth_of(row, T, packed=False))


@every_case
def test_equals_oracle_reversed(row, implementation):
  options = dict(segment_ids=segment_ids(17), reverse=True)
  actual = run(row.op, inputs_of(row, 17), **row.short_chunks(implementation), **options)
  check(actual, truth_of(row, 17, reverse=True))


@every_case
def test_equals_oracle_in_bfloat16(row, implementation):
  if row.is_complex:
    pytest.skip("there are no complex numbers of 16 bits")
  inputs = inputs_of(row, 65, "bfloat16")
  actual = run(row.op, inputs, segment_ids=segment_ids(65), **row.short_chunks(implementation))
  assert actual["o"].dtype == jnp.bfloat16
  assert actual["state"].dtype == np.float32
  check(actual, truth_of(row, 65, "bfloat16"), "bfloat16")


@every_case
@pytest.mark.parametrize("T", [17, pytest.param(65, marks=slow)])
def test_equals_oracle_in_float64(row, implementation, T):
  with jax.enable_x64(True):
    inputs = inputs_of(row, T, "float64")
    actual = run(row.op, inputs, segment_ids=segment_ids(T), **row.short_chunks(implementation))
  assert actual["state"].dtype == (np.complex128 if row.is_complex else np.float64)
  check(actual, truth_of(row, T, "float64"), "float64")


@pytest.mark.parametrize(("row", "implementation"), cases(chunked_only=True), ids=case_name)
@pytest.mark.parametrize(
  "chunk_size", [pytest.param(1, marks=slow), 5, pytest.param(64, marks=slow)]
)
def test_chunk_size_does_not_matter(row, implementation, chunk_size):
  options = dict(segment_ids=segment_ids(17), implementation=implementation)
  check(run(row.op, inputs_of(row, 17), chunk_size=chunk_size, **options), truth_of(row, 17))


def split(row, inputs, ids, at):
  """The tokens before and from `at`, each with their segment ids."""
  names = row.tokens()
  cut = lambda part: {name: x[:, part] if name in names else x for name, x in inputs.items()}
  return [(cut(part), ids[:, part]) for part in (slice(None, at), slice(at, None))]


@every_case
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=slow)])
def test_split_and_carry_equals_whole(row, implementation, reverse):
  T, at = 19, 8
  ids = np.stack([np.repeat([4, 1, 4], [5, 9, 5]), np.where(np.arange(T) % 3, 2, -1)])
  ids = ids.astype(np.int32)
  inputs = inputs_of(row, T, B=2)

  def two_calls(**inputs):
    state, outputs = inputs["initial_state"], []
    parts = split(row, inputs, ids, at)
    for part, part_ids in reversed(parts) if reverse else parts:
      part = {**part, "initial_state": state}
      options = dict(reverse=reverse, **row.short_chunks(implementation))
      o, state = row.op(**part, segment_ids=jnp.asarray(part_ids), **options)
      outputs.append(o)
    return jnp.concatenate(outputs[::-1] if reverse else outputs, axis=1), state

  check(run(two_calls, inputs), truth(row.oracle, inputs, segment_ids=ids, reverse=reverse))


@slow
@every_case
def test_reset_equals_separate_documents(row, implementation):
  lengths = [1, 6, 2, 10]
  T, borders = sum(lengths), np.cumsum(lengths)[:-1]
  ids = np.repeat([3, 0, 3, 1], lengths).astype(np.int32)[None].repeat(2, 0)
  inputs = inputs_of(row, T, B=2)

  def separately(**inputs):
    state, outputs = inputs["initial_state"], []
    for begin, end in zip([0, *borders], [*borders, T], strict=True):
      cut = {name: inputs[name][:, begin:end] for name in row.tokens()}
      o, last = row.oracle(**{**inputs, **cut, "initial_state": state})
      outputs.append(o)
      state = jnp.zeros_like(state)
    return jnp.concatenate(outputs, axis=1), last

  actual = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  check(actual, truth(separately, inputs))


@every_case
def test_reverse_equals_flip(row, implementation):
  T = 17
  inputs, ids = inputs_of(row, T), segment_ids(T)

  def flipped(**inputs):
    flips = {name: jnp.flip(inputs[name], 1) for name in row.tokens()}
    flipped_ids = jnp.flip(jnp.asarray(ids), 1)
    inputs = {**inputs, **flips}
    o, state = row.op(**inputs, segment_ids=flipped_ids, **row.short_chunks(implementation))
    return jnp.flip(o, 1), state

  actual = run(row.op, inputs, segment_ids=ids, reverse=True, **row.short_chunks(implementation))
  check(actual, widen(run(flipped, inputs)))


@every_case
def test_steps_after_prefill_equal_forward(row, implementation):
  T, at = 11, 7
  inputs = inputs_of(row, T)
  others = {name: x for name, x in inputs.items() if name not in row.tokens()}

  def prefill_then_steps(**inputs):
    head = {name: inputs[name][:, :at] for name in row.tokens()}
    o, state = row.op(**{**inputs, **head}, **row.short_chunks(implementation))
    outputs = [o]
    for t in range(at, T):
      o, state = row.step(state, {name: inputs[name][:, t] for name in row.tokens()}, inputs)
      outputs.append(o[:, None])
    return jnp.concatenate(outputs, axis=1), state

  assert others.keys() != inputs.keys()
  check(run(prefill_then_steps, inputs), truth_of(row, T, packed=False))


@every_case
def test_padding_changes_nothing(row, implementation):
  """Zero output, an untouched state and no gradient, whatever is in the padding."""
  T = 17
  ids, inputs = segment_ids(T), inputs_of(row, T)
  hole = ids < 0
  spoilt = dict(inputs)
  for name in row.tokens():
    spoilt[name] = inputs[name].copy()
    spoilt[name][hole] = np.nan
  clean = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  actual = run(row.op, spoilt, segment_ids=ids, **row.short_chunks(implementation))
  for name, x in clean.items():
    np.testing.assert_array_equal(actual[name], x, err_msg=name)
  assert not clean["o"][hole].any()
  for name in row.tokens():
    assert not clean["d" + name][hole].any(), name
  np.testing.assert_array_equal(clean["state"][3], inputs["initial_state"][3])


@every_case
def test_padding_at_the_end_keeps_the_state(row, implementation):
  T, kept = 17, 12
  inputs = inputs_of(row, T)
  head = {name: x[:, :kept] if name in row.tokens() else x for name, x in inputs.items()}
  ids = np.where(np.arange(T) < kept, 0, -1).astype(np.int32)[None].repeat(4, 0)
  padded = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  check({"state": padded["state"]}, {"state": truth(row.oracle, head)["state"]})


@every_case
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_stays_in_its_document(row, implementation, poisoned):
  ids = np.repeat([0, -1, 1, 0], [6, 2, 5, 6]).astype(np.int32)[None].repeat(2, 0)
  document = np.repeat([0, -1, 1, 2], [6, 2, 5, 6])
  inputs = inputs_of(row, len(document), B=2)
  clean = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  shared = ["d" + name for name in row.shapes if name not in (*row.tokens(), "initial_state")]
  for name in row.tokens():
    spoilt = {**inputs, name: inputs[name].copy()}
    spoilt[name][0, document == poisoned] = np.nan
    actual = run(row.op, spoilt, segment_ids=ids, **row.short_chunks(implementation))
    assert np.isnan(actual["o"][0, document == poisoned]).any()
    for key in ["o", *("d" + token for token in row.tokens())]:
      healthy = document != poisoned
      np.testing.assert_array_equal(actual[key][0, healthy], clean[key][0, healthy], err_msg=key)
    for key in actual.keys() - set(shared):
      np.testing.assert_array_equal(actual[key][1], clean[key][1], err_msg=key)
    if poisoned < 2:
      np.testing.assert_array_equal(actual["state"], clean["state"])
    if poisoned > 0:
      np.testing.assert_array_equal(actual["dinitial_state"], clean["dinitial_state"])


@every_case
def test_nothing_depends_on_the_future(row, implementation):
  T, now = 17, 9
  inputs = inputs_of(row, T)
  other = cast(row.inputs(4, T, seed=1), "float32")
  changed = dict(inputs)
  for name in row.tokens():
    changed[name] = np.concatenate([inputs[name][:, :now], other[name][:, now:]], axis=1)

  def past(**inputs):
    o, state = row.op(**inputs, **row.short_chunks(implementation))
    return o[:, :now], jnp.zeros_like(state)

  before, after = run(past, inputs), run(past, changed)
  np.testing.assert_array_equal(before["o"], after["o"])
  for name in row.tokens():
    assert not before["d" + name][:, now:].any(), name
    assert before["d" + name][:, :now].any(), name


@every_case
def test_same_bits_on_every_run(row, implementation):
  inputs, ids = inputs_of(row, 65), segment_ids(65)
  first = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  second = run(row.op, inputs, segment_ids=ids, **row.short_chunks(implementation))
  for name, x in first.items():
    np.testing.assert_array_equal(second[name], x, err_msg=name)


@every_case
def test_sharded_equals_unsharded(row, implementation):
  """Batch and channels split over eight devices, as XLA partitions the op by itself."""
  T = 17
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  axes = {"B": "data", "D": "tensor", "H": "tensor"}
  place = lambda letters: NamedSharding(mesh, PartitionSpec(*map(axes.get, letters.split())))
  inputs = {
    name: jax.device_put(x, place(row.shapes[name])) for name, x in inputs_of(row, T).items()
  }
  ids = jax.device_put(segment_ids(T), place("B T"))

  actual = compiled(row.op, **row.short_chunks(implementation))(inputs, {"segment_ids": ids})
  check(jax.tree.map(np.asarray, actual), truth_of(row, T))


@every_row
def test_runs_inside_shard_map(row):
  """Each device its own rows, the state left to the op."""
  T = 5
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
  inputs = {name: x for name, x in inputs_of(row, T).items() if name != "initial_state"}
  place = lambda name: PartitionSpec("data" if row.shapes[name].startswith("B ") else None)
  specs = ({name: place(name) for name in inputs}, PartitionSpec("data"))
  op = lambda inputs, ids: row.op(**inputs, segment_ids=ids, implementation=row.implementations[0])
  mapped = jax.jit(
    jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec("data"),) * 2)
  )
  o, state = mapped(jax.tree.map(jnp.asarray, inputs), jnp.asarray(segment_ids(T)))
  expected = truth(row.oracle, inputs, segment_ids=segment_ids(T))
  check({"o": np.asarray(o), "state": np.asarray(state)}, {k: expected[k] for k in ("o", "state")})


@every_case
def test_composes_with_vmap_remat_and_scan(row, implementation):
  """Three layers scanned over and rematerialised, mapped over two copies of the inputs."""
  T = 5
  inputs, ids = inputs_of(row, T), segment_ids(T)
  twice = jax.tree.map(lambda x: np.stack([x, x[::-1] if x.shape[0] == 4 else x]), inputs)
  ids_twice = np.stack([ids, ids[::-1]])

  def layers(op, inputs, ids, wrap):
    @wrap
    def layer(x, _):
      o, state = op(**{**inputs, row.carries: x}, segment_ids=ids)
      return o, state

    x, states = jax.lax.scan(layer, inputs[row.carries], length=3)
    return x, states

  def mapped(**inputs):
    op = functools.partial(row.op, **row.short_chunks(implementation))
    one = lambda inputs, ids: layers(op, inputs, ids, jax.checkpoint)
    return jax.vmap(one)(inputs, jnp.asarray(ids_twice))

  def one_by_one(**inputs):
    pick = lambda i: {name: x[i] for name, x in inputs.items()}
    results = [layers(row.oracle, pick(i), ids_twice[i], lambda f: f) for i in range(2)]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)

  check(run(mapped, twice), truth(one_by_one, twice))


@every_row
def test_default_runs_without_state_or_segments(row):
  inputs = {name: x for name, x in inputs_of(row, 17).items() if name != "initial_state"}
  check(run(row.op, inputs), truth(row.oracle, inputs))
