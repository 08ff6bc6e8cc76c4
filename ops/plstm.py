"""pLSTM on a sequence: states that live on the edges between tokens, under four gates.

  o_t = scale (q_t^T C_t mark_t + (q_t . k_t) direct_t v_t)        read, before the write
  C_{t+1} = transition_t C_t + source_t k_t v_t^T                  then write

C_t [K V] is the state on the edge that enters token t. A token sees itself through `direct` only.
With state tracking each state has J copies that a matrix mixes, and the other gates say which of
several keys, values, queries and outputs of a token go where.

Inside there is one form for both. A token has R = Jq Jo slots that read and S = Jk Jv slots that
write, each with its own copy of q, k or v, and the gates are matrices between slots and copies;
the scalar form has one of each. `plstm_chunked.py` holds the form that is fast on every device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import dispatch
from ops.plstm_chunked import Tokens, chunked, contract, outer, parallel
from ops.precision import state_dtype, varying_like
from ops.segments import find_segments, quarantine, where_mask
from ops.time_axis import splits_time

_TRACKING = {
  "q": "B T H K Jq",
  "k": "B T H K Jk",
  "v": "B T H V Jv",
  "transition": "B T H J J",
  "source": "B T H J Jk Jv",
  "mark": "B T H Jo Jq J",
  "direct": "B T H Jo Jq Jk Jv",
  "initial_state": "B H K V J",
}
_SCALAR = {
  name: " ".join(axis for axis in axes.split() if not axis.startswith("J"))
  for name, axes in _TRACKING.items()
}


@splits_time
def plstm_1d(
  q: Float[Array, "B T H K"] | Float[Array, "B T H K Jq"],
  k: Float[Array, "B T H K"] | Float[Array, "B T H K Jk"],
  v: Float[Array, "B T H V"] | Float[Array, "B T H V Jv"],
  source: Float[Array, "B T H"] | Float[Array, "B T H J Jk Jv"],
  transition: Float[Array, "B T H"] | Float[Array, "B T H J J"],
  mark: Float[Array, "B T H"] | Float[Array, "B T H Jo Jq J"],
  direct: Float[Array, "B T H"] | Float[Array, "B T H Jo Jq Jk Jv"],
  *,
  scale: float | None = None,
  initial_state: Float[Array, "B H K V"] | Float[Array, "B H K V J"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Array, Array]:
  """o_t = scale (mark_t C_t^T q_t + direct_t (q_t . k_t) v_t), and then
  C_{t+1} = transition_t C_t + source_t k_t v_t^T.

  Poeppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks", 2025
  (arXiv:2506.11997). With state tracking, that is where `transition` is [B T H J J],

    o[v,o] = scale q[d,q] (mark[o,q,i] C[d,v,i] + direct[o,q,k,l] k[d,k] v[v,l])
    C[d,v,i] <- transition[i,j] C[d,v,j] + source[i,k,l] k[d,k] v[v,l]

  Args:
    q, k: [B T H K]; with state tracking [B T H K Jq] and [B T H K Jk].
    v: [B T H V]; with state tracking [B T H V Jv].
    source: what a token writes on the edge that leaves it, [B T H]; [B T H J Jk Jv].
    transition: what it lets pass from the edge that enters it, [B T H]; [B T H J J], (out, in). Any
      sign, and zero; |transition| <= 1, or a norm of at most 1, for a stable recurrence.
    mark: what it reads of the edge that enters it, [B T H]; [B T H Jo Jq J].
    direct: what it sees of itself, [B T H]; [B T H Jo Jq Jk Jv].
    scale: multiplies q; None is K**-0.5.
    initial_state: [B H K V], or [B H K V J], on the edge that enters the first token; None is zero.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    reverse: from the right.
    implementation: "recurrent" (one token after the other), "parallel" (gates between all pairs),
      "chunked" (pairs inside chunks, states between them), or None.
    chunk_size: tokens per chunk of "chunked", rounded up to a power of two; None chooses.

  Returns:
    o [B T H V], with state tracking [B T H V Jo], in the dtype of `v`, and the state on the edge
    that leaves the last token, float32 (float64 for float64 inputs).

  Raises:
    ValueError: a shape, a dtype or an `implementation` that cannot be.
  """
  arrays = dict(
    q=q, k=k, v=v, source=source, transition=transition, mark=mark, direct=direct,
    initial_state=initial_state,
  )  # fmt: skip
  tracking = transition.ndim == 5
  letters = _TRACKING if tracking else _SCALAR
  expected = {name: (arrays[name], axes) for name, axes in letters.items()}
  if tracking and transition.shape[3] != transition.shape[4]:
    raise ValueError(f"transition has shape {transition.shape}, expected [B T H J J]")
  dispatch.check_shapes(**expected, segment_ids=(segment_ids, "B T"))
  dispatch.check_dtypes(**arrays)
  dispatch.check_segment_ids(segment_ids)
  dispatch.check_chunk_size(chunk_size)
  _, run = dispatch.choose(
    "plstm_1d", implementation, **arrays, segment_ids=segment_ids, reverse=reverse,
    chunk_size=chunk_size,
  )  # fmt: skip
  dtype, out_dtype = state_dtype(*arrays.values()), v.dtype
  narrow = jnp.result_type(q, k, v).itemsize == 2
  precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
  arrays = {name: _wide(name, x, dtype) for name, x in arrays.items() if x is not None}
  (B, _, H, K, _), V, J = arrays["q"].shape, v.shape[3], arrays["transition"].shape[3]
  state = arrays.pop("initial_state", jnp.zeros((B, H, K, V, J), dtype))
  state = varying_like(state, *arrays.values(), segment_ids)
  if reverse:
    arrays, segment_ids = jax.tree.map(lambda x: jnp.flip(x, 1), (arrays, segment_ids))
  start = spoilt = None
  if segment_ids is not None:
    segments = find_segments(segment_ids)
    values, state, spoilt = quarantine(segments, list(arrays.values()), state)
    arrays, start = dict(zip(arrays, values)), segments.start
    neutral = jnp.eye(J, dtype=dtype)
    real = segments.real[:, :, None, None, None]
    arrays["transition"] = jnp.where(real, arrays["transition"], neutral)
  arrays["q"] *= K**-0.5 if scale is None else scale
  o, state = run(
    _in_slots(start=start, **arrays), jnp.moveaxis(state, -1, 2), chunk_size, precision
  )
  o, state = _out_of_slots(o, arrays["mark"].shape[3]), jnp.moveaxis(state, 2, -1)
  if spoilt is not None:
    o = where_mask(segments.real, where_mask(~spoilt, o, jnp.nan))
    state = where_mask(~spoilt[:, -1], state, jnp.nan)
  if not tracking:
    o, state = o[..., 0], state[..., 0]
  return (jnp.flip(o, 1) if reverse else o).astype(out_dtype), state


def plstm_1d_step(
  state: Float[Array, "B H K V"] | Float[Array, "B H K V J"],
  q: Float[Array, "B H K"] | Float[Array, "B H K Jq"],
  k: Float[Array, "B H K"] | Float[Array, "B H K Jk"],
  v: Float[Array, "B H V"] | Float[Array, "B H V Jv"],
  source: Float[Array, "B H"] | Float[Array, "B H J Jk Jv"],
  transition: Float[Array, "B H"] | Float[Array, "B H J J"],
  mark: Float[Array, "B H"] | Float[Array, "B H Jo Jq J"],
  direct: Float[Array, "B H"] | Float[Array, "B H Jo Jq Jk Jv"],
  *,
  scale: float | None = None,
) -> tuple[Array, Array]:
  """One token of `plstm_1d`: o [B H V] or [B H V Jo] in the dtype of `v`, and the new state."""
  token = (x[:, None] for x in (q, k, v, source, transition, mark, direct))
  o, state = plstm_1d(*token, scale=scale, initial_state=state, implementation="recurrent")
  return o[:, 0], state


def _wide(name, x, dtype):
  """In `dtype`, with the axes of state tracking, of size 1 where it has none."""
  missing = len(_TRACKING[name].split()) - x.ndim
  return x.astype(dtype).reshape(*x.shape, *(1,) * missing)


def _in_slots(q, k, v, source, transition, mark, direct, start):
  """Slot r = (q, o) reads, slot s = (k, l) writes."""
  (Jo, Jq), (Jk, Jv) = mark.shape[3:5], source.shape[4:6]
  R, S = Jq * Jo, Jk * Jv
  lead, J = transition.shape[:3], transition.shape[3]
  return Tokens(
    jnp.stack([q[..., r // Jo] for r in range(R)], axis=3),
    jnp.stack([k[..., s // Jv] for s in range(S)], axis=3),
    jnp.stack([v[..., s % Jv] for s in range(S)], axis=3),
    source.reshape(*lead, J, S),
    transition,
    jnp.swapaxes(mark, 3, 4).reshape(*lead, R, J),
    jnp.swapaxes(direct.reshape(*lead, Jo, Jq, S), 3, 4).reshape(*lead, R, S),
    start,
  )


def _out_of_slots(o, Jo):
  """[B T H R V] -> [B T H V Jo], what the queries of a token read added up."""
  queries = [o[:, :, :, at : at + Jo] for at in range(0, o.shape[3], Jo)]
  return jnp.swapaxes(sum(queries[1:], queries[0]), 3, 4)


def _recurrent(tokens, state, chunk_size, precision):
  def step(state, token):
    q, k, v, source, transition, mark, direct, start = token
    state = state if start is None else where_mask(~start, state)
    by_rows = state.reshape(*state.shape[:2], -1, state.shape[-1])  # copies and keys
    o = contract("bhri,bhiv->bhrv", outer(mark, q), by_rows, precision)
    scores = contract("bhrk,bhsk->bhrs", q, k, precision)
    o += contract("bhrs,bhsv->bhrv", scores * direct, v, precision)
    write = contract("bhsi,bhsv->bhiv", outer(jnp.swapaxes(source, 2, 3), k), v, precision)
    kept = contract("bhij,bhjkv->bhikv", transition, state)
    return kept + write.reshape(state.shape), o

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  state, o = jax.lax.scan(step, state, by_time)
  return jnp.moveaxis(o, 0, 1), state


def _preference(*, v, **arguments):
  return ["recurrent", "chunked"] if v.shape[1] == 1 else ["chunked"]


dispatch.declare(
  "plstm_1d",
  {
    "chunked": dispatch.Implementation(
      chunked, dispatch.anything, "pairs inside chunks, states between them"
    ),
    "recurrent": dispatch.Implementation(
      _recurrent, dispatch.anything, "T steps, every state kept for gradients"
    ),
    "parallel": dispatch.Implementation(
      parallel, dispatch.anything, "gates between all pairs, T squared of them"
    ),
    "pallas": dispatch.NO_KERNEL,
  },
  _preference,
)
