"""Newton's method against the sequential oracle, never against itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import ops
from ops import reference
from ops.check_cell import convergence
from tests.ops import cells
from tests.ops.cells import CELLS, D, draw, narrow
from tests.ops.compare import objective, segment_ids
from tests.quick_compilation import quick_compilation as quick_compilation

newton_scan = functools.partial(ops.newton_scan, implementation="parallel")


def with_gradients(function):
  """h, the final state and the gradients of all floating arguments."""

  def everything(params, x, state):
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    leaves, treedef = jax.tree.flatten((params, x, state))

    def loss(moved):
      merged = [moved.get(i, leaf) for i, leaf in enumerate(leaves)]
      h, final_state = function(*jax.tree.unflatten(treedef, merged))
      return objective(h, final_state), (h, final_state)

    moved = {i: leaf for i, leaf in enumerate(leaves) if floating(leaf)}
    gradients, (h, final_state) = jax.grad(loss, has_aux=True)(moved)
    return (h, final_state), gradients

  return everything


def oracle(cell, params, x, state, **options):
  return reference.nonlinear_scan(cell.step, params, x, state, **options)


def stateful(cell, params, x, state, **options):
  return newton_scan(cell, params, x, initial_state=state, **options)


def check(actual, expected, value=1e-12, gradient=1e-10):
  for limit, a, b in zip((value, gradient), actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=limit, atol=limit)
    jax.tree.map(close, a, b)


# What each length also tries, so that one compilation serves many cases.
@pytest.mark.parametrize(
  ("T", "names", "packed", "options"),
  [
    (1, ("diagonal", "dense"), False, {}),
    (2, ("block", "dense"), True, {"reverse": True}),
    (3, ("diagonal", "block"), False, {"window": 2}),
    (8, ("diagonal", "dense"), True, {}),
    (37, tuple(CELLS), True, {"reverse": True, "window": 10}),
    (1000, tuple(CELLS), True, {}),
  ],
)
def test_equals_the_loop(T, names, packed, options):
  """Twelve iterations, values to 1e-12 and all gradients to 1e-10, in float64."""
  with jax.enable_x64(True):
    ids = {"segment_ids": jnp.asarray(segment_ids(T))} if packed else {}
    flipped = {"reverse": True} if options.get("reverse") else {}

    def both(inputs):
      actual, expected = {}, {}
      for name in names:
        cell = CELLS[name]
        run = functools.partial(stateful, cell, iterations=12, **ids, **options)
        actual[name] = with_gradients(run)(*inputs[name])
        loop = functools.partial(oracle, cell, **ids, **flipped)
        expected[name] = with_gradients(loop)(*inputs[name])
      return actual, expected

    actual, expected = jax.jit(both)({name: draw(name, 4, T) for name in names})
    for name in names:
      if packed:  # the oracle's output at padding is zero too
        assert not np.asarray(actual[name][0][0])[segment_ids(T) < 0].any()
      check(actual[name], expected[name])


def test_recurrent_is_the_loop_bit_for_bit():
  params, x, state = narrow(draw("diagonal", 4, 17))
  ids = jnp.asarray(segment_ids(17))
  run = functools.partial(ops.newton_scan, cells.GRU, params, x, initial_state=state)
  h, final_state = jax.jit(lambda: run(segment_ids=ids, implementation="recurrent"))()
  expected = jax.jit(lambda: oracle(cells.GRU, params, x, state, segment_ids=ids))()
  np.testing.assert_array_equal(h, expected[0])
  np.testing.assert_array_equal(final_state, expected[1])


@pytest.mark.parametrize("method", ["newton", "quasi", "jacobi"])
def test_k_iterations_make_k_states_exact(method):
  """Whatever the iterates are, and whichever Jacobian is used; and damped alike."""
  T, k = 16, 5
  with jax.enable_x64(True):
    wild = dataclasses.replace(cells.ELMAN, box=None)
    params, x, state = draw("dense", 2, T, limit=3.0)
    params["W"] *= 3
    options = dict(method=method, damping=0.3 if method == "newton" else 0.0, iterations=k)
    run = functools.partial(stateful, wild, window=T, **options)
    h, _ = jax.jit(run)(params, x, state)
    expected, _ = jax.jit(functools.partial(oracle, wild))(params, x, state)
  error = np.abs(h - expected).max((0, 2))
  assert error[:k].max() < 1e-11
  assert error[k:].max() > 1e-3


@pytest.mark.parametrize("method", ["quasi", "jacobi"])
def test_gradients_are_exact_whatever_the_iterations_used(method):
  with jax.enable_x64(True):
    params, x, state = draw("dense", 2, 9)
    run = lambda p, x, s: newton_scan(
      cells.ELMAN, p, x, initial_state=s, method=method, iterations=9, relaxation=1.0
    )
    actual = jax.jit(with_gradients(run))(params, x, state)
    expected = jax.jit(with_gradients(functools.partial(oracle, cells.ELMAN)))(params, x, state)
  check(actual, expected)


def test_an_overriding_jacobian_steers_newton_and_not_the_gradients():
  with jax.enable_x64(True):
    params, x, state = draw("diagonal", 2, 8)
    rough = dataclasses.replace(cells.GRU, jacobian=lambda params, h, x: 0.5 * jnp.ones_like(h))
    run = lambda cell, **o: lambda p, x, s: newton_scan(cell, p, x, initial_state=s, **o)
    actual = jax.jit(with_gradients(run(rough, iterations=8)))(params, x, state)
    early = jax.jit(run(rough, iterations=2))(params, x, state)[0]
    expected = jax.jit(with_gradients(functools.partial(oracle, cells.GRU)))(params, x, state)
  check(actual, expected)
  assert np.abs(early - expected[0][0]).max() > 1e-3


def test_float32_and_bfloat16():
  """The limits of the default four iterations, and of three for the LSTM."""
  errors = {}
  for name, T, options in (("diagonal", 16384, {}), ("block", 2048, {"iterations": 3})):
    params, x, state = narrow(draw(name, 1, T))
    run = functools.partial(newton_scan, CELLS[name], **options)
    expected = jax.jit(functools.partial(oracle, CELLS[name]))(params, x, 0 * state)[0]
    errors[name] = np.abs(jax.jit(run)(params, x)[0] - expected).max()
  assert errors["diagonal"] <= 5e-6
  assert errors["block"] <= 1e-4
  params, x, state = narrow(draw("diagonal", 1, 300))
  h, final_state = jax.jit(functools.partial(newton_scan, cells.GRU))(
    params, x.astype(jnp.bfloat16)
  )
  assert (h.dtype, final_state.dtype) == (jnp.bfloat16, jnp.float32)
  expected = oracle(cells.GRU, params, x, 0 * state)[0]
  assert np.abs(h.astype(np.float32) - expected).max() <= 2e-2


def test_rotations_keep_their_precision():
  """|J| = 1 over 4096 tokens, in float32: nothing is forgotten."""
  T = 4096
  rng = np.random.default_rng(0)
  angle, state = rng.uniform(-3, 3, size=(1, T, D)), rng.normal(size=(1, 2, D))
  cell = ops.Cell(cells.rotate, "block")
  run = lambda *a: newton_scan(cell, a[0], a[1], initial_state=a[2], iterations=1)[0]
  h = jax.jit(run)(np.zeros(D, np.float32), angle.astype(np.float32), state.astype(np.float32))
  with jax.enable_x64(True):
    angle = angle.astype(np.float32).astype(np.float64)
    state = state.astype(np.float32).astype(np.float64)
    expected = oracle(cell, np.zeros(D), angle, state)[0]
  assert np.abs(h - expected).max() <= 1e-4


def test_a_flip_flop_needs_its_box():
  rng = np.random.default_rng(0)
  x = rng.choice([-1.0, 1.0], size=(2, 300, D)).astype(np.float32)
  a, state = np.full(D, 3.0, np.float32), jnp.ones((2, D))
  boxed = convergence(cells.TOGGLE, a, x, state, iterations=8)
  assert (boxed.error[6:] < 1e-5).all()
  free = convergence(dataclasses.replace(cells.TOGGLE, box=None), a, x, state, iterations=8)
  assert (free.residual[1:4] > 1).any()
  assert free.error[6] > 0.5

  def flagged(cell, **options):
    return newton_scan(cell, a, x, initial_state=state, window=300, report=True, **options)

  unboxed = dataclasses.replace(cells.TOGGLE, box=None)
  _, _, report = jax.jit(lambda: flagged(unboxed, iterations=3))()
  assert report.residual > 1 or np.isnan(report.residual)
  h, _, report = jax.jit(lambda: flagged(cells.TOGGLE, iterations=8))()
  assert report.residual < 1e-6
  np.testing.assert_allclose(h, oracle(cells.TOGGLE, a, x, state)[0], atol=1e-5)


def test_a_chaotic_cell_falls_back_bit_for_bit_and_says_so():
  gradient, h, final_state, report = cells.chaos(200, "fallback")
  assert report.fell_back and report.residual > 1e-3
  exact_gradient, expected, exact_state, loop_report = cells.chaos(200, "ignore", "recurrent")
  assert not loop_report.fell_back
  np.testing.assert_array_equal(h, expected)
  np.testing.assert_array_equal(final_state, exact_state)
  np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-5)


def test_other_policies(capfd):
  _, ignored, _, report = cells.chaos(200, "ignore")
  assert np.isfinite(ignored).all() and not report.fell_back
  assert "residual" not in capfd.readouterr().out
  cells.chaos(200, "warn")
  jax.effects_barrier()
  assert capfd.readouterr().out.count("newton_scan: residual 1.") == 1
  gradient, h, final_state, _ = cells.chaos(200, "nan")
  assert np.isnan(h).all() and np.isnan(final_state).all() and np.isnan(gradient)


def test_good_cells_are_left_alone_by_every_policy(capfd):
  params, x, state = narrow(draw("diagonal", 2, 40))
  run = lambda policy: newton_scan(cells.GRU, params, x, initial_state=state, policy=policy)[0]
  h = jax.jit(lambda: [run(policy) for policy in ("ignore", "warn", "fallback", "nan")])()
  jax.effects_barrier()
  assert "residual" not in capfd.readouterr().out
  for other in h[1:]:
    np.testing.assert_allclose(other, h[0], rtol=1e-6)


def test_tolerance_stops_early_and_counts():
  params, x, state = narrow(draw("diagonal", 2, 40))
  run = lambda **o: newton_scan(cells.GRU, params, x, initial_state=state, report=True, **o)
  h, _, report = jax.jit(lambda: run(tolerance=1e-5, iterations=30))()
  assert 2 <= report.iterations <= 5 and report.residual <= 1e-5
  np.testing.assert_allclose(h, oracle(cells.GRU, params, x, state)[0], atol=3e-5)
  assert jax.jit(lambda: run(tolerance=1e-5, iterations=1))()[2].iterations == 1


def test_padding_changes_nothing_and_nan_stays_in_its_document():
  """Values and gradients of other documents, bit for bit."""
  ids = np.repeat([0, -1, 1, 0], [6, 2, 5, 6]).astype(np.int32)[None].repeat(2, 0)
  document = np.repeat([0, -1, 1, 2], [6, 2, 5, 6])
  params, x, state = narrow(draw("block", 2, len(document)))
  run = lambda p, x, s: newton_scan(cells.LSTM, p, x, initial_state=s, segment_ids=jnp.asarray(ids))
  run = jax.jit(with_gradients(run))
  (clean, clean_state), clean_gradients = run(params, x, state)
  for poisoned in (-1, 0, 1, 2):
    spoilt = np.array(x)
    spoilt[0, document == poisoned] = np.nan
    (h, final_state), gradients = run(params, spoilt, state)
    healthy = document != poisoned
    np.testing.assert_array_equal(h[0, healthy], clean[0, healthy])
    np.testing.assert_array_equal(gradients[2][0, healthy], clean_gradients[2][0, healthy])
    np.testing.assert_array_equal(h[1], clean[1])
    if poisoned == -1:
      jax.tree.map(np.testing.assert_array_equal, gradients, clean_gradients)
    else:
      assert np.isnan(h[0, document == poisoned]).any()
    if poisoned > 0:
      np.testing.assert_array_equal(gradients[3][0], clean_gradients[3][0])
    if poisoned != 2:
      np.testing.assert_array_equal(final_state[0], clean_state[0])


def test_composes_with_vmap_remat_and_shard_map():
  params, x, state = narrow(draw("diagonal", 4, 5))
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
  rows, whole = PartitionSpec("data"), PartitionSpec()
  layer = jax.checkpoint(lambda p, x, s: newton_scan(cells.GRU, p, x, initial_state=s)[0])

  def loss(wrap):
    mapped = wrap(layer)
    return jax.jit(jax.value_and_grad(lambda p, x, s: jnp.sin(mapped(p, x, s)).sum(), (0, 1, 2)))

  over_rows = lambda f: lambda p, x, s: jax.vmap(f, (None, 0, 0))(p, x[:, None], s[:, None])
  over_devices = lambda f: jax.shard_map(f, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows)
  loop = lambda f: lambda p, x, s: oracle(cells.GRU, p, x, s)[0]
  expected = loss(loop)(params, x, state)
  for wrap in (over_rows, over_devices):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, loss(wrap)(params, x, state), expected)


def test_the_shape_of_a_state_is_guessed():
  for name, cell in CELLS.items():
    params, x, state = jax.tree.map(jnp.asarray, draw(name, 2, 3))
    h, final_state = jax.eval_shape(functools.partial(newton_scan, cell), params, x)
    assert final_state.shape == state.shape and h.shape == (2, 3, *state.shape[1:])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(method="broyden"), "method is 'broyden'"),
    (dict(policy="raise"), "policy is 'raise'"),
    (dict(iterations=-1), "iterations is -1"),
    (dict(window=0), "window is 0"),
    (dict(initial_state=jnp.zeros((2, D + 1, 1))), "initial_state has shape"),
    (dict(initial_state=jnp.zeros((3, D))), "initial_state has shape"),
    (dict(segment_ids=jnp.zeros((2, 9), jnp.int32)), "segment_ids has shape"),
    (dict(implementation="chunked"), "'chunked' is not one of"),
  ],
)
def test_mistakes_are_named(options, message):
  params, x, _ = narrow(draw("diagonal", 2, 4))
  with pytest.raises(ValueError, match=message):
    newton_scan(cells.GRU, params, x, **{"initial_state": jnp.zeros((2, D)), **options})


@pytest.mark.parametrize("box", [None, 1.0])
@pytest.mark.parametrize("where", ["input", "initial state"])
def test_nan_goes_as_far_as_in_the_loop_and_no_further(box, where):
  cell = ops.Cell(lambda a, h, x: jnp.tanh(a * h + x), "diagonal", box)
  x, state, ids = cells.spoilt(where, [10, 10, 10])
  scan = lambda **options: ops.newton_scan(
    cell, jnp.float32(0.5), x, initial_state=state, segment_ids=ids, **options
  )
  expected = scan(implementation="recurrent")
  assert np.isnan(expected[0]).sum() == (8 if where == "input" else 10)
  actual = scan(implementation="parallel", iterations=10, window=8)
  np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)
  np.testing.assert_allclose(actual[1], expected[1], atol=1e-5)


def test_a_state_is_not_guessed_from_the_number_of_rows():
  x = jnp.ones((3, 8))
  with pytest.raises(ValueError, match="the shape of a state cannot be guessed"):
    ops.newton_scan(ops.Cell(lambda p, h, x: jnp.tanh(p * h + x), "diagonal"), 0.5, x)
  with pytest.raises(ValueError, match="step cannot take a state of"):
    ops.newton_scan(
      ops.Cell(lambda p, h, x: jnp.tanh(p * h + x), "diagonal"), 0.5, x, initial_state=x[:, :3]
    )


def test_a_false_structure_is_found_where_half_of_all_numbers_have_no_root():
  step = lambda p, h, x: jnp.tanh(jnp.sqrt(p["s"]) * (h @ p["m"]) + x)
  params = {"s": jnp.float32(0.5), "m": jnp.ones((3, 3))}
  with pytest.raises(ValueError, match="channels mix"):
    ops.newton_scan(ops.Cell(step, "diagonal"), params, jnp.ones((2, 4, 3)))
