"""Linear attention with a matrix state [K V] per head: one recurrence, many published models.

  S <- exp(g_t) S                     decay: none, one number per head, or one per row of the state
  r  = v_t - k_t^T S                  the delta rule, where beta is given; otherwise r = v_t
  S <- S + k_t (beta_t r)^T           write
  o_t = scale q_t^T S                 read, after the write

`ops.fronts` has the same op under the names of its models: Mamba-2's SSD, GLA, DeltaNet, Gated
DeltaNet, KDA, RetNet. `linear_attention_chunked.py` holds the form that is fast on every device.

Each of `Hq` query and key heads serves M = H / Hq value heads; inside, heads have two axes, Hq and
M, so that q and k are never repeated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops import dispatch
from ops.kernels.gpu import linear_attention as kernels
from ops.linear_attention_chunked import chunked, parallel
from ops.precision import state_dtype, varying_like
from ops.segments import Segments, find_segments, quarantine, where_mask
from ops.time_axis import splits_time
from ops.tree_attention import tree_attention

FORGOTTEN = -1e9  # a logarithm of a decay that leaves exactly nothing


class Tokens(NamedTuple):
  """What the implementations take, beside the scale of q: one dtype, padding and poison zeroed."""

  q: Float[Array, "B T Hq K"]
  k: Float[Array, "B T Hq K"]
  v: Float[Array, "B T Hq M V"]
  log_decay: Float[Array, "B T Hq M"] | Float[Array, "B T Hq M K"] | None
  beta: Float[Array, "B T Hq M"] | None
  segments: Segments | None


@splits_time
def linear_attention(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  *,
  log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
  beta: Float[Array, "B T H"] | None = None,
  scale: float | None = None,
  initial_state: Float[Array, "B H K V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
  chunk_size: int | None = None,
  emit_states: int = 0,
  tree_mask: Bool[Array, "T T"] | Bool[Array, "B T T"] | None = None,
  accepted: Int[Array, " B"] | None = None,
) -> tuple[Array, ...]:
  """S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - k_t^T S))^T;   o_t = scale q_t^T S.

  Without `beta` the write is k_t v_t^T. Yang et al., "Gated Delta Networks", 2024
  (arXiv:2412.06464) and "Parallelizing Linear Transformers with the Delta Rule", 2024
  (arXiv:2406.06484), whose special cases the fronts of `ops` name.

  Args:
    q, k: [B T Hq K], used as given: for the delta rule normalise k before (`ops.l2_normalize`), for
      it expands, and overflows, where beta |k|^2 > 2.
    v: [B T H V]. H is a multiple of Hq; query and key head i serves the H/Hq value heads from
      i H/Hq on.
    log_decay: natural logarithm of the decay, <= 0 (-inf is allowed): [B T H], or [B T H K] for one
      per row of the state. None is no decay.
    beta: [B T H], in [0, 2] for unit keys: the delta rule's step. None is no delta rule.
    scale: multiplies q; None is K**-0.5.
    initial_state: [B H K V], the state before the first token; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: from the right.
    implementation: "recurrent" (one token after the other), "parallel" (scores of all pairs),
      "chunked" (pairs inside chunks, states between them), "pallas", or None.
    chunk_size: tokens per chunk of "chunked"; None chooses.
    emit_states: m > 0 also returns the state after each of the last m tokens (the first m with
      `reverse`): what rolls a speculative decoder back.
    tree_mask: bool [T T] or [B T T] makes the tokens a tree: true where column is an ancestor of
      row; the diagonal does not matter. Parents must come before their children (after them with
      `reverse`), which is not checked. Each token then continues the path from
      `initial_state` through its ancestors. One chunk: T squared pairs of scores, and states.
    accepted: int32 [B], with `tree_mask`: the token, 0 to T-1, whose state is returned; None is the
      last.

  Returns:
    o [B T H V] in the dtype of `v`, the final state [B H K V] in float32 (float64 for float64
    inputs), and with `emit_states` the states [B m H K V], in order of time.

  Raises:
    ValueError: a shape, a dtype or an `implementation` that cannot be.
  """
  _check(q, k, v, log_decay, beta, initial_state, segment_ids, chunk_size, emit_states)
  _check_tree(v, tree_mask, accepted, implementation, chunk_size)
  dtype, out_dtype = state_dtype(q, k, v, log_decay, beta, initial_state), v.dtype
  (B, T, Hq, K), (H, V) = k.shape, v.shape[2:]
  narrow = jnp.result_type(q, k, v).itemsize == 2
  precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
  run = None
  if tree_mask is None:
    _, run = dispatch.choose(
      "linear_attention", implementation, q=q, k=k, v=v, log_decay=log_decay, beta=beta,
      scale=scale, initial_state=initial_state, segment_ids=segment_ids, reverse=reverse,
      chunk_size=chunk_size, emit_states=emit_states,
    )  # fmt: skip
  if initial_state is None:
    initial_state = jnp.zeros((B, H, K, V), dtype)
  state = varying_like(initial_state.astype(dtype), q, k, v, log_decay, beta, segment_ids)
  if log_decay is not None:
    # -inf is as good as this, and its gradient is 0 * inf.
    log_decay = jnp.maximum(log_decay.astype(dtype), FORGOTTEN)
  arrays = [None if x is None else x.astype(dtype) for x in (q, k, v, log_decay, beta)]
  if reverse:
    arrays, segment_ids = jax.tree.map(lambda x: jnp.flip(x, 1), (arrays, segment_ids))
    tree_mask = None if tree_mask is None else jnp.flip(tree_mask, (-2, -1))
  segments, spoilt = None, None
  if segment_ids is not None:
    segments = find_segments(segment_ids)
    arrays, state, spoilt = quarantine(segments, arrays, state)
  q, k, *by_head = arrays
  scale = K**-0.5 if scale is None else scale
  group = lambda x: None if x is None else x.reshape(*x.shape[:2], Hq, H // Hq, *x.shape[3:])
  tokens = Tokens(q, k, *map(group, by_head), segments)
  state = state.reshape(B, Hq, H // Hq, K, V)

  states = None
  if tree_mask is not None:
    accepted = T - 1 if accepted is None else T - 1 - accepted if reverse else accepted
    o, state, states = tree_attention(
      _scaled(tokens, scale), state, tree_mask, accepted, emit_states, precision
    )
  else:
    run = functools.partial(run, scale=scale, chunk_size=chunk_size, precision=precision)
    o, state, states = _run_emitting(run, tokens, state, scale, precision, emit_states)
  o, state = o.reshape(B, T, H, V), state.reshape(B, H, K, V)
  if states is not None:
    states = states.reshape(B, emit_states, H, K, V)
  if spoilt is not None:
    at_end = spoilt[:, -1]
    if tree_mask is not None:
      at_end = jnp.take_along_axis(spoilt, jnp.broadcast_to(accepted, B)[:, None], 1)[:, 0]
    o = where_mask(segments.real, where_mask(~spoilt, o, jnp.nan))
    state = where_mask(~at_end, state, jnp.nan)
    if states is not None:
      states = where_mask(~spoilt[:, T - emit_states :], states, jnp.nan)
  if reverse:
    o = jnp.flip(o, 1)
    states = None if states is None else jnp.flip(states, 1)
  o = o.astype(out_dtype)
  return (o, state) if states is None else (o, state, states)


def linear_attention_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  *,
  log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
  beta: Float[Array, "B H"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `linear_attention`: o [B H V] in the dtype of `v`, and the new state."""
  one = lambda x: None if x is None else x[:, None]
  o, state = linear_attention(
    one(q), one(k), one(v), log_decay=one(log_decay), beta=one(beta), scale=scale,
    initial_state=state, implementation=implementation,
  )  # fmt: skip
  return o[:, 0], state


def _check(q, k, v, log_decay, beta, initial_state, segment_ids, chunk_size, emit_states):
  vector = log_decay is not None and log_decay.ndim == 4
  dispatch.check_shapes(
    q=(q, "B T Hq K"), k=(k, "B T Hq K"), v=(v, "B T H V"),
    log_decay=(log_decay, "B T H K" if vector else "B T H"), beta=(beta, "B T H"),
    initial_state=(initial_state, "B H K V"), segment_ids=(segment_ids, "B T"),
  )  # fmt: skip
  dispatch.check_dtypes(q=q, k=k, v=v, log_decay=log_decay, beta=beta, initial_state=initial_state)
  dispatch.check_segment_ids(segment_ids)
  dispatch.check_chunk_size(chunk_size)
  if v.shape[2] % q.shape[2]:
    raise ValueError(f"v has H = {v.shape[2]} heads, expected a multiple of q's Hq = {q.shape[2]}")
  if isinstance(emit_states, bool) or not isinstance(emit_states, int):
    raise ValueError(f"emit_states is {emit_states!r}, expected an int")
  if not 0 <= emit_states <= v.shape[1]:
    raise ValueError(f"emit_states is {emit_states}, expected 0 to T = {v.shape[1]}")


def _check_tree(v, tree_mask, accepted, implementation, chunk_size):
  if tree_mask is None:
    if accepted is not None:
      raise ValueError("accepted is given without tree_mask, expected None")
    return
  if chunk_size is not None:
    raise ValueError(f"chunk_size is {chunk_size}, expected None with tree_mask: it is one chunk")
  if implementation is not None:
    raise ValueError(f"implementation is {implementation!r}, expected None with tree_mask")
  if tree_mask.dtype != jnp.bool_:
    raise ValueError(f"tree_mask has dtype {tree_mask.dtype}, expected bool")
  B, T = v.shape[:2]
  if tree_mask.shape not in ((T, T), (B, T, T)):
    raise ValueError(f"tree_mask has shape {tree_mask.shape}, expected [T T] or [B T T] with T={T}")
  if accepted is not None and accepted.shape != (B,):
    raise ValueError(f"accepted has shape {accepted.shape}, expected [B] with B={B}")
  if accepted is not None and not jnp.issubdtype(accepted.dtype, jnp.integer):
    raise ValueError(f"accepted has dtype {accepted.dtype}, expected an integer")


def _run_emitting(run, tokens, state, scale, precision, emit_states):
  """`run` over the tokens; the last `emit_states` of them one by one, to see each state."""
  if not emit_states:
    return *run(tokens, state), None
  at = tokens.v.shape[1] - emit_states
  outputs = []
  if at:
    o, state = run(jax.tree.map(lambda x: x[:, :at], tokens), state)
    outputs.append(o)
  rest = jax.tree.map(lambda x: x[:, at:], tokens)
  o, state, states = _step_by_step(_scaled(rest, scale), state, precision)
  return jnp.concatenate([*outputs, o], axis=1), state, states


def _scaled(tokens, scale):
  return tokens._replace(q=tokens.q * scale)


def _step_by_step(tokens, state, precision):
  """Outputs, the final state, and the state after each token [B T Hq M K V]."""

  def contract(equation, *arrays):
    return jnp.einsum(equation, *arrays, precision=precision)

  def step(S, token):
    q, k, r, log_decay, beta, segments = token
    if segments is not None:
      S = where_mask(~segments.start, S)
    if log_decay is not None:
      S = jnp.exp(log_decay).reshape(*S.shape[:3], -1, 1) * S
    if beta is not None:
      r = beta[..., None] * (r - contract("bhk,bhmkv->bhmv", k, S))
    S = S + contract("bhk,bhmv->bhmkv", k, r)
    return S, (contract("bhk,bhmkv->bhmv", q, S), S)

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  state, (o, states) = jax.lax.scan(step, state, by_time)
  return jnp.moveaxis(o, 0, 1), state, jnp.moveaxis(states, 0, 1)


def _recurrent(tokens, state, scale, chunk_size, precision):
  return _step_by_step(_scaled(tokens, scale), state, precision)[:2]


def _chunked(tokens, state, scale, chunk_size, precision):
  return chunked(_scaled(tokens, scale), state, chunk_size, precision)


def _parallel(tokens, state, scale, chunk_size, precision):
  return parallel(_scaled(tokens, scale), state, precision)


def _preference(*, k, v, log_decay, beta, **arguments):
  if v.shape[1] > 1:
    # The kernels of KDA were found right on a GPU one by one, never yet as a whole.
    unproven = beta is not None and log_decay is not None and log_decay.ndim == 4
    return ["chunked", "pallas"] if unproven else ["pallas", "chunked"]
  # One token needs no scores. Where its state is small, XLA's own kernels are as fast, and cost
  # less to launch.
  large = v.size * k.shape[3] >= 2**21
  return ["pallas", "recurrent"] if large else ["recurrent", "pallas"]


dispatch.declare(
  "linear_attention",
  {
    "chunked": dispatch.Implementation(
      _chunked, dispatch.anything, "pairs inside chunks, states between them"
    ),
    "recurrent": dispatch.Implementation(
      _recurrent, dispatch.anything, "T steps, every state kept for gradients"
    ),
    "parallel": dispatch.Implementation(
      _parallel, dispatch.anything, "scores of all pairs, T squared of them"
    ),
    "pallas": dispatch.Implementation(
      kernels.run, kernels.supports, "one pass over memory, states on chip"
    ),
  },
  _preference,
)
