"""Every form of pLSTM on grids: its oracle, its borders, and the geometry of its two modes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import ops
from ops import dispatch, reference
from tests.ops.compare import cast, check, run, truth
from tests.quick_compilation import quick_compilation as quick_compilation

B, H, K, V = 2, 2, 3, 2
GENERAL = ("recurrent", "wavefront", "chunked", "parallel")
# By structure, the forms that have code of their own for it.
OF_ITS_OWN = {"general": GENERAL, "separable": ("separable",), "merged": ("merged",)}


@functools.cache
def draw(Y: int, X: int, runs: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Inputs in float64, the borders as one array; transitions of both signs, a fifth of them 0."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  R = (4,) if runs == 4 else ()
  transition = rng.uniform(-1.0, 1.0, size=(B, Y, X, *R, H, 2, 2))
  return {
    "q": normal(B, Y, X, H, K),
    "k": normal(B, Y, X, H, K),
    "v": normal(B, Y, X, H, V),
    "source": normal(B, Y, X, *R, H, 2),
    "transition": transition * (rng.random(transition.shape) > 0.2),
    "mark": normal(B, Y, X, *R, H, 2),
    "direct": normal(B, Y, X, H),
    "initial_state": normal(B, *R, Y + X, H, K, V),
  }


def with_joined_borders(op):
  """`op`, with the borders given and returned as one array: left, then above."""

  def joined(initial_state=None, **arguments):
    if initial_state is not None:
      split = arguments["q"].shape[1]
      axis = initial_state.ndim - 4
      initial_state = tuple(jnp.split(initial_state, [split], axis=axis))
    o, final_state = op(**arguments, initial_state=initial_state)
    return o, jnp.concatenate(final_state, axis=final_state[0].ndim - 4)

  return joined


op, oracle = with_joined_borders(ops.plstm_2d), with_joined_borders(reference.plstm_2d)


@functools.cache
def expected(Y, X, runs, structure, dtype="float64"):
  return truth(oracle, cast_(draw(Y, X, runs), dtype), structure=structure)


def cast_(inputs, dtype):
  """`cast`, but gates and borders are never narrower than float32."""
  wide = "float32" if dtype == "bfloat16" else dtype
  return {
    name: cast({name: x}, dtype if name in ("q", "k", "v") else wide)[name]
    for name, x in inputs.items()
  }


def options_of(form, structure):
  return dict(implementation=form, structure=structure, chunk_size=3 if form == "chunked" else None)


@pytest.mark.parametrize(
  ("form", "structure"),
  [(form, structure) for structure, forms in OF_ITS_OWN.items() for form in forms],
)
def test_equals_the_oracle(form, structure):
  """Four runs, odd sizes: values, borders and all gradients, of what has code of its own."""
  with jax.enable_x64(True):
    actual = run(op, draw(7, 11, 4), **options_of(form, structure))
  assert actual["o"].dtype == actual["state"].dtype == np.float64
  check(actual, expected(7, 11, 4, structure), "float64")


@pytest.mark.parametrize("form", GENERAL)
@pytest.mark.parametrize("structure", ["separable", "merged"])
def test_general_forms_keep_the_promise_of_a_structure(form, structure):
  inputs = draw(7, 11, 4)
  with jax.enable_x64(True):
    o, state = values(op, inputs, **options_of(form, structure))
  known = expected(7, 11, 4, structure)
  check({"o": o, "state": state}, {"o": known["o"], "state": known["state"]}, "float64")


def values(function, inputs, **options):
  return jax.tree.map(np.asarray, jax.jit(functools.partial(function, **options))(**inputs))


def all_sizes(op, **options):
  """One node, one row, one column, one run; and a square with nothing at its borders."""
  grids = [draw(Y, X, 1) for Y, X in [(1, 1), (1, 7), (5, 1), (8, 8)]]
  grids[-1] = {name: x for name, x in grids[-1].items() if name != "initial_state"}
  every = lambda grids: [op(**inputs, **options) for inputs in grids]
  with jax.enable_x64(True):
    return values(every, {"grids": grids})


@functools.cache
def known_sizes():
  return all_sizes(oracle)


@pytest.mark.parametrize("form", GENERAL)
def test_sizes(form):
  actual = all_sizes(op, **options_of(form, "general"))
  for (o, state), (known_o, known_state) in zip(actual, known_sizes(), strict=True):
    check({"o": o, "state": state}, {"o": known_o, "state": known_state}, "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_inputs(dtype):
  """Gates are float32 next to bfloat16 q, k and v."""
  inputs = cast_(draw(4, 6, 4), dtype)
  known = truth_values(inputs)

  def all_forms(**inputs):
    return {form: op(**inputs, **options_of(form, "general")) for form in GENERAL[1:]}

  for o, state in values(all_forms, inputs).values():
    assert o.dtype == inputs["v"].dtype and state.dtype == np.float32
    for x, exact in zip((o, state), known, strict=True):
      rms = np.sqrt(np.mean((x.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
      assert rms <= {"float32": 2e-6, "bfloat16": 1e-2}[dtype]


def truth_values(inputs):
  with jax.enable_x64(True):
    return values(oracle, {name: x.astype(np.float64) for name, x in inputs.items()})


@functools.cache
def tiles_known(Y, X):
  with jax.enable_x64(True):
    return values(oracle, draw(Y, X, 1))


@pytest.mark.parametrize("form", ["wavefront", "parallel"])
def test_tiles_that_hand_on_their_borders_equal_the_whole(form):
  """Four tiles, cut along x and along y."""
  Y, X, y, x = 5, 7, 2, 3
  inputs = draw(Y, X, 1)
  options = options_of(form, "general")

  def tiles(initial_state, **inputs):
    tile = lambda rows, columns, left, above: ops.plstm_2d(
      **{name: array[:, rows, columns] for name, array in inputs.items()},
      initial_state=(left, above), **options,
    )  # fmt: skip
    top, bottom, near, far = slice(y), slice(y, None), slice(x), slice(x, None)
    left, above = initial_state[:, :Y], initial_state[:, Y:]
    a, (right_a, below_a) = tile(top, near, left[:, top], above[:, near])
    b, (right_b, below_b) = tile(top, far, right_a, above[:, far])
    c, (right_c, below_c) = tile(bottom, near, left[:, bottom], below_a)
    d, (right_d, below_d) = tile(bottom, far, right_c, below_b)
    state = jnp.concatenate([right_b, right_d, below_c, below_d], axis=1)
    return jnp.concatenate([jnp.concatenate([a, b], 2), jnp.concatenate([c, d], 2)], 1), state

  with jax.enable_x64(True):
    (o, state), (known_o, known_state) = values(tiles, inputs), tiles_known(Y, X)
  check({"o": o, "state": state}, {"o": known_o, "state": known_state}, "float64")


def test_a_single_row_or_column_equals_a_sequence():
  T = 9
  row = draw(1, T, 1)
  column = {name: np.swapaxes(x, 1, 2) for name, x in row.items() if name != "initial_state"}
  row["initial_state"] = np.zeros_like(row["initial_state"])
  row["initial_state"][:, 0] = state = np.random.default_rng(1).normal(size=(B, H, K, V))
  column["initial_state"] = np.concatenate([row["initial_state"][:, 1:], state[:, None]], axis=1)
  for axis, inputs in enumerate((row, column)):
    along = {"source": (axis,), "mark": (axis,), "transition": (axis, axis)}
    tokens = {
      name: x.reshape(B, T, *x.shape[3:])[(..., *along.get(name, ()))]
      for name, x in inputs.items()
      if name != "initial_state"
    }
    with jax.enable_x64(True):
      known, last = values(reference.plstm_1d, {**tokens, "initial_state": state})
      o, final_state = values(op, inputs, implementation="wavefront")
    o, final_state = o.reshape(known.shape), final_state[:, 0 if axis == 0 else -1]
    check({"o": o, "state": final_state}, {"o": known, "state": last}, "float64")


def response(transition, source, structure):
  """What every node of a grid of 24 x 24 reads of the first one, by gates that are the same
  everywhere: [len(transition) 24 24]."""
  N, side = len(transition), 24
  everywhere = lambda x: np.broadcast_to(
    np.asarray(x)[:, None, None, None], (N, side, side, 1, *np.shape(x)[1:])
  )
  first = np.zeros((N, side, side, 1, 1))
  first[:, 0, 0] = 1
  inputs = dict(q=np.ones_like(first), k=np.ones_like(first), v=first, direct=first[..., 0] * 0)
  gates = dict(transition=everywhere(transition), source=everywhere(source))
  gates["mark"] = np.ones_like(gates["source"])
  with jax.enable_x64(True):
    function = lambda **inputs: ops.plstm_2d(**inputs, structure=structure)
    return values(function, {**inputs, **gates})[0][..., 0, 0]


def test_critical_p_mode_sends_a_ray_that_fades_as_a_power():
  directions = np.array([0.5, 0.3])
  turn = np.stack([directions, 1 - directions], axis=-1)
  seen = response(np.stack([turn, turn], axis=-1), turn, "merged")
  assert ops.largest_column_sum(jnp.asarray(np.stack([turn, turn], axis=-1))) <= 1 + 1e-6
  for delta in range(1, 24):
    diagonal = np.stack([seen[:, delta - x, x] for x in range(delta + 1)], axis=-1)
    np.testing.assert_allclose(diagonal.sum(axis=-1), 1, rtol=0, atol=1e-12)
  share = diagonal.argmax(axis=-1) / 23  # of the way that goes to the right
  assert (np.abs(share - directions) <= 1 / 23).all()
  formula = (2 * np.pi * 23 * directions * (1 - directions)) ** -0.5
  np.testing.assert_allclose(diagonal.max(axis=-1), formula, rtol=0.05)


def test_critical_d_mode_reaches_every_node_below_and_to_the_right_once():
  seen = response(np.array([[[1.0, 1.0], [7.0, 1.0]]]), np.ones((1, 2)), "separable")[0]
  assert seen[0, 0] == 0
  np.testing.assert_array_equal(seen.ravel()[1:], 1)


def test_largest_column_sum_tells_of_growth():
  """The published gates of P-mode, with a transition of -0.9 and an angle of 0.5."""
  turn = np.array([0.5 * -0.9, 1 - 0.5 * -0.9])
  transition = np.stack([np.stack([turn, turn], axis=-1), np.full((2, 2), 0.1)])
  np.testing.assert_allclose(ops.largest_column_sum(jnp.asarray(transition)), 1.9, rtol=1e-6)


def test_runs_inside_shard_map():
  inputs = cast_(draw(2, 3, 4), "float32")
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
  split = PartitionSpec("data")

  def all_forms(inputs):
    bare = {name: x for name, x in inputs.items() if name != "initial_state"}
    return [op(**bare, **options_of(form, "general")) for form in ("wavefront", "parallel")]

  mapped = jax.jit(jax.shard_map(all_forms, mesh=mesh, in_specs=split, out_specs=split))
  bare = {name: x for name, x in inputs.items() if name != "initial_state"}
  known = truth_values(bare)
  for o, state in jax.tree.map(np.asarray, mapped(inputs)):
    check({"o": o, "state": state}, dict(zip(("o", "state"), known, strict=True)))


def test_errors_name_the_argument():
  inputs = draw(2, 3, 4)
  inputs["initial_state"] = (np.zeros((B, 4, 2, H, K, V)), np.zeros((B, 4, 3, H, K, V)))
  shapes = {
    name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), x)
    for name, x in inputs.items()
  }
  unchecked = inspect.unwrap(ops.plstm_2d)
  call = lambda **changed: unchecked(**{**shapes, **changed})
  like = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  with pytest.raises(ValueError, match=r"mark has shape .*, expected \[B Y X O H 2\]"):
    call(mark=like(B, 2, 2, 4, H, 2))
  with pytest.raises(ValueError, match=r"source has shape .*, expected \[B Y X 4 H 2\]"):
    call(source=like(B, 2, 3, 4, H, 3))
  with pytest.raises(ValueError, match=r"initial_state has shape .*, expected \[B O X H K V\]"):
    call(initial_state=(inputs["initial_state"][0],) * 2)
  with pytest.raises(ValueError, match="structure is 'tree', expected one of general, separable"):
    call(structure="tree")
  with pytest.raises(ValueError, match="'merged' cannot run: structure is 'general', not 'merged'"):
    call(implementation="merged")
  with pytest.raises(ValueError, match="chunk_size is 0"):
    call(chunk_size=0)


@pytest.mark.parametrize(
  ("platform", "side", "structure", "form"),
  [
    ("cpu", 24, "merged", "parallel"),
    ("cpu", 25, "separable", "recurrent"),
    ("gpu", 32, "general", "parallel"),
    ("gpu", 33, "general", "chunked"),
    ("gpu", 33, "separable", "separable"),
    ("tpu", 33, "merged", "merged"),
  ],
)
def test_what_runs_by_itself(platform, side, structure, form, capsys):
  shapes = jax.eval_shape(lambda: {name: jnp.zeros(x) for name, x in sizes(side).items()})
  with dispatch.for_platform(platform):
    text = ops.explain(ops.plstm_2d, **shapes, structure=structure)
  assert f"  {form:<10} runs (" in text


def sizes(side):
  gate = (1, side, side, 4, H)
  return {
    **dict.fromkeys(("q", "k", "v"), (1, side, side, H, K)),
    "source": (*gate, 2), "transition": (*gate, 2, 2), "mark": (*gate, 2),
    "direct": (1, side, side, H),
  }  # fmt: skip


def test_every_form_is_tested():
  forms = set(dispatch._declared["plstm_2d"][0])
  assert forms == {form for forms in OF_ITS_OWN.values() for form in forms}
