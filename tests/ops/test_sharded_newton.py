"""Nonlinear recurrences where time is split: iterate by iterate as on one device."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ops
from experiments.collectives import collectives
from ops import reference, sharded
from tests.ops import cells
from tests.ops.cells import CELLS, D, draw, narrow
from tests.ops.compare import objective
from tests.ops.test_sharded import T, documents, make_mesh
from tests.quick_compilation import quick_compilation as quick_compilation

B, P = 4, 8
TRIED = {**CELLS, "toggle": cells.TOGGLE}
# Far from the solution: cut off by the box, and each step too short.
HARD = dict(iterations=3, damping=0.1, relaxation=0.9)
PARALLEL = dict(implementation="parallel")
RUNS = {
  "loop": dict(implementation="recurrent"),
  "newton": dict(**PARALLEL, **HARD, window=T),
  "quasi": dict(**PARALLEL, **HARD, method="quasi"),
  "jacobi": dict(**PARALLEL, iterations=4, method="jacobi"),
}


def draw_all():
  """Inputs of every cell, of which Newton's first iterates are far from solutions; the flip-flop's
  are outside its box."""
  inputs = {name: jax.tree.map(lambda a: 2 * a, draw(name, B, T, limit=2.0)) for name in CELLS}
  rng = np.random.default_rng(0)
  signs = rng.choice([-1.0, 1.0], size=(B, T, D))
  return {**inputs, "toggle": (np.full(D, 3.0), signs, rng.normal(size=(B, D)))}


def everything(names, runs, packed, reverse, inputs):
  """States, final states, reports and all gradients, of every cell in every way."""
  ids = {"segment_ids": jnp.asarray(documents())} if packed else {}

  def one(name, options):
    leaves, treedef = jax.tree.flatten(inputs[name])

    def loss(moved):
      params, x, state = jax.tree.unflatten(
        treedef, [moved.get(i, leaf) for i, leaf in enumerate(leaves)]
      )
      h, final_state, report = ops.newton_scan(
        TRIED[name], params, x, initial_state=state, reverse=reverse, report=True, **ids, **options
      )
      return objective(h, final_state), (h, final_state, report)

    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    moved = {i: leaf for i, leaf in enumerate(leaves) if floating(leaf)}
    return jax.grad(loss, has_aux=True)(moved)

  # A diagonal taken out of a map, and no map at all: each once.
  only = {"quasi": "dense", "jacobi": "block"}
  return {
    f"{name} {run}": one(name, RUNS[run])
    for run in runs
    for name in names
    if only.get(run, name) == name
  }


@pytest.mark.parametrize(
  ("layout", "method", "packed", "reverse", "names", "runs"),
  [
    ((2, 2, 2), "auto", True, True, ("diagonal", "dense"), ("loop", "newton")),
    ((1, 1, 8), "all_scan", True, False, ("toggle", "block"), ("newton",)),
    ((1, 2, 4), "doubling", False, True, ("block", "dense"), ("newton",)),
    ((1, 1, 8), "all_gather", True, False, tuple(CELLS), ("loop", "quasi", "jacobi")),
  ],
)
def test_every_iterate_is_that_of_one_device(layout, method, packed, reverse, names, runs):
  """Values, residuals, all gradients; of states that are no solutions yet."""
  with jax.enable_x64(True):
    run = lambda: jax.jit(functools.partial(everything, names, runs, packed, reverse))(draw_all())
    expected = run()
    with jax.set_mesh(make_mesh(*layout)), sharded.exchange(method, blocks=3):
      actual = run()
  for name, one in actual.items():
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=name)
    jax.tree.map(close, one, expected[name])
    residual = one[1][2].residual
    assert residual == 0 if "loop" in name else residual > 1e-2


def test_rounding_at_a_border_does_not_stay():
  """Increments of 1e4 and more on the way to states of size 1, in float32."""
  cell = ops.Cell(cells.toggle, "diagonal")
  rng = np.random.default_rng(1)
  x = rng.choice([-1.0, 1.0], size=(64, 64, D)) * rng.uniform(0.7, 1, size=(64, 64, D))
  a, x, state = np.full(D, 2.0, np.float32), x.astype(np.float32), jnp.full((64, D), 0.9)
  run = lambda n: ops.newton_scan(
    cell, a, x, initial_state=state, iterations=n, report=True, **PARALLEL
  )
  with jax.set_mesh(make_mesh(seq=4)):
    (early, *_), (h, _, report) = jax.jit(lambda: (run(1), run(60)))()
  assert np.abs(early).max() > 1e4
  assert report.residual < 1e-6
  np.testing.assert_allclose(h, reference.nonlinear_scan(cell.step, a, x, state)[0], atol=1e-5)


def test_policies(capfd):
  exact_gradient, expected, exact_state, _ = cells.chaos(80, "ignore", "recurrent")
  with jax.set_mesh(make_mesh(data=2, seq=4)):
    gradient, h, final_state, report = cells.chaos(80, "fallback")
    assert report.fell_back and report.residual > 1e-3
    np.testing.assert_array_equal(h, expected)
    np.testing.assert_array_equal(final_state, exact_state)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-5)
    cells.chaos(80, "warn")
    jax.effects_barrier()
    assert capfd.readouterr().out.count("newton_scan: residual 1.") == 1
    gradient, h, final_state, _ = cells.chaos(80, "nan")
    assert np.isnan(h).all() and np.isnan(final_state).all() and np.isnan(gradient)


def test_a_tolerance_stops_all_devices_at_once():
  params, x, state = narrow(draw("diagonal", 4, 40))
  run = lambda **o: ops.newton_scan(
    cells.GRU, params, x, initial_state=state, report=True, **PARALLEL, **o
  )
  expected = jax.jit(lambda: run(tolerance=1e-5, iterations=30))()
  with jax.set_mesh(make_mesh(data=2, seq=4)):
    h, _, report = jax.jit(lambda: run(tolerance=1e-5, iterations=30))()
    assert report.iterations == expected[2].iterations and report.residual <= 1e-5
    np.testing.assert_allclose(h, expected[0], atol=1e-6)
    with pytest.raises(ValueError, match="window is 10, expected None or at least T=40"):
      run(window=10)


@pytest.mark.parametrize("where", ["input", "initial state"])
def test_nan_goes_as_far_as_in_the_loop_and_no_further(where):
  """Over borders, to the end of its document."""
  cell = ops.Cell(lambda a, h, x: jnp.tanh(a * h + x), "diagonal", 1.0)
  x, state, ids = cells.spoilt(where, [10, 11, 11])
  scan = lambda **options: ops.newton_scan(
    cell, jnp.float32(0.5), x, initial_state=state, segment_ids=ids, **options
  )
  expected = scan(implementation="recurrent")
  assert np.isnan(expected[0]).sum() == (9 if where == "input" else 10)
  with jax.set_mesh(make_mesh()):
    for options in (dict(iterations=12, **PARALLEL), dict(implementation="recurrent")):
      actual = jax.jit(functools.partial(scan, **options))()
      np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)
      np.testing.assert_allclose(actual[1], expected[1], atol=1e-5)


def sent(structure, T, method, **options):
  """(where, kind, bytes a device sends) -> how often, in a forward and a backward pass."""
  mesh = make_mesh(seq=P)
  params, x, state = narrow(draw(structure, B, 1))
  placed = NamedSharding(mesh, jax.P(None, "seq"))
  longer = lambda leaf: jax.ShapeDtypeStruct(
    (B, T, *leaf.shape[2:]), leaf.dtype, sharding=placed
  )  # fmt: skip

  def step(x):
    scan = lambda x: ops.newton_scan(
      CELLS[structure], params, x, initial_state=state, iterations=5, **options
    )
    h, pull = jax.vjp(lambda x: scan(x)[0], x)
    return h, pull(h)

  with jax.set_mesh(mesh), sharded.exchange(method):
    text = jax.jit(step).lower(jax.tree.map(longer, x)).compile().as_text()
  count = Counter()
  for one in collectives(text):
    inside = [part for part in ("cond", "while") if f"/{part}/" in one.source]
    count[(*inside[:1], one.kind, one.bytes)] += one.count
  return count


def expected_to_be_sent(d, a, method):
  """Of states of d bytes and Jacobians of a: five iterations, what is around them, the backward
  pass, and, should something not be finite, how far it reaches."""
  halo = ("collective-permute", d)
  exchange = {
    "all_gather": Counter([("all-gather", (P - 1) * d), ("all-gather", (P - 1) * a)]),
    "all_scan": Counter({halo: P - 1}),
    "doubling": Counter({halo: 4}) + Counter({("collective-permute", a): 3}),
  }[method]
  flags = {
    "all_gather": Counter({("all-gather", (P - 1) * d): 1}),
    "all_scan": Counter({halo: P - 1}),
    "doubling": Counter({halo: 4 + 3}),
  }[method]
  count = Counter({("all-reduce", 2 * (P - 1) / P * 8): 1, halo: 2}) + exchange
  for once, part, times in ((exchange, "while", 5), (flags, "cond", 1)):
    for one, n in (once + Counter([halo])).items():
      count[part, *one] = n * times
  return count


@pytest.mark.parametrize(
  ("structure", "d", "a", "T", "method"),
  [
    ("block", 2, 4, 32, "all_gather"),
    ("block", 2, 4, 256, "all_gather"),
    ("block", 2, 4, 32, "doubling"),
    ("dense", 1, D, 32, "all_scan"),
  ],
)
def test_what_is_sent(structure, d, a, T, method):
  row = B * D * 4
  actual = sent(structure, T, method, **PARALLEL)
  assert actual == expected_to_be_sent(d * row, a * row, method)


def test_a_chain_sends_a_state_a_round():
  actual = sent("diagonal", 32, "all_gather", implementation="recurrent")
  assert actual == {("while", "collective-permute", B * D * 4): 2 * P}
