"""Directed acyclic graphs, prepared on the host: batches of them as arrays of fixed sizes.

A recurrence on a graph keeps a state on each edge. A state passes from edge a to edge b where b
leaves the node that a enters: such a pair (a, b) is a line edge, for it is an edge of the line
graph, whose nodes are the edges. The level of an edge is the number of line edges on the longest
path that ends there; one level after the other is the order in which states can be computed.

Several graphs become one, the disjoint union, which is padded to sizes that stay the same from
batch to batch so that nothing is compiled again. Padding is an index one past the last: what it
reads is zero, what it writes is dropped.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

Integers = np.ndarray | Array  # numpy arrays from `dag_batch`; JAX's inside a transformed function


class Graph(NamedTuple):
  """One directed acyclic graph."""

  nodes: int  # how many there are
  edges: Int[np.ndarray, "E 2"]  # (tail, head): the node it leaves, the node it enters
  line_edges: Int[np.ndarray, "M 2"] | None = None  # (in, out): pairs of edges; None is all


class DagBatch(NamedTuple):
  """G graphs side by side: N nodes, E edges, M line edges, padding included.

  Nodes are those of the first graph, then those of the second, and so on, each graph's in its own
  order; so are edges. Line edges are in the order of their levels.
  """

  tail: Int[Integers, " E"]  # the node that an edge leaves; N is padding
  head: Int[Integers, " E"]  # the node that it enters; N is padding
  line_in: Int[Integers, " M"]  # edge from which a line edge leads; E is padding
  line_out: Int[Integers, " M"]  # edge to which it leads; E is padding
  levels: Int[Integers, "depth width"]  # line edges of each level of `line_out`; M is padding
  node_graph: Int[Integers, " N"]  # graph of a node; G is padding
  node_count: Int[Integers, " G"]  # nodes of a graph; 0 is an empty place
  edge_count: Int[Integers, " G"]  # edges of a graph


def dag_batch(
  graphs: Iterable[Graph | tuple],
  *,
  places: int | None = None,
  nodes: int | None = None,
  edges: int | None = None,
  line_edges: int | None = None,
  depth: int | None = None,
  width: int | None = None,
  parallel_edges: bool = False,
) -> DagBatch:
  """The disjoint union of `graphs`, padded. `dag_sizes` finds sizes for all batches of a data set.

  Args:
    graphs: `Graph` or (nodes, edges [E 2]) each; `orient` makes one of an undirected graph,
      `multitree` one with at most one path between two edges.
    places: graphs there is room for; None, here and below, is what these graphs need.
    nodes: nodes in all.
    edges: edges in all.
    line_edges: line edges in all.
    depth: levels.
    width: line edges of one level.
    parallel_edges: two edges may have the same tail and the same head, and then hold a state each.

  Raises:
    ValueError: an edge or a line edge that cannot be, a cycle, a size that is too small.
  """
  graphs = [Graph(*graph) for graph in graphs]
  if not graphs:
    raise ValueError("graphs is empty, expected at least one graph")
  laid = [_lay_out(graph, f"graph {i}", parallel_edges) for i, graph in enumerate(graphs)]
  G = _size("places", len(graphs), places)
  node_count = [graph.nodes for graph in graphs]
  edge_count = [len(one.edges) for one in laid]
  N, E = _size("nodes", sum(node_count), nodes), _size("edges", sum(edge_count), edges)

  first_node, first_edge = (np.cumsum([0, *counts[:-1]]) for counts in (node_count, edge_count))
  ends = np.concatenate([one.edges + start for one, start in zip(laid, first_node)])
  lines = np.concatenate([one.lines + start for one, start in zip(laid, first_edge)])
  level = np.concatenate([one.level for one in laid])
  M = _size("line_edges", len(lines), line_edges)
  order = np.argsort(level, kind="stable")
  lines, per_level = lines[order], np.bincount(level)[1:]
  table = np.full(
    (_size("depth", len(per_level), depth), _size("width", max(per_level, default=0), width)),
    M, np.int32,
  )  # fmt: skip
  for row, first, count in zip(table, np.cumsum([0, *per_level]), per_level):
    row[:count] = np.arange(first, first + count)
  return DagBatch(
    tail=_padded(ends[:, 0], E, N),
    head=_padded(ends[:, 1], E, N),
    line_in=_padded(lines[:, 0], M, E),
    line_out=_padded(lines[:, 1], M, E),
    levels=table,
    node_graph=_padded(np.repeat(np.arange(len(graphs)), node_count), N, G),
    node_count=_padded(node_count, G, 0),
    edge_count=_padded(edge_count, G, 0),
  )


def dag_sizes(graphs: Iterable[Graph | tuple], places: int) -> dict[str, int]:
  """Sizes for `dag_batch(batch, **sizes)` that are enough for any `places` different graphs of
  these."""
  graphs = [Graph(*graph) for graph in graphs]
  laid = [_lay_out(graph, f"graph {i}", True) for i, graph in enumerate(graphs)]
  largest = lambda counts: max(1, int(np.sort(counts)[::-1][:places].sum()))
  depth = max(1, *(one.level.max(initial=0) for one in laid))
  per_level = [np.bincount(one.level, minlength=depth + 1)[1:] for one in laid]
  return {
    "places": places,
    "nodes": largest([graph.nodes for graph in graphs]),
    "edges": largest([len(one.edges) for one in laid]),
    "line_edges": largest([len(one.lines) for one in laid]),
    "depth": int(depth),
    "width": max(largest(counts) for counts in np.transpose(per_level)),
  }


def orient(nodes: int, edges: Sequence | np.ndarray) -> tuple[Graph, Int[np.ndarray, " E"]]:
  """The graph whose edges lead from the lower to the higher of the two nodes that are joined.

  Args:
    nodes: how many there are.
    edges: [_ 2], the two ends of each edge in either order. An edge that is listed several times,
      or in both directions, is one edge.

  Returns:
    The graph, its edges in the order in which `edges` has them first, and the rows where that is:
    `features[rows]` are the edges' features.

  Raises:
    ValueError: an end that is no node, an edge from a node to itself.
  """
  edges = _edges(nodes, edges, "graph")
  _, rows = np.unique(np.sort(edges, axis=1), axis=0, return_index=True)
  rows = np.sort(rows)
  return Graph(nodes, np.sort(edges[rows], axis=1)), rows


def reverse(graph: DagBatch) -> DagBatch:
  """The same nodes, edges and line edges under the same numbers, each led the other way."""
  return graph._replace(
    tail=graph.head, head=graph.tail, line_in=graph.line_out, line_out=graph.line_in,
    levels=graph.levels[::-1],
  )  # fmt: skip


def multitree(graph: Graph | tuple) -> Graph:
  """`graph` with line edges left out until at most one path leads from any edge to any other.

  Then transitions of at most 1 in size are enough for stability, each by itself. Edges are visited
  in topological order, and a line edge into an edge is kept if nothing that leads to one of its
  ends already leads to the other. So the first of several paths is kept: which one depends on how
  edges are numbered, and edges that the others would have joined may no longer reach one another
  at all.
  """
  graph = Graph(*graph)
  laid = _lay_out(graph, "graph", True)
  ancestors = [1 << edge for edge in range(len(laid.edges))]  # sets of edges, themselves included
  kept = []
  for a, b in laid.lines.tolist():
    if not ancestors[a] & ancestors[b]:
      ancestors[b] |= ancestors[a]
      kept.append((a, b))
  return Graph(graph.nodes, laid.edges, np.array(kept, np.int32).reshape(-1, 2))


def at_most_one_path(graph: Graph | tuple) -> bool:
  """Whether no edge leads to another along two different paths of line edges."""
  laid = _lay_out(Graph(*graph), "graph", True)
  paths = np.eye(len(laid.edges), dtype=np.int8)  # [to, from], 2 standing for any greater number
  for a, b in laid.lines:
    paths[b] = np.minimum(paths[b] + paths[a], 2)
  return bool((paths < 2).all())


class _Laid(NamedTuple):
  """A graph checked, its line edges in an order in which states can be computed."""

  edges: np.ndarray  # [E 2]
  lines: np.ndarray  # [M 2], all that lead into an edge before any that leads on from it
  level: np.ndarray  # [M], of the edge that each leads to; at least 1


def _lay_out(graph: Graph, name: str, parallel_edges: bool) -> _Laid:
  edges = _edges(graph.nodes, graph.edges, name)
  pairs = edges.tolist()  # for graphs of tens of edges lists are faster than arrays
  if not parallel_edges:
    twice = _repeated(pairs)
    if twice:
      raise ValueError(
        f"{name} has two edges {twice[0]} -> {twice[1]}; parallel_edges=True allows parallel edges"
      )
  order = _topological_order(graph.nodes, pairs, name)
  # Line edges in the order of the node they pass; then by the edges' numbers.
  if graph.line_edges is None:
    entering, leaving = ([[] for _ in range(graph.nodes)] for _ in range(2))
    for edge, (tail, head) in enumerate(pairs):
      leaving[tail].append(edge)
      entering[head].append(edge)
    lines = [(a, b) for node in order for b in leaving[node] for a in entering[node]]
  else:
    lines = _line_edges(pairs, graph.line_edges, name)
    rank = {node: i for i, node in enumerate(order)}
    lines.sort(key=lambda line: (rank[pairs[line[1]][0]], line[1], line[0]))
  level = [0] * len(pairs)
  for a, b in lines:
    level[b] = max(level[b], level[a] + 1)
  level_of_line = np.array([level[b] for _, b in lines], np.int32)
  return _Laid(edges, np.array(lines, np.int32).reshape(-1, 2), level_of_line)


def _repeated(pairs) -> list[int] | None:
  """The first pair that has been there before."""
  seen = set()
  for first, second in pairs:
    if (first, second) in seen:
      return [first, second]
    seen.add((first, second))
  return None


def _edges(nodes, edges, name) -> np.ndarray:
  if nodes < 1:
    raise ValueError(f"{name} has {nodes} nodes, expected at least 1")
  edges = _pairs(edges, nodes, f"{name}: edge", "node")
  loops = np.flatnonzero(edges[:, 0] == edges[:, 1])
  if len(loops):
    raise ValueError(f"{name}: edge {loops[0]} leads from node {edges[loops[0], 0]} to itself")
  return edges


def _line_edges(edges, line_edges, name) -> list[list[int]]:
  lines = _pairs(line_edges, len(edges), f"{name}: line edge", "edge").tolist()
  if _repeated(lines):
    raise ValueError(f"{name} has the same line edge twice")
  for i, (a, b) in enumerate(lines):
    if edges[a][1] != edges[b][0]:
      raise ValueError(
        f"{name}: line edge {i} leads from edge {a}, which enters node {edges[a][1]}, to edge {b},"
        f" which leaves node {edges[b][0]}"
      )
  return lines


def _pairs(pairs, limit, name, what) -> np.ndarray:
  """int32 [_ 2], each number below `limit`."""
  pairs = np.asarray(pairs)
  if pairs.size == 0:
    return np.zeros((0, 2), np.int32)
  if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
    raise ValueError(f"{name}s are {pairs.dtype} {pairs.shape}, expected integers [_ 2]")
  wrong = np.flatnonzero(((pairs < 0) | (pairs >= limit)).any(axis=1))
  if len(wrong):
    first, second = pairs[wrong[0]]
    raise ValueError(
      f"{name} {wrong[0]} is ({first}, {second}), expected {what}s from 0 to {limit - 1}"
    )
  return pairs.astype(np.int32)


def _topological_order(nodes, edges, name) -> list[int]:
  """The nodes, each after all from which an edge leads to it."""
  after: list[list[int]] = [[] for _ in range(nodes)]
  entering = [0] * nodes
  for tail, head in edges:
    after[tail].append(head)
    entering[head] += 1
  order = [node for node in range(nodes) if not entering[node]]
  for node in order:  # grows meanwhile
    for head in after[node]:
      entering[head] -= 1
      if not entering[head]:
        order.append(head)
  if len(order) < nodes:
    edge = _edge_on_cycle(edges, [count > 0 for count in entering])
    tail, head = edges[edge]
    raise ValueError(f"{name}: edge {edge}, {tail} -> {head}, lies on a cycle")
  return order


def _edge_on_cycle(edges, left) -> int:
  """An edge on a cycle, where an edge from a node of `left` enters every node of `left`."""
  before = {head: edge for edge, (tail, head) in enumerate(edges) if left[tail] and left[head]}
  node, seen = left.index(True), set()
  while node not in seen:
    seen.add(node)
    node = edges[before[node]][0]
  return before[node]


def _size(name, needed, given) -> int:
  if given is None:
    return max(1, int(needed))
  if given < max(1, needed):
    raise ValueError(f"{name} is {given}, these graphs need at least {max(1, needed)}")
  return given


def _padded(values, size, padding) -> np.ndarray:
  array = np.full(size, padding, np.int32)
  array[: len(values)] = values
  return array
