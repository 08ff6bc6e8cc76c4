"""A classifier of graphs: pLSTM on directed acyclic graphs. Pöppel et al., "pLSTM: parallelizable
Linear Source Transition Mark networks", 2025.

    x = W_f features + b_f + sinusoids(degree)
    for each block: x += mixer(norm(x)), x += W_down gelu(W_up norm(x))
    logits = W_h mean(norm(x)) + b_h                          the mean over the nodes of a graph

The mixer holds a state on every edge, see `ops.plstm_dag`:

    C_e = sum T_ee' C_e' + S_e k v^T,    o_n = K^-1/2 q_n^T (sum M_e C_e + D_n k_n v_n^T)
    y = W_o norm(o)                                           a norm over each head

S, M and D are sigmoids, D of the node, S and M of the edge, whose features are the mean of those of
its two ends. T comes from t = W_in f_e' + W_out f_e + b, f being the edges' features:

    "plstm_p", propagation: T = t / (1/2 + sum |t|) over all edges that e' leads to: columns sum to
        less than 1, so that all a state hands on is less than it holds.
    "plstm_d", distribution: T = tanh(t) on a multitree, in which one path at most leads from an
        edge to another. The multitree leaves out turns, and which depends on the numbering.

States run along the edges' direction; in "plstm_p_reversed" and "plstm_d_reversed" against it. A
molecule's bonds have none: `dag.orient` leads them from lower to higher atoms, and blocks of both
kinds make up for it. Graphs come in batches of fixed sizes, see `ops.dag`:

    graphs = graph_batch([dag.Graph(nodes, edges), ...], **graph_sizes(dataset, places))
    params = init(config, key)
    logits = apply(config, params, features, graphs)

Departures from the published code: gates belong to edges under one numbering, so that the sums that
P divides by are those of the columns, which that code confuses where it has gates of nodes; sums
over the edges that lead to e, as its gates of edges have, are `pmode="published"`. Gates do not
start saturated.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import ops
from lm_models import layers, lm, recurrent_layers
from lm_models.grid_layers import out_init, small_init
from ops import dag
from ops.plstm_dag import dag_largest_column_sum

# What a name in a pattern stands for: the mode, and whether edges are walked against their sense.
MIXERS = {
  "plstm_p": ("P", False),
  "plstm_d": ("D", False),
  "plstm_p_reversed": ("P", True),
  "plstm_d_reversed": ("D", True),
}
PMODES = {"paper": "out", "published": "in"}  # and what P sums over
IMPLEMENTATIONS = ("recurrent", "levels", "resolvent")
GATES = ("source", "mark", "direct", "transition_in", "transition_out")


@dataclasses.dataclass(frozen=True)
class Config:
  """A classifier of graphs."""

  features: int = 1  # numbers that describe a node
  outputs: int = 2  # logits of a graph
  D: int = 96  # model width
  L: int = 4  # blocks
  H: int = 4  # heads of width D / H
  pattern: tuple[str, ...] = (
    "plstm_p",
    "plstm_d",
    "plstm_p_reversed",
    "plstm_d_reversed",
  )  # kinds of block, repeated until there are L
  pmode: str = "paper"  # P bounds the sums over an edge's successors (paper) or predecessors
  mlp_width: int = 128  # width of the MLP; 0 leaves it out
  source_bias: float = -1.0  # initial bias of S
  mark_bias: float = -1.0  # initial bias of M
  direct_bias: float = -1.0  # initial bias of D
  propagation_bias: float = 4.0  # initial bias of t in P: along a chain T is 8/9
  distribution_bias: float = 2.0  # initial bias of t in D: T is 0.96
  gate_scale: float = 0.1  # initial weights of gates, in multiples of those of q, k and v
  norm_epsilon: float = 1e-5  # of every RMSNorm
  implementation: str | None = None  # of the op; None chooses
  dtype: str = "float32"  # of matrix products and activations; parameters are float32

  def __post_init__(self):
    layers.check_at_least(self, 1, "features", "outputs", "D", "L", "H")
    layers.check_at_least(self, 0, "mlp_width")
    recurrent_layers.check_choice(self, "pmode", PMODES)
    recurrent_layers.check_choice(self, "dtype", lm.DTYPES)
    if self.implementation is not None:
      recurrent_layers.check_choice(self, "implementation", IMPLEMENTATIONS)
    if not self.pattern or set(self.pattern) - set(MIXERS):
      raise ValueError(f"pattern is {self.pattern}, its names must be among {sorted(MIXERS)}")
    if self.L % len(self.pattern):
      raise ValueError(f"L is {self.L}, must be a multiple of the pattern's {len(self.pattern)}")
    if self.D % 2 or self.D % self.H:
      raise ValueError(f"D is {self.D}, must be even and a multiple of H = {self.H}")

  @property
  def wide_dtype(self) -> str:
    """Of gates, of the residual stream and of what is pooled."""
    return jnp.promote_types(self.dtype, jnp.float32).name


class Graphs(NamedTuple):
  """A batch with all its line edges, and with those of a multitree; nodes and edges are equal."""

  whole: ops.DagBatch
  pruned: ops.DagBatch


def graph_batch(
  graphs: Iterable[dag.Graph | tuple],
  whole: dict[str, int] | None = None,
  pruned: dict[str, int] | None = None,
) -> Graphs:
  """The batch that `apply` takes, padded to sizes from `graph_sizes`; None is what is needed.

  Raises:
    ValueError: a graph that is none, or a size that is too small, see `dag.dag_batch`.
  """
  graphs = [dag.Graph(*graph) for graph in graphs]
  batch = functools.partial(dag.dag_batch, parallel_edges=True)
  trees = map(dag.multitree, graphs)
  return Graphs(batch(graphs, **(whole or {})), batch(trees, **(pruned or {})))


def graph_sizes(graphs: Iterable[dag.Graph | tuple], places: int) -> dict[str, dict[str, int]]:
  """Sizes for `graph_batch(batch, **sizes)`, enough for any `places` different graphs of these."""
  graphs = [dag.Graph(*graph) for graph in graphs]
  trees = map(dag.multitree, graphs)
  return {"whole": dag.dag_sizes(graphs, places), "pruned": dag.dag_sizes(trees, places)}


def degree_encoding(graph: ops.DagBatch, D: int, dtype: str = "float32") -> Float[Array, "N D"]:
  """Sines and cosines of each node's number of edges, wavelengths from 2 pi to 10^4 times that."""
  ends = jnp.concatenate([jnp.asarray(graph.tail), jnp.asarray(graph.head)])
  degree = jnp.zeros(graph.node_graph.shape, dtype).at[ends].add(1, mode="drop")
  frequencies = 10000.0 ** (-np.arange(D // 2) / (D // 2))
  angles = degree[:, None] * jnp.asarray(frequencies, dtype)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Mixer(nn.Module):
  """The block's mixer, on all nodes of a batch of graphs."""

  config: Config
  mode: str  # P or D

  @nn.compact
  def __call__(self, x: Float[Array, "N D"], graph: ops.DagBatch) -> Float[Array, "N D"]:
    c = self.config
    heads = [
      layers.Projection((c.H, c.D // c.H), 1, True, c.dtype, small_init, name=f"{name}_proj")(x)
      for name in ("query", "key", "value")
    ]
    source, mark, direct, t = self._gates(x, graph)
    if self.mode == "P":
      transition = ops.normalise_transitions(t, graph, over=PMODES[c.pmode])
      self._watch("largest_column_sum", dag_largest_column_sum(transition, graph))
    else:
      transition = jnp.tanh(t)
      self._watch("largest_transition", jnp.max(jnp.abs(transition)))
    o, _ = ops.plstm_dag(
      *heads, source, transition, mark, direct, graph, implementation=c.implementation
    )
    y = layers.RMSNorm(c.norm_epsilon, c.dtype, scale_axes=2, name="norm")(o).reshape(x.shape)
    return layers.Projection(c.D, dtype=c.dtype, kernel_init=out_init(c.L), name="out_proj")(y)

  def _gates(self, x, graph):
    """S and M [E H], D [N H] and t [M H], at least float32."""
    c = self.config
    bias = {"P": c.propagation_bias, "D": c.distribution_bias}[self.mode]
    start = jnp.array([c.source_bias, c.mark_bias, c.direct_bias, 0.0, bias])
    gates = layers.Projection(
      (len(GATES), c.H), 1, True, c.wide_dtype,
      kernel_init=lambda key, shape: c.gate_scale * small_init(key, shape),
      bias_init=lambda key, shape: jnp.broadcast_to(start[:, None], shape), name="gate_proj",
    )(x)  # fmt: skip
    # The mean of two products is the product with the mean.
    ends = (gates.at[end].get(mode="fill", fill_value=0) for end in (graph.tail, graph.head))
    of_edge = dict(zip(GATES, jnp.moveaxis(sum(ends) / 2, 1, 0)))
    at = lambda name, edge: of_edge[name].at[edge].get(mode="fill", fill_value=0)
    t = at("transition_in", graph.line_in) + at("transition_out", graph.line_out)
    direct = gates[:, GATES.index("direct")]
    return *map(jax.nn.sigmoid, (of_edge["source"], of_edge["mark"], direct)), t

  def _watch(self, name, x):
    self.sow("metrics", name, x, reduce_fn=jnp.maximum, init_fn=lambda: jnp.zeros(()))


class Block(nn.Module):
  """x += mixer(norm(x)), then x += mlp(norm(x))."""

  name_in_pattern: str
  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "N D"], graphs: Graphs) -> Float[Array, "N D"]:
    c = self.config
    mode, backwards = MIXERS[self.name_in_pattern]
    graph = graphs.whole if mode == "P" else graphs.pruned
    graph = dag.reverse(graph) if backwards else graph
    norm = functools.partial(layers.RMSNorm, c.norm_epsilon, c.dtype)
    x = x + Mixer(c, mode, name="mixer")(norm(name="norm")(x), graph)
    if c.mlp_width:
      project = functools.partial(layers.Projection, bias=True, dtype=c.dtype)
      up = project(c.mlp_width, kernel_init=small_init, name="up_proj")
      down = project(c.D, kernel_init=out_init(c.L), name="down_proj")
      x = x + down(jax.nn.gelu(up(norm(name="mlp_norm")(x))))
    return x


class Repeat(nn.Module):
  """One pass over the pattern."""

  config: Config

  @nn.compact
  def __call__(self, x, graphs):
    for i, name in enumerate(self.config.pattern):
      x = Block(name, self.config, name=f"{i}_{name}")(x, graphs)
    return x, None


class GraphModel(nn.Module):
  """Graphs to logits; see the module's docstring. Blocks' parameters carry the repeats on their
  first axis."""

  config: Config

  @nn.compact
  def __call__(
    self, features: Float[Array, "N features"], graphs: Graphs
  ) -> Float[Array, "G outputs"]:
    c, graphs = self.config, jax.tree.map(jnp.asarray, graphs)
    graph = graphs.whole
    (N,), (G,) = graph.node_graph.shape, graph.node_count.shape
    if features.shape != (N, c.features):
      raise ValueError(f"features is {features.shape}, must be [N features] = {(N, c.features)}")
    real = graph.node_graph[:, None] < G
    init = nn.initializers.normal(0.02)
    project = functools.partial(layers.Projection, inputs=1, bias=True, dtype=c.dtype)
    embed = project(c.D, kernel_init=small_init, bias_init=init, name="feature_proj")
    # The residual stream stays float32 whatever the products are: it is a long sum.
    x = embed(jnp.where(real, features, 0)) + degree_encoding(graph, c.D, c.wide_dtype)
    stack = nn.scan(
      Repeat,
      variable_axes={"params": 0, "metrics": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.L // len(c.pattern),
    )
    x, _ = stack(c, name="blocks")(x, graphs)
    x = layers.RMSNorm(c.norm_epsilon, c.wide_dtype, name="norm")(x)
    total = jnp.zeros((G, c.D), x.dtype).at[graph.node_graph].add(x, mode="drop")
    mean = total / jnp.maximum(graph.node_count, 1)[:, None]
    logits = project(c.outputs, kernel_init=init, name="head_proj")(mean)
    return logits.astype(c.wide_dtype)


def init(config: Config, key: Array) -> dict:
  """Initial parameters, float32, from one key."""
  features = jnp.zeros((1, config.features))
  return GraphModel(config).init(key, features, graph_batch([(1, [])]))["params"]


def apply(
  config: Config, params: dict, features: Float[Array, "N features"], graphs: Graphs
) -> Float[Array, "G outputs"]:
  """Logits of each graph, float32.

  Args:
    config: the model.
    params: from `init`.
    features: of each node, those of the first graph first. What stands at padding does not matter.
    graphs: from `graph_batch`; an empty place has the logits of no node at all.

  Raises:
    ValueError: features whose shape is not that of the batch.
  """
  return GraphModel(config).apply({"params": params}, features, graphs)


def apply_and_metrics(
  config: Config, params: dict, features: Float[Array, "N features"], graphs: Graphs
) -> tuple[Float[Array, "G outputs"], dict[str, Array]]:
  """`apply`, and the largest values over all blocks of what they sow as "metrics", by name."""
  logits, sown = GraphModel(config).apply({"params": params}, features, graphs, mutable=["metrics"])
  return logits, layers.largest_sown(sown)


def flops(config: Config, nodes: int, edges: int, line_edges: int) -> float:
  """Floating-point operations of a forward pass over so many; training takes thrice."""
  c = config
  state = c.D * (c.D // c.H)  # numbers in the states of one edge
  node = c.D * (4 * c.D + len(GATES) * c.H + 2 * c.mlp_width)
  block = 2.0 * nodes * node + 2.0 * state * line_edges + 4.0 * state * edges
  return c.L * block + 2.0 * nodes * c.features * c.D + 2.0 * c.D * c.outputs


def parameter_count(config: Config) -> int:
  """Number of parameters, without making them."""
  shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))
