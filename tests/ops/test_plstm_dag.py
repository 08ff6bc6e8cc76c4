"""pLSTM on graphs: every form equals the oracle, and the oracle the ones for chains and grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import dag, reference
from ops.plstm_dag import dag_largest_column_sum
from tests.ops.compare import cast, check, compiled, truth
from tests.ops.graphs import grid, random_graph
from tests.quick_compilation import quick_compilation as quick_compilation

IMPLEMENTATIONS = ("recurrent", "levels", "resolvent")
SIZES = dict(places=9, nodes=44, edges=64, line_edges=100, depth=11, width=30)
H, K, V = 2, 3, 5


@functools.cache
def batch() -> ops.DagBatch:
  """Dense and sparse graphs, a multitree, a chain, two edges side by side, hardly anything."""
  rng = np.random.default_rng(4)
  chain = dag.Graph(10, np.stack([np.arange(9), np.arange(1, 10)], 1))  # its depth, 8, is over 7
  graphs = [
    random_graph(rng, 7, 0.8), dag.Graph(1, []), random_graph(rng, 9, 0.3), dag.Graph(3, []),
    dag.multitree(random_graph(rng, 7, 0.8)), chain, (3, [(2, 0), (2, 0), (0, 1)]),
  ]  # fmt: skip
  return ops.dag_batch(graphs, **SIZES, parallel_edges=True)


def draw(graph, seed: int = 0) -> dict:
  """Inputs in float64, zero at padding; transitions are negative as well, and some are zero."""
  rng = np.random.default_rng(seed)
  (N,), (E,), (M,) = (x.shape for x in (graph.node_graph, graph.tail, graph.line_in))
  shapes = dict(
    q=(N, H, K), k=(N, H, K), v=(N, H, V), source=(E, H), transition=(M, H), mark=(E, H),
    direct=(N, H), initial_state=(E, H, K, V),
  )  # fmt: skip
  inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  inputs["transition"] *= (rng.random((M, H)) < 1 / 2) | (graph.line_in[:, None] >= 20)
  return {name: np.where(real(graph, x), x, 0.0) for name, x in inputs.items()}


def real(graph, x) -> np.ndarray:
  """Mask over the rows of `x`, of nodes, edges or line edges: not padding."""
  masks = {
    len(graph.node_graph): graph.node_graph < len(graph.node_count),
    len(graph.tail): graph.tail < len(graph.node_graph),
    len(graph.line_in): graph.line_in < len(graph.tail),
  }
  return masks[len(x)].reshape(-1, *(1,) * (x.ndim - 1))


def everything(op, inputs, graph, dtype="float64", **options) -> dict:
  """Values and all gradients; `graph` is data for the program, as it is in a model."""
  with jax.enable_x64(dtype == "float64"):
    arrays = jax.tree.map(jnp.asarray, (cast(inputs, dtype), {"graph": graph}))
    return jax.tree.map(np.asarray, compiled(op, **options)(*arrays))


@functools.cache
def expected(dtype: str) -> dict:
  return truth(oracle(), cast(draw(batch()), dtype))


@functools.cache
def oracle():
  """One function, so that it is compiled once."""
  return functools.partial(reference.plstm_dag, graph=batch())


def poisoned(inputs, graph) -> dict:
  """The inputs with NaN at padding."""
  return {name: np.where(real(graph, x), x, np.nan) for name, x in inputs.items()}


@pytest.mark.parametrize(
  "dtype, implementation",
  [("float64", name) for name in IMPLEMENTATIONS]
  + [("float32", "levels"), ("float32", "resolvent"), ("bfloat16", "levels")],
)
def test_each_form_equals_the_oracle_whatever_stands_at_padding(dtype, implementation):
  inputs = poisoned(draw(batch()), batch())
  actual = everything(ops.plstm_dag, inputs, batch(), dtype, implementation=implementation)
  check(actual, expected(dtype), dtype, implementation)
  if dtype == "float32":
    for name, y in expected(dtype).items():
      error = np.sqrt(np.mean((actual[name] - y) ** 2) / np.mean(y**2))
      assert error <= 2e-6, f"{name}: {error:.1e}"


def test_a_reversed_batch_equals_the_oracle_under_the_same_numbers():
  graph = dag.reverse(batch())
  inputs = draw(graph)
  with jax.enable_x64(True):
    o, state = jax.jit(lambda inputs: reference.plstm_dag(**inputs, graph=graph))(inputs)
    o, state = np.asarray(o), np.asarray(state)
  assert np.abs(o - expected("float64")["o"]).max() > 1
  for implementation in IMPLEMENTATIONS:
    actual = everything(ops.plstm_dag, inputs, graph, implementation=implementation)
    actual = {name: actual[name] for name in ("o", "state")}
    check(actual, {"o": o, "state": state}, "float64", implementation)


def test_graphs_of_a_batch_are_as_each_alone_and_nan_stays_in_its_own():
  graphs = [random_graph(np.random.default_rng(seed), 6, 0.7) for seed in range(3)]
  both = ops.dag_batch(graphs, **SIZES)
  inputs = draw(both)
  lines = np.where(both.line_in < SIZES["edges"])[0]
  spoilt = {**inputs, "k": inputs["k"].copy(), "transition": inputs["transition"].copy()}
  of_line = both.node_graph[both.tail[both.line_in[lines]]]
  spoilt["k"][both.node_graph == 0] = np.nan
  spoilt["transition"][lines[of_line == 2]] = np.inf
  nodes, edges = (both.node_graph == 1), np.zeros(SIZES["edges"], bool)
  edges[: sum(both.edge_count[:2])] = True
  edges[: both.edge_count[0]] = False

  alone = ops.dag_batch(graphs[1:2], **SIZES)
  place = {
    "n": nodes,
    "e": edges,
    "m": np.isin(np.arange(SIZES["line_edges"]), lines[of_line == 1]),
  }
  of = dict(
    q="n", k="n", v="n", direct="n", transition="m", source="e", mark="e", initial_state="e"
  )
  single = {
    name: np.concatenate([x[place[of[name]]], x[~place[of[name]]] * 0])
    for name, x in inputs.items()
  }
  truth = everything(ops.plstm_dag, single, alone, implementation="levels")
  for implementation in IMPLEMENTATIONS:
    for given in (inputs, spoilt):
      actual = everything(ops.plstm_dag, given, both, implementation=implementation)
      for name, mask in (("o", nodes), ("state", edges)):
        np.testing.assert_allclose(actual[name][mask], truth[name][: mask.sum()], atol=1e-12)
    assert np.isnan(actual["o"][both.node_graph == 0]).any(), "a poisoned graph says so"


def test_a_chain_equals_the_op_on_sequences():
  T = 6
  rng = np.random.default_rng(0)
  x = lambda *shape: rng.normal(size=shape)
  q, k, v, state = x(1, T, H, K), x(1, T, H, K), x(1, T, H, V), x(1, H, K, V)
  source, transition, mark, direct = (x(1, T, H) for _ in range(4))
  # Tokens are the nodes 1 to T; the first state enters from node 0, the last goes to node T + 1.
  graph = ops.dag_batch([(T + 2, [(n, n + 1) for n in range(T + 1)])])
  nodes = lambda y: np.pad(y[0], [(1, 1)] + [(0, 0)] * (y.ndim - 2))
  initial_state = np.zeros((T + 1, *state.shape[1:]))
  initial_state[0] = state[0]
  gates = nodes(source)[:-1], transition[0][graph.line_out - 1], nodes(mark)[1:], nodes(direct)
  inputs = nodes(q), nodes(k), nodes(v), *gates

  @jax.jit
  def all_three(q, k, v, source, transition, mark, direct, state, inputs, initial_state):
    gates = source, transition, mark, direct
    return [
      reference.plstm_1d(q, k, v, *gates, initial_state=state),
      ops.plstm_dag(*inputs, graph, initial_state=initial_state),
      reference.plstm_dag(*inputs, graph, initial_state=initial_state),
    ]

  with jax.enable_x64(True):
    (o, final_state), *graphs = all_three(
      q, k, v, source, transition, mark, direct, state, inputs, initial_state
    )
  for on_nodes, on_edges in graphs:
    np.testing.assert_allclose(on_nodes[1:-1], o[0], atol=1e-10)
    np.testing.assert_allclose(on_edges[-1], final_state[0], atol=1e-10)


def test_a_grid_equals_the_op_on_grids():
  Y, X = 3, 4
  rng = np.random.default_rng(0)
  x = lambda *shape: rng.normal(size=shape)
  q, k, v = x(1, Y, X, H, K), x(1, Y, X, H, K), x(1, Y, X, H, V)
  source, mark, direct = x(1, Y, X, H, 2), x(1, Y, X, H, 2), x(1, Y, X, H)
  transition, left, above = x(1, Y, X, H, 2, 2), x(1, Y, H, K, V), x(1, X, H, K, V)
  graph, edges = grid(Y, X)
  right, down = edges["right"], edges["down"]
  lines = {}  # (in, out) -> transition
  for y in range(Y):
    for column in range(X):
      ins = right[y, column], down[y, column]
      outs = right[y, column + 1], down[y + 1, column]
      for i, a in enumerate(ins):
        for o, b in enumerate(outs):
          lines[int(a), int(b)] = transition[0, y, column, :, o, i]
  graph = ops.dag_batch([graph])
  nodes = lambda y: np.pad(
    y[0].reshape(Y * X, *y.shape[3:]),
    [(0, len(graph.node_graph) - Y * X)] + [(0, 0)] * (y.ndim - 3),
  )
  E = len(graph.tail)
  sources, marks, initial_state = np.zeros((E, H)), np.zeros((E, H)), np.zeros((E, H, K, V))
  sources[right[:, 1:]], sources[down[1:]] = source[0, ..., 0], source[0, ..., 1]
  marks[right[:, :-1]], marks[down[:-1]] = mark[0, ..., 0], mark[0, ..., 1]
  initial_state[right[:, 0]], initial_state[down[0]] = left[0], above[0]
  transitions = np.stack([lines[pair] for pair in zip(graph.line_in, graph.line_out)])
  inputs = nodes(q), nodes(k), nodes(v), sources, transitions, marks, nodes(direct)

  @jax.jit
  def all_three(q, k, v, source, transition, mark, direct, borders, inputs, initial_state):
    gates = source, transition, mark, direct
    return [
      reference.plstm_2d(q, k, v, *gates, initial_state=borders),
      ops.plstm_dag(*inputs, graph, initial_state=initial_state),
      reference.plstm_dag(*inputs, graph, initial_state=initial_state),
    ]

  with jax.enable_x64(True):
    (o, borders), *graphs = all_three(
      q, k, v, source, transition, mark, direct, (left, above), inputs, initial_state
    )
  for on_nodes, on_edges in graphs:
    np.testing.assert_allclose(on_nodes[: Y * X].reshape(o[0].shape), o[0], atol=1e-10)
    np.testing.assert_allclose(on_edges[right[:, -1]], borders[0][0], atol=1e-10)
    np.testing.assert_allclose(on_edges[down[-1]], borders[1][0], atol=1e-10)


def sums(transition, index, size) -> np.ndarray:
  total = np.zeros((size, H))
  for t, i in zip(np.abs(transition), index):
    if i < size:
      total[i] += t
  return total


def test_normalised_transitions_keep_the_sum_of_states_bounded():
  graph, E = batch(), SIZES["edges"]
  raw = np.random.default_rng(0).normal(size=(SIZES["line_edges"], H)).astype(np.float32)
  raw[0] = 0.0
  raw = jnp.where(real(graph, raw), 100 * raw, np.nan)
  columns = jax.jit(ops.normalise_transitions)(raw, graph)
  assert np.all(np.asarray(columns)[~real(graph, raw)[:, 0]] == 0)
  total = sums(columns, graph.line_in, E)
  assert 0.99 < total.max() < 1
  np.testing.assert_allclose(dag_largest_column_sum(columns, graph), total.max(), rtol=1e-6)
  by_hand = raw / (0.5 + sums(raw, graph.line_in, E + 1)[graph.line_in])
  np.testing.assert_allclose(
    columns[real(graph, raw)[:, 0]], by_hand[real(graph, raw)[:, 0]], rtol=1e-6
  )

  rows = ops.normalise_transitions(raw, graph, over="in", alpha0=0.1)
  assert sums(rows, graph.line_out, E).max() < 1 < sums(rows, graph.line_in, E).max()
  assert dag_largest_column_sum(rows, graph) > 1
  # Reversed, what an edge leads to is what led to it.
  back = ops.normalise_transitions(raw, dag.reverse(graph))
  assert sums(back, graph.line_out, E).max() < 1

  gradient = jax.grad(lambda t: jnp.sum(ops.normalise_transitions(t, graph) ** 2))(raw)
  assert np.isfinite(gradient).all()
  for options, message in [
    ({"alpha0": 0.0}, "alpha0 is 0.0, must be above 0"),
    ({"over": "edges"}, "over is 'edges', must be 'out' or 'in'"),
  ]:
    with pytest.raises(ValueError, match=message):
      ops.normalise_transitions(raw, graph, **options)


def test_what_runs_and_what_cannot_is_said():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

  def inputs(N, E, M):
    edge, node = shape(E, H), shape(N, H)
    return shape(N, H, K), shape(N, H, K), shape(N, H, V), edge, shape(M, H), edge, node

  small = inputs(44, 64, 100)
  text = ops.explain(ops.plstm_dag, *small, batch())
  assert "levels     runs (" in text and "resolvent  can run" in text and "no kernel" in text
  with ops.for_platform("gpu"):
    assert "resolvent  runs (" in ops.explain(ops.plstm_dag, *small, batch())
  long = ops.dag_batch([(2000, [(n, n + 1) for n in range(1999)])])
  large = inputs(2000, 1999, 1998)
  assert "cannot run: 1999 edges" in ops.explain(ops.plstm_dag, *large, long)
  with pytest.raises(ValueError, match="'resolvent' cannot run: 1999 edges make matrices"):
    ops.explain(ops.plstm_dag, *large, long, implementation="resolvent")
  unchecked = ops.plstm_dag.__wrapped__
  wrong = list(jnp.zeros(x.shape) for x in small)
  wrong[3] = jnp.zeros((63, H))
  with pytest.raises(ValueError, match=r"source has shape \(63, 2\), expected \[E H\] with E=64"):
    unchecked(*wrong, batch())
