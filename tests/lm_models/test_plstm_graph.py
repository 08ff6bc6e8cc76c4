"""The classifier of graphs: as loops over edges say, blind to padding and company; it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_models import plstm_graph
from ops import dag
from tests.ops.graphs import random_graph
from tests.quick_compilation import quick_compilation as quick_compilation

CONFIG = plstm_graph.Config(
  features=3, outputs=2, D=12, L=4, H=2, mlp_width=10, gate_scale=3.0, dtype="float64"
)
SIZES = dict(places=5, nodes=30, edges=40, line_edges=60, depth=8, width=30)


@functools.cache
def graphs():
  rng = np.random.default_rng(0)
  given = [random_graph(rng, 6, 0.7), (1, []), random_graph(rng, 8, 0.4), random_graph(rng, 5, 0.9)]
  return [(dag.Graph(*graph), rng.normal(size=(graph[0], 3))) for graph in given]


@functools.cache
def params():
  """All of them random: none starts at a value that hides it."""
  rng = np.random.default_rng(1)
  start = jax.eval_shape(functools.partial(plstm_graph.init, CONFIG), jax.random.key(0))
  return jax.tree.map(lambda x: rng.normal(size=x.shape) * x.shape[-1] ** -0.5 + 0.3, start)


@functools.cache
def program(pmode):
  config = dataclasses.replace(CONFIG, pmode=pmode)

  @jax.jit
  def run(params, features, batch, cotangent):
    def loss(params):
      logits, metrics = plstm_graph.apply_and_metrics(config, params, features, batch)
      return jnp.sum(logits * cotangent), (logits, metrics)

    (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return *aux, gradients

  return run


def run(chosen, padding=0.0, pmode="paper"):
  """Logits of these (graph, features), metrics, gradients of all logits' sum weighed by place."""
  batch = plstm_graph.graph_batch([graph for graph, _ in chosen], SIZES, SIZES)
  features = np.full((SIZES["nodes"], 3), padding)
  given = np.concatenate([features for _, features in chosen])
  features[: len(given)] = given
  cotangent = np.zeros((SIZES["places"], 2))
  cotangent[: len(chosen)] = [[1.0, -2.0]] * len(chosen)
  with jax.enable_x64(True):
    results = program(pmode)(params(), features, batch, cotangent)
  logits, metrics, gradients = jax.tree.map(np.asarray, results)
  return logits[: len(chosen)], metrics, gradients


def norm(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon) * scale


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mixer(p, mode, backwards, graph, x, over):
  """One graph's mixer, edge by edge."""
  sigmoid = lambda y: 1 / (1 + np.exp(-y))
  lines = (dag.multitree(graph) if mode == "D" else graph).line_edges
  if lines is None:
    ends = enumerate(graph.edges)
    lines = [(a, b) for a, (_, n) in ends for b, (m, _) in enumerate(graph.edges) if n == m]
  edges = [(h, t) if backwards else (t, h) for t, h in graph.edges]
  lines = [(b, a) if backwards else (a, b) for a, b in lines]
  q, k, v = (
    np.einsum("nd,dhk->nhk", x, p[f"{name}_proj"]["kernel"]) + p[f"{name}_proj"]["bias"]
    for name in ("query", "key", "value")
  )
  gates = np.einsum("nd,dgh->ngh", x, p["gate_proj"]["kernel"]) + p["gate_proj"]["bias"]
  of_edge = [(gates[tail] + gates[head]) / 2 for tail, head in edges]
  t = {(a, b): of_edge[a][3] + of_edge[b][4] for a, b in lines}
  if mode == "D":
    T = {line: np.tanh(y) for line, y in t.items()}
  else:
    same = lambda line, other: line[over == "in"] == other[over == "in"]
    T = {
      line: y / (0.5 + sum(abs(t[other]) for other in t if same(line, other)))
      for line, y in t.items()
    }

  @functools.cache
  def state(e):
    n = edges[e][0]
    written = sigmoid(of_edge[e][0])[:, None, None] * k[n][:, :, None] * v[n][:, None, :]
    return written + sum(T[a, b][:, None, None] * state(a) for a, b in lines if b == e)

  o = sigmoid(gates[:, 2])[..., None] * np.sum(q * k, axis=-1, keepdims=True) * v
  for e, (_, n) in enumerate(edges):
    o[n] += np.einsum("hk,hkv->hv", q[n], sigmoid(of_edge[e][1])[:, None, None] * state(e))
  o = norm(o * q.shape[-1] ** -0.5, p["norm"]["scale"])
  return o.reshape(x.shape) @ p["out_proj"]["kernel"]


def truth(graph, features, over="out"):
  """Logits of one graph."""
  p = params()
  linear = lambda p, x: x @ p["kernel"] + p["bias"]
  degree = np.array([np.sum(np.asarray(graph.edges) == n) for n in range(graph.nodes)])
  angles = degree[:, None] / 10000.0 ** (np.arange(6) / 6)
  x = linear(p["feature_proj"], features)
  x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  for i, name in enumerate(CONFIG.pattern):
    block = jax.tree.map(lambda y: y[0], p["blocks"][f"{i}_{name}"])
    mode, backwards = name[6].upper(), name.endswith("reversed")
    normed = norm(x, block["norm"]["scale"])
    x = x + mixer(block["mixer"], mode, backwards, graph, normed, over)
    hidden = gelu(linear(block["up_proj"], norm(x, block["mlp_norm"]["scale"])))
    x = x + linear(block["down_proj"], hidden)
  return linear(p["head_proj"], norm(x, p["norm"]["scale"]).mean(axis=0))


@pytest.mark.parametrize("pmode, over", [("paper", "out"), ("published", "in")])
def test_logits_are_those_of_a_loop_over_edges(pmode, over):
  logits, metrics, _ = run(graphs(), pmode=pmode)
  for graph, y in zip(graphs(), logits):
    np.testing.assert_allclose(y, truth(*graph, over), atol=1e-9)
  assert 0.5 < metrics["largest_transition"] < 1
  assert (metrics["largest_column_sum"] < 1) == (pmode == "paper")


def test_neither_padding_nor_the_other_graphs_of_a_batch_matter():
  together, _, gradients = run(graphs())
  poisoned, _, gradients_poisoned = run(graphs(), padding=np.nan)
  np.testing.assert_array_equal(poisoned, together)
  jax.tree.map(np.testing.assert_array_equal, gradients_poisoned, gradients)
  assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-6 for x in jax.tree.leaves(gradients))
  alone = [run([graph]) for graph in graphs()]
  np.testing.assert_allclose(np.concatenate([logits for logits, *_ in alone]), together, atol=1e-12)
  total = jax.tree.map(lambda *x: sum(x), *(gradients for *_, gradients in alone))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), total, gradients)
  order = [2, 0, 3, 1]
  moved, _, _ = run([graphs()[i] for i in order])
  np.testing.assert_allclose(moved, together[order], atol=1e-12)
  assert np.ptp(together, axis=0).min() > 0.1


def chains(rng) -> tuple[dag.Graph, np.ndarray, int]:
  """Two chains with two marked nodes: are both on the same?

  What marks and degrees there are is the same whatever the answer: it takes the edges to tell.
  """
  first, second = rng.integers(3, 7, size=2)
  numbers = np.arange(first + second)
  edges = np.stack([numbers[:-1], numbers[1:]], 1)[numbers[1:] != first]
  marked = rng.choice(len(numbers), 2, replace=False)
  features = np.zeros((len(numbers), 2), np.float32)
  features[marked, [0, 1]] = 1
  return dag.Graph(len(numbers), edges), features, int((marked[0] < first) == (marked[1] < first))


def chain_batch(seed, count=32):
  rng = np.random.default_rng(seed)
  drawn, features, labels = zip(*(chains(rng) for _ in range(count)))
  sizes = dict(places=count, nodes=12 * count, edges=10 * count, line_edges=8 * count)
  sizes |= dict(depth=4, width=2 * count)
  features = np.concatenate(features)
  features = np.pad(features, [(0, sizes["nodes"] - len(features)), (0, 0)])
  return plstm_graph.graph_batch(drawn, sizes, sizes), features, np.array(labels)


def test_it_learns_whether_two_nodes_are_connected():
  config = plstm_graph.Config(
    features=2,
    D=16,
    L=2,
    H=2,
    mlp_width=32,
    pattern=("plstm_p", "plstm_d_reversed"),
    gate_scale=1.0,
  )
  optimizer = optax.adam(3e-3)

  def loss(params, batch):
    graphs, features, labels = batch
    logits = plstm_graph.apply(config, params, features, graphs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return nats, jnp.mean(jnp.argmax(logits, axis=-1) == labels)

  @jax.jit
  def train(params, batches):
    def step(carry, i):
      params, state = carry
      batch = jax.tree.map(lambda x: x[i % 40], batches)
      (_, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), accuracy

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(300))

  stack = lambda batches: jax.tree.map(lambda *x: jnp.stack(x), *batches)
  start = jax.jit(functools.partial(plstm_graph.init, config))(jax.random.key(0))
  (params, _), _ = train(start, stack([chain_batch(seed) for seed in range(40)]))
  accuracy = jax.jit(lambda params, batch: loss(params, batch)[1])
  unseen = [chain_batch(seed) for seed in range(100, 104)]
  assert np.mean([accuracy(params, batch) for batch in unseen]) >= 0.95
  for graphs, features, labels in unseen:
    cut = jax.tree.map(lambda x: x, graphs)
    cut = plstm_graph.Graphs(*(one._replace(line_in=one.line_in * 0 + 320) for one in cut))
    assert accuracy(params, (cut, features, labels)) < 0.8


def test_the_published_size_has_fewer_than_300_000_parameters():
  assert plstm_graph.parameter_count(plstm_graph.Config(features=7)) < 300_000


MISTAKES = [
  ({"pattern": ("plstm",)}, r"pattern is \('plstm',\), its names must be among"),
  ({"L": 3}, "L is 3, must be a multiple of the pattern's 4"),
  ({"D": 10, "H": 4}, "D is 10, must be even and a multiple of H = 4"),
  ({"pmode": "safe"}, "pmode is 'safe', must be one of"),
  ({"implementation": "pallas"}, "implementation is 'pallas', must be one of"),
  ({"outputs": 0}, "outputs is 0, must be at least 1"),
]


@pytest.mark.parametrize("fields, message", MISTAKES)
def test_a_wrong_config_is_named_in_one_line(fields, message):
  with pytest.raises(ValueError, match=message):
    plstm_graph.Config(**fields)


def test_features_of_another_shape_are_named():
  batch = plstm_graph.graph_batch([(3, [(0, 1)])])
  with pytest.raises(ValueError, match=r"features is \(4, 3\), must be \[N features\] = \(3, 3\)"):
    jax.eval_shape(lambda x: plstm_graph.apply(CONFIG, params(), x, batch), jnp.ones((4, 3)))
