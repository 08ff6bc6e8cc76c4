"""Graphs prepared on the host: unions, padding, levels, orientation, pruning, mistakes."""

import numpy as np
import pytest

from ops import dag
from tests.ops.graphs import grid, random_graph


def path_counts(edges, lines) -> np.ndarray:
  """How many paths of line edges lead to each edge from each: the inverse of I - A."""
  A = np.zeros((len(edges), len(edges)))
  for a, b in lines:
    A[b, a] += 1
  return np.rint(np.linalg.inv(np.eye(len(edges)) - A)).astype(int)


def all_lines(graph) -> set:
  """Every (a, b) such that edge a enters the node that edge b leaves."""
  edges = np.asarray(graph.edges).reshape(-1, 2)
  return {(a, b) for a, (_, n) in enumerate(edges) for b, (m, _) in enumerate(edges) if n == m}


def graphs():
  rng = np.random.default_rng(0)
  return [random_graph(rng, n, p) for n, p in [(7, 0.6), (1, 0.0), (4, 0.0), (9, 0.4), (2, 1.0)]]


def test_a_union_keeps_the_order_of_nodes_and_edges_and_pads_with_nothing():
  given = graphs()
  batch = dag.dag_batch(given, places=7, nodes=30, edges=50, line_edges=80, depth=10, width=40)
  assert [x.shape for x in batch] == [(50,), (50,), (80,), (80,), (10, 40), (30,), (7,), (7,)]
  assert all(x.dtype == np.int32 for x in batch)
  assert batch.node_count.tolist() == [7, 1, 4, 9, 2, 0, 0]
  assert batch.edge_count.tolist() == [len(graph.edges) for graph in given] + [0, 0]
  assert batch.node_graph.tolist() == [0] * 7 + [1] + [2] * 4 + [3] * 9 + [4] * 2 + [7] * 7
  ends, lines, node, edge = [], set(), 0, 0
  for graph in given:
    ends += [(tail + node, head + node) for tail, head in np.reshape(graph.edges, (-1, 2))]
    lines |= {(a + edge, b + edge) for a, b in all_lines(graph)}
    node, edge = node + graph.nodes, edge + len(graph.edges)
  assert list(zip(batch.tail, batch.head)) == ends + [(30, 30)] * (50 - edge)
  pairs = list(zip(batch.line_in.tolist(), batch.line_out.tolist()))
  assert set(pairs[: len(lines)]) == lines and pairs[len(lines) :] == [(50, 50)] * (80 - len(lines))


def test_a_state_is_complete_before_it_is_passed_on():
  batch = dag.dag_batch(graphs(), line_edges=80, depth=10)
  for graph in (batch, dag.reverse(batch)):
    row = {line: i for i, level in enumerate(graph.levels) for line in level.tolist()}
    real = [m for m in range(80) if graph.line_in[m] < len(graph.tail)]
    assert set(row) == {*real, 80} and np.sum(graph.levels < 80) == len(real)
    for m in real:
      assert all(row[p] < row[m] for p in real if graph.line_out[p] == graph.line_in[m])


def test_sizes_are_what_is_needed_unless_given():
  batch = dag.dag_batch([(3, [(0, 1), (1, 2)])])
  assert [x.shape for x in batch] == [(2,), (2,), (1,), (1,), (1, 1), (3,), (1,), (1,)]
  # Nothing at all still has a size, for programs want arrays of something.
  empty = dag.dag_batch([(1, [])])
  assert empty.tail.tolist() == [1] and empty.line_in.tolist() == [1]
  assert empty.levels.tolist() == [[1]]


def test_sizes_of_a_data_set_fit_every_batch():
  rng = np.random.default_rng(1)
  given = [random_graph(rng, int(rng.integers(1, 9)), 0.5) for _ in range(12)]
  sizes = dag.dag_sizes(given, 4)
  largest = [given[i] for i in np.argsort([len(graph.edges) for graph in given])[-4:]]
  exact = dag.dag_batch(largest)
  assert sizes["places"] == 4 and sizes["edges"] == len(exact.tail)
  for _ in range(20):
    dag.dag_batch([given[i] for i in rng.choice(12, 4, replace=False)], **sizes)


def test_reversal_keeps_every_number():
  batch = dag.dag_batch(graphs(), nodes=30, edges=50)
  back = dag.reverse(batch)
  assert back.tail is batch.head and back.head is batch.tail
  assert back.line_in is batch.line_out and back.line_out is batch.line_in
  for name in ("node_graph", "node_count", "edge_count"):
    assert getattr(back, name) is getattr(batch, name)
  assert all(np.array_equal(x, y) for x, y in zip(dag.reverse(back), batch))


def test_an_undirected_graph_is_led_from_lower_to_higher_nodes():
  both_ways = [(2, 0), (0, 2), (3, 1), (1, 3), (1, 0), (0, 1), (1, 0)]
  graph, rows = dag.orient(4, both_ways)
  assert graph.nodes == 4 and graph.edges.tolist() == [[0, 2], [1, 3], [0, 1]]
  assert rows.tolist() == [0, 2, 4]
  assert dag.orient(2, [])[0].edges.shape == (0, 2)


def test_a_multitree_has_at_most_one_path_between_two_edges():
  rng = np.random.default_rng(2)
  dropped = 0
  for n in (3, 5, 8, 8, 8, 10, 12):
    graph = random_graph(rng, n, 0.6)
    lines = all_lines(graph)
    single = path_counts(graph.edges, lines).max() <= 1
    assert dag.at_most_one_path(graph) == single
    tree = dag.multitree(graph)
    kept = {tuple(line) for line in tree.line_edges.tolist()}
    assert kept <= lines and (kept == lines) == single
    assert path_counts(graph.edges, kept).max() <= 1 and dag.at_most_one_path(tree)
    # None that was left out could have been kept: it would make a second path.
    for line in lines - kept:
      assert path_counts(graph.edges, kept | {line}).max() > 1
    dropped += len(lines - kept)
  assert dropped > 20
  assert dag.at_most_one_path(dag.multitree(grid(4, 5)[0]))


def test_what_a_multitree_keeps_depends_on_the_numbering():
  diamond = [(0, 1), (0, 2), (1, 3), (2, 3)]  # then on, from where both ways meet
  graph = dag.Graph(6, [(4, 0), *diamond, (3, 5)])
  swapped = dag.Graph(6, [(4, 0), *diamond[::-1], (3, 5)])
  nodes = lambda tree: {
    (*tree.edges[a].tolist(), int(tree.edges[b, 1])) for a, b in tree.line_edges
  }
  trees = [nodes(dag.multitree(graph)) for graph in (graph, swapped)]
  assert len(trees[0]) == len(trees[1]) == 5 and trees[0] != trees[1]


MISTAKES = [
  ([], {}, "graphs is empty, expected at least one graph"),
  ([(0, [])], {}, "graph 0 has 0 nodes, expected at least 1"),
  ([(2, [(0, 1)]), (3, [(0, 3)])], {}, r"graph 1: edge 0 is \(0, 3\), expected nodes from 0 to 2"),
  ([(3, [(-1, 2)])], {}, r"graph 0: edge 0 is \(-1, 2\), expected nodes from 0 to 2"),
  ([(3, [(0.0, 1.0)])], {}, r"graph 0: edges are float64 \(1, 2\), expected integers \[_ 2\]"),
  ([(3, [0, 1, 2])], {}, r"graph 0: edges are int64 \(3,\), expected integers \[_ 2\]"),
  ([(3, [(0, 1), (1, 1)])], {}, "graph 0: edge 1 leads from node 1 to itself"),
  ([(3, [(0, 1), (1, 2), (0, 1)])], {}, "graph 0 has two edges 0 -> 1; parallel_edges=True allows"),
  ([(2, [(0, 1)], [(0, 1)])], {}, r"line edge 0 is \(0, 1\), expected edges from 0 to 0"),
  ([(3, [(0, 1), (1, 2)], [(1, 0)])], {}, "line edge 0 leads from edge 1, which enters node 2, to"),
  ([(3, [(0, 1), (1, 2)], [(0, 1), (0, 1)])], {}, "graph 0 has the same line edge twice"),
  ([(3, [(0, 1), (1, 2)])], {"places": 0}, "places is 0, these graphs need at least 1"),
  ([(3, [(0, 1), (1, 2)])], {"nodes": 2}, "nodes is 2, these graphs need at least 3"),
  ([(3, [(0, 1), (1, 2)])], {"edges": 1}, "edges is 1, these graphs need at least 2"),
  ([(4, [(0, 1), (1, 2), (1, 3)])], {"line_edges": 1}, "line_edges is 1, these graphs need at"),
  ([(4, [(0, 1), (1, 2), (2, 3)])], {"depth": 1}, "depth is 1, these graphs need at least 2"),
  ([(4, [(0, 1), (1, 2), (1, 3)])], {"width": 1}, "width is 1, these graphs need at least 2"),
]


@pytest.mark.parametrize("given, sizes, message", MISTAKES)
def test_a_mistake_is_named_in_one_line(given, sizes, message):
  with pytest.raises(ValueError, match=message) as error:
    dag.dag_batch(given, **sizes)
  assert "\n" not in str(error.value)


def test_an_edge_on_a_cycle_is_named():
  # A way in and a way out are not on the cycle 1 -> 2 -> 3 -> 1.
  edges = [(0, 1), (3, 4), (1, 2), (2, 3), (3, 1), (4, 5)]
  for order in np.random.default_rng(3).permuted(np.tile(np.arange(6), (10, 1)), axis=1):
    shuffled = [edges[i] for i in order]
    with pytest.raises(ValueError, match="lies on a cycle") as error:
      dag.dag_batch([(6, shuffled)])
    named = int(str(error.value).split("edge ")[1].split(",")[0])
    assert shuffled[named] in [(1, 2), (2, 3), (3, 1)]


def test_parallel_edges_hold_a_state_each_where_they_are_allowed():
  batch = dag.dag_batch([(3, [(0, 1), (0, 1), (1, 2)])], parallel_edges=True)
  assert batch.line_in.tolist() == [0, 1] and batch.line_out.tolist() == [2, 2]
