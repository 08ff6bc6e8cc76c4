"""Graphs for tests."""

import numpy as np

from ops import dag


def random_graph(rng, nodes: int, density: float) -> dag.Graph:
  """Each pair of nodes is joined with this probability; nodes and edges in any order."""
  place = rng.permutation(nodes)
  edges = [(place[i], place[j]) for i in range(nodes) for j in range(i) if rng.random() < density]
  return dag.Graph(nodes, np.array(rng.permutation(edges), int).reshape(-1, 2))


def grid(Y: int, X: int) -> tuple[dag.Graph, dict]:
  """Y rows of X nodes, edges to the right and down, and where each edge is.

  Every node has two edges in and two out: at the borders they come from nodes of their own, and
  go to such. Nodes of the grid come first, row by row. The numbers of edges by what they leave:
  right [Y X+1] and down [Y+1 X], that of the border first.
  """
  nodes, edges, places = Y * X, [], {"right": {}, "down": {}}
  node = lambda y, x: y * X + x if 0 <= y < Y and 0 <= x < X else None
  for kind, (dy, dx) in {"right": (0, 1), "down": (1, 0)}.items():
    for y in range(-dy, Y):
      for x in range(-dx, X):
        ends = [node(y, x), node(y + dy, x + dx)]
        for i, end in enumerate(ends):
          if end is None:
            ends[i], nodes = nodes, nodes + 1
        places[kind][y + dy, x + dx] = len(edges)
        edges.append(ends)
  shapes = {"right": (Y, X + 1), "down": (Y + 1, X)}
  numbers = {
    kind: np.array([[places[kind][y, x] for x in range(w)] for y in range(h)])
    for kind, (h, w) in shapes.items()
  }
  return dag.Graph(nodes, np.array(edges)), numbers
