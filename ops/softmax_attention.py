"""Causal softmax attention with rotary positions, over everything or over a sliding window.

    o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j         j <= t, t - j < window, same document

Vaswani et al., "Attention Is All You Need", 2017; grouped key and value heads as Ainslie et al.,
"GQA", 2023; sliding window as Beltagy et al., "Longformer", 2020.

The state holds the last keys and values of the present document, as they were before their
rotation: angles are taken afresh from positions inside the window at each call, so that they are
as exact after a million tokens as after ten, and the state's size never grows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import dispatch, online_softmax
from ops.online_softmax import Keys, Places
from ops.rotary import rotary
from ops.segments import find_segments, where_mask
from ops.time_axis import splits_time

SEQUENCES = ("all_gather", "ring")


def softmax_attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T Hq V"],
  *,
  window: int | None = None,
  context: int = 0,
  rotary_base: float = 10000.0,
  initial_state: dict[str, Array] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  sequence: str = "all_gather",
) -> tuple[Float[Array, "B T H V"], dict[str, Array]]:
  """Each query's average of the values before it, its own included.

  Args:
    q: [B T H K], K even, without positions: they are rotated here.
    k: [B T Hq K]; each key serves H / Hq queries.
    v: [B T Hq V].
    window: tokens that a token sees, itself included; None is all.
    context: keys and values kept in the state where `window` is None; else they are window - 1.
    rotary_base: longest wavelength of the rotary positions / 2 pi, tokens.
    initial_state: of an earlier call: `k`, `v` [B kept Hq ...], `valid` bool [B kept]; None is
      empty. It belongs to the first document.
    segment_ids: int32 [B T], documents and padding (negative), see `ops.segments`.
    sequence: where a mesh splits time, how keys and values come to the queries: "all_gather" (all
      at once) or "ring" (from device to device, one part of time at a time). A window that reaches
      no further than the part before needs neither.

  Returns:
    o [B T H V] in the dtype of `q`, zero at padding, and the state after the last token.

  Raises:
    ValueError: a shape or `sequence` that cannot be.
  """
  dispatch.check_shapes(
    q=(q, "B T H K"), k=(k, "B T Hq K"), v=(v, "B T Hq V"), segment_ids=(segment_ids, "B T")
  )
  dispatch.check_segment_ids(segment_ids)
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"q has {q.shape[2]} heads, expected a multiple of the {k.shape[2]} of k")
  if sequence not in SEQUENCES:
    raise ValueError(f"sequence is {sequence!r}, expected one of {', '.join(SEQUENCES)}")
  past = {} if initial_state is None else initial_state
  kept = context if window is None else window - 1
  for name, array in past.items():
    expected = {"k": (len(k), kept, *k.shape[2:]), "v": (len(v), kept, *v.shape[2:])}
    expected = expected.get(name, (len(k), kept))
    if array.shape != expected:
      raise ValueError(f"initial_state[{name!r}] has shape {array.shape}, expected {expected}")
  o, *state = attend(
    q, k, v, past.get("k"), past.get("v"), past.get("valid"), segment_ids,
    window=window, kept=kept, rotary_base=rotary_base, sequence=sequence,
  )  # fmt: skip
  return o, dict(zip(("k", "v", "valid"), state))


@splits_time
def attend(
  q, k, v, past_k, past_v, past_valid, segment_ids, *, window, kept, rotary_base, sequence
):
  """`softmax_attention` with the arrays of its states one by one, and `kept` tokens in them."""
  masks = None if segment_ids is None else find_segments(segment_ids)
  cache = _extend(past_k, past_v, past_valid, k, v, masks)
  last = _last(cache, kept)
  # JAX's own rounds to float32.
  if past_k is None and masks is None and q.dtype != jnp.float64:
    return _attend_whole(q, k, v, window, rotary_base), *last
  return _attend_cached(q, cache, masks, window, rotary_base), *last


def _attend_whole(q, k, v, window, rotary_base):
  """One document a row and nothing before it: the form for which devices have fast kernels."""
  T = q.shape[1]
  q, k = (rotary(x, jnp.arange(T)[None], rotary_base) for x in (q, k))
  local = None if window is None or window >= T else (window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def _attend_cached(q, cache, masks, window, rotary_base):
  """Keys from the state and from this call, told apart by document and by position."""
  T, valid = q.shape[1], cache["valid"]
  position = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
  keys = Places(position, jnp.where(valid, cache["document"], -1))
  queries = Places(position[:, -T:], jnp.where(valid, cache["document"], -2)[:, -T:])
  k = rotary(cache["k"], keys.position, rotary_base)
  q = rotary(q, queries.position, rotary_base)
  # What is not seen may be anything, NaN included, and NaN * 0 is NaN: it is read as zero.
  k, v, q = where_mask(valid, k), where_mask(valid, cache["v"]), where_mask(valid[:, -T:], q)
  if q.dtype == jnp.float64:
    kv = jnp.concatenate([k, v], axis=-1)
    sums = online_softmax.add(online_softmax.start(q, kv), q, queries, Keys(kv, keys), window)
    return online_softmax.finish(sums)[0]
  seen = online_softmax.seen(queries, keys, window)
  # A padded query sees only itself: a row without any key would be 0 / 0.
  own = jnp.arange(valid.shape[1]) == jnp.arange(T)[:, None] + valid.shape[1] - T
  real = jnp.ones(q.shape[:2], bool) if masks is None else masks.real
  seen = jnp.where(real[:, :, None], seen, own)
  o = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
  return where_mask(real, o)


def _extend(past_k, past_v, past_valid, k, v, masks):
  """The state's keys and values followed by those of this call, each with its document's number."""
  call = {
    "k": k,
    "v": v,
    "valid": jnp.ones(k.shape[:2], bool) if masks is None else masks.real,
    "document": jnp.zeros(k.shape[:2], jnp.int32) if masks is None else masks.document,
  }
  if past_k is None:
    return call
  # What the state holds belongs to the first document of this call.
  document = jnp.zeros(past_valid.shape, jnp.int32)
  past = {"k": past_k, "v": past_v, "valid": past_valid, "document": document}
  return {name: jnp.concatenate([past[name], call[name]], axis=1) for name in call}


def _last(cache, kept: int) -> tuple[Array, Array, Array]:
  """The state after this call: the last `kept` real tokens of the last document."""
  missing = max(kept - cache["valid"].shape[1], 0)
  pad = lambda x: jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2))
  valid = pad(cache["valid"] & (cache["document"] == cache["document"][:, -1:]))
  # A stable sort moves padding and ended documents to the front and keeps the order of the rest.
  order = jnp.argsort(valid, axis=1, stable=True)[:, valid.shape[1] - kept :]
  take = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
  kept_valid = take(valid)
  clean = lambda x: where_mask(kept_valid, take(pad(x)))
  return clean(cache["k"]), clean(cache["v"]), kept_valid
