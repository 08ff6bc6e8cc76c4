"""pLSTM on directed acyclic graphs: states on edges, inputs and outputs on nodes.

  C_e = sum over e' into tail(e) of  T_ee' C_e'  +  S_e k_n v_n^T          n = tail(e)
  o_n = sum over e  into n       of  M_e C_e^T q_n  +  D_n (q_n . k_n) v_n

A node reads the edges that enter it, and sees itself through D only. With T as a matrix over edges
the states are (I - T)^-1 applied to what is written, C0 included; T is nilpotent, so the inverse is
a finite sum over paths. Its transpose, which the backward pass needs, is the same thing on the
reversed graph:

  dB = (I - T^T)^-1 dC,     dT_ee' = <dB_e, C_e'>

`ops.dag` prepares the graphs. Sums over edges are scattered: on a GPU their order, and with it the
last bit, may differ from run to run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import dispatch
from ops.dag import DagBatch
from ops.precision import state_dtype, varying_like
from ops.segments import where_mask

RESOLVENT_EDGES = 1024  # above that, matrices over all pairs of edges are refused
PREFERRED_EDGES = 128  # up to that, they are preferred on an accelerator


class Inputs(NamedTuple):
  """What the implementations take: one dtype, q scaled, padding zeroed."""

  q: Float[Array, "N H K"]
  k: Float[Array, "N H K"]
  v: Float[Array, "N H V"]
  source: Float[Array, "E H"]
  transition: Float[Array, "M H"]
  mark: Float[Array, "E H"]
  initial_state: Float[Array, "E H K V"] | None


def plstm_dag(
  q: Float[Array, "N H K"],
  k: Float[Array, "N H K"],
  v: Float[Array, "N H V"],
  source: Float[Array, "E H"],
  transition: Float[Array, "M H"],
  mark: Float[Array, "E H"],
  direct: Float[Array, "N H"],
  graph: DagBatch,
  *,
  scale: float | None = None,
  initial_state: Float[Array, "E H K V"] | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "N H V"], Float[Array, "E H K V"]]:
  """C_e = sum T_ee' C_e' + S_e k v^T;   o_n = scale (sum M_e C_e^T q_n + D_n (q_n . k_n) v_n).

  The recurrence of pLSTM on a graph (Pöppel et al. 2025, arXiv:2506.11997). Gates are used as
  given, zero and negative ones too: `normalise_transitions` or a `multitree` keep it stable.

  Args:
    q, k: [N H K].
    v: [N H V].
    source: [E H], what an edge takes from the node it leaves.
    transition: [M H], for the line edge from edge `graph.line_in[m]` to edge `graph.line_out[m]`.
    mark: [E H], what the node that an edge enters takes from it.
    direct: [N H], what a node takes from itself.
    graph: from `ops.dag_batch`. What stands at padding does not matter.
    scale: multiplies q; None is K**-0.5.
    initial_state: [E H K V], added to the edges' states; None is zero.
    implementation: "levels" (one level of edges after the other), "resolvent" (matrices over pairs
      of edges and of nodes), "recurrent" (one line edge after the other), or None.

  Returns:
    o [N H V] in the dtype of `v`, and the edges' states [E H K V] in float32 (float64 for float64
    inputs); zero at padding.

  Raises:
    ValueError: a shape or `implementation` that cannot be.
  """
  dispatch.check_shapes(
    **{f"graph.{name}": (getattr(graph, name), letter) for name, letter in _LETTERS.items()},
    q=(q, "N H K"), k=(k, "N H K"), v=(v, "N H V"), source=(source, "E H"),
    transition=(transition, "M H"), mark=(mark, "E H"), direct=(direct, "N H"),
    initial_state=(initial_state, "E H K V"),
  )  # fmt: skip
  arrays = {"q": q, "k": k, "v": v, "source": source, "transition": transition, "mark": mark}
  dispatch.check_dtypes(**arrays, direct=direct, initial_state=initial_state)
  _, run = dispatch.choose(
    "plstm_dag", implementation, **arrays, direct=direct, graph=graph, initial_state=initial_state
  )
  dtype, out_dtype = state_dtype(*arrays.values(), direct, initial_state), v.dtype
  graph = jax.tree.map(jnp.asarray, graph)
  node, edge, line = _real(graph)
  wide = lambda mask, x: None if x is None else where_mask(mask, x.astype(dtype))
  q, k, v, direct = (wide(node, x) for x in (q, k, v, direct))
  q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
  gates = wide(edge, source), wide(line, transition), wide(edge, mark)
  o, states = run(Inputs(q, k, v, *gates, wide(edge, initial_state)), graph)
  o = o + (direct * jnp.sum(q * k, axis=-1))[..., None] * v
  return o.astype(out_dtype), states


_LETTERS = {"node_graph": "N", "tail": "E", "head": "E", "line_in": "M", "line_out": "M"}


def normalise_transitions(
  transition: Float[Array, "M H"], graph: DagBatch, *, alpha0: float = 0.5, over: str = "out"
) -> Float[Array, "M H"]:
  """t_ba / (alpha0 + sum |t|): transitions that cannot make states grow.

  Args:
    transition: [M H], any numbers.
    graph: from `ops.dag_batch`.
    alpha0: above 0; the smaller, the closer to 1 the sums come.
    over: what is summed over. "out": the edges that one edge leads to, which is P-mode: columns of
      |T| sum to less than 1, so that what an edge hands on is never more than it holds. "in": the
      edges that lead to one edge: rows sum to less than 1, and what several edges take from one
      may be more than it holds.

  Returns:
    [M H] in float32 (float64 for float64); zero at padding.

  Raises:
    ValueError: an `alpha0` or an `over` that cannot be.
  """
  if not alpha0 > 0:
    raise ValueError(f"alpha0 is {alpha0}, must be above 0")
  if over not in ("out", "in"):
    raise ValueError(f"over is {over!r}, must be 'out' or 'in'")
  dispatch.check_shapes(**{"graph.line_in": (graph.line_in, "M")}, transition=(transition, "M H"))
  shared = graph.line_in if over == "out" else graph.line_out
  t = where_mask(_real(graph)[2], transition.astype(state_dtype(transition)))
  return t / (alpha0 + _rows(_sum(graph.tail.shape[0], shared, jnp.abs(t)), shared))


def dag_largest_column_sum(transition: Float[Array, "M H"], graph: DagBatch) -> Float[Array, ""]:
  """The largest sum, over edges and heads, of |T| over what one edge leads to.

  At most 1 means that the sum of all states' sizes never grows on its way.
  """
  t = where_mask(_real(graph)[2], transition.astype(state_dtype(transition)))
  return jnp.max(_sum(graph.tail.shape[0], graph.line_in, jnp.abs(t)))


def _real(graph):
  """Masks of nodes, edges and line edges that are not padding."""
  N, E, G = (x.shape[0] for x in (graph.node_graph, graph.tail, graph.node_count))
  below = lambda x, size: jnp.asarray(x) < size
  return below(graph.node_graph, G), below(graph.tail, N), below(graph.line_in, E)


def _rows(x, index, padding=0):
  """x[index]; `padding` where the index is padding."""
  return jnp.asarray(x).at[index].get(mode="fill", fill_value=padding)


def _sum(size, index, x):
  """[size ...], the sum of the rows of `x` that have the same index; padding is dropped."""
  return jnp.zeros((size, *x.shape[1:]), x.dtype).at[index].add(x, mode="drop")


def _product(equation, *arrays):
  return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


def _written(inputs, graph):
  """What is added to each edge's state: [E H K V]."""
  k = _rows(inputs.k, graph.tail) * inputs.source[..., None]
  states = k[..., None] * _rows(inputs.v, graph.tail)[..., None, :]
  return states if inputs.initial_state is None else states + inputs.initial_state


def _read(inputs, graph, states):
  """What nodes take from the edges that enter them: [N H V]."""
  q = _rows(inputs.q, graph.head) * inputs.mark[..., None]
  return _sum(inputs.q.shape[0], graph.head, jnp.sum(q[..., None] * states, axis=-2))


def _levels(inputs, graph):
  return _one_step_after_another(inputs, graph, graph.levels)


def _recurrent(inputs, graph):
  M, lines = graph.line_in.shape[0], graph.levels.ravel()
  order = lines[jnp.argsort(lines >= M, stable=True)[:M]]
  return _one_step_after_another(inputs, graph, order[:, None])


def _one_step_after_another(inputs, graph, steps):
  """`steps` [_ width]: the line edges of each step, none of which depends on another of them."""
  states = varying_like(_written(inputs, graph), *inputs, *graph)
  states = _pass_on(inputs.transition, states, graph.line_in, graph.line_out, steps)
  return _read(inputs, graph, states), states


@jax.custom_vjp
def _pass_on(
  transition: Float[Array, "M H"],
  states: Float[Array, "E H K V"],
  line_in: Int[Array, " M"],
  line_out: Int[Array, " M"],
  steps: Int[Array, "_ _"],
) -> Float[Array, "E H K V"]:
  """(I - T)^-1 states."""
  E = states.shape[0]
  ends = (_rows(x, steps, E) for x in (line_in, line_out))

  def step(C, lines):
    T, a, b = lines
    return C.at[b].add(T[..., None, None] * _rows(C, a), mode="drop"), None

  return jax.lax.scan(step, states, (_rows(transition, steps), *ends))[0]


def _pass_on_forward(transition, states, line_in, line_out, steps):
  states = _pass_on(transition, states, line_in, line_out, steps)
  return states, (transition, states, line_in, line_out, steps)


def _pass_on_backward(residuals, cotangent):
  transition, states, line_in, line_out, steps = residuals
  d = _pass_on(transition, cotangent, line_out, line_in, steps[::-1])
  d_transition = jnp.sum(_rows(d, line_out) * _rows(states, line_in), axis=(-2, -1))
  return d_transition, d, None, None, None


_pass_on.defvjp(_pass_on_forward, _pass_on_backward)


def _resolvent(inputs, graph):
  N, E, depth = inputs.q.shape[0], graph.tail.shape[0], graph.levels.shape[0]
  inputs, node_spoilt, edge_spoilt = _quarantine(inputs, graph)
  T = jnp.zeros((E, E, inputs.q.shape[1]), inputs.q.dtype)
  T = T.at[graph.line_out, graph.line_in].add(inputs.transition, mode="drop")
  power = jnp.moveaxis(T, -1, 0)
  R = power + jnp.eye(E, dtype=T.dtype)
  # (I + T) (I + T^2) (I + T^4) ... is the sum of all powers; those above the depth are zero.
  for _ in range(depth.bit_length() - 1):
    power = _product("hab,hbc->hac", power, power)
    R = R + _product("hab,hbc->hac", R, power)

  gating = _sum(N, graph.head, inputs.mark[:, None] * jnp.moveaxis(R, 0, -1))  # [node edge H]
  gating = _sum(N, graph.tail, jnp.swapaxes(gating * inputs.source, 0, 1))  # [from to H]
  scores = _product("nhk,mhk->mnh", inputs.q, inputs.k) * gating
  o = _product("mnh,mhv->nhv", scores, inputs.v)
  states = _product("hab,bhkv->ahkv", R, _written(inputs, graph))
  if inputs.initial_state is not None:
    o = o + _read(inputs, graph, _product("hab,bhkv->ahkv", R, inputs.initial_state))
  return where_mask(~node_spoilt, o, jnp.nan), where_mask(~edge_spoilt, states, jnp.nan)


def _quarantine(inputs, graph):
  """Zeroes all of a graph that holds NaN or infinity: in a product of matrices, 0 NaN is NaN.

  Returns the inputs, and the masks of nodes and of edges of such graphs.
  """
  spoilt = lambda x: ~jnp.isfinite(x).reshape(x.shape[0], -1).all(-1)
  edge_graph = _rows(graph.node_graph, graph.tail, graph.node_count.shape[0])
  line_graph = _rows(edge_graph, graph.line_in, graph.node_count.shape[0])
  places = Inputs(*(graph.node_graph,) * 3, edge_graph, line_graph, *(edge_graph,) * 2)
  bad = jnp.zeros(graph.node_count.shape, bool)
  for x, place in zip(inputs, places):
    if x is not None:
      bad = bad.at[place].max(spoilt(x), mode="drop")
  masks = Inputs(*(_rows(bad, place) for place in places))
  clean = (None if x is None else where_mask(~mask, x) for x, mask in zip(inputs, masks))
  return Inputs(*clean), masks.q, masks.source


def _preference(source, **arguments):
  if dispatch.platform() != "cpu" and source.shape[0] <= PREFERRED_EDGES:
    return ["resolvent", "levels"]
  return ["levels"]


def _resolvent_supports(source, **arguments):
  if source.shape[0] > RESOLVENT_EDGES:
    return f"{source.shape[0]} edges make matrices over all pairs; at most {RESOLVENT_EDGES}"
  return None


dispatch.declare(
  "plstm_dag",
  {
    "recurrent": dispatch.Implementation(
      _recurrent, dispatch.anything, "a step per line edge, least arithmetic"
    ),
    "levels": dispatch.Implementation(
      _levels, dispatch.anything, "a step per level, states kept once"
    ),
    "resolvent": dispatch.Implementation(
      _resolvent, _resolvent_supports, "log depth products of [E E], for small graphs"
    ),
    "pallas": dispatch.NO_KERNEL,
  },
  _preference,
)
