"""Sequence parallelism of `ops.softmax_attention`: keys and values come to the queries.

  all_gather   to all devices at once, and their gradients back by one reduce-scatter
               Sun et al., "LASP-2", 2025 (arXiv:2502.07563), for the attention of hybrids
  ring         each device's to the next, P - 1 times; in the backward pass their gradients travel
               with them, and then home.    Liu et al., "Ring Attention with Blockwise
               Transformers for Near-Infinite Context", 2023 (arXiv:2310.01889)

Either way a part's keys are met one part at a time, parts that no query sees are skipped, and
the backward pass makes the weights again. A window that reaches no further than one part back needs
the last keys and values before the part only, as a convolution does (`ops.halo`).

Documents cost integers: the numbers of a part's tokens and documents, and with a ring, where each
key is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ops import halo, online_softmax, time_axis
from ops.device_scan import border
from ops.online_softmax import Keys, Places
from ops.rotary import rotary
from ops.segments import find_segments, where_mask
from ops.softmax_attention import attend
from ops.time_axis import Split


def _form(split, arguments):
  k, v, window, ids = (arguments[name] for name in ("k", "v", "window", "segment_ids"))
  (B, T), kept = k.shape[:2], arguments["kept"]
  kv = jnp.concatenate([k, v], axis=-1)
  past, valid = jnp.zeros((B, kept, *kv.shape[2:]), kv.dtype), jnp.zeros((B, kept), bool)
  if arguments["past_k"] is not None:
    valid = arguments["past_valid"]
    past = jnp.concatenate([arguments["past_k"], arguments["past_v"]], axis=-1).astype(kv.dtype)
    past = where_mask(valid, past)
  past = halo.Window(past, jnp.sum(valid, axis=1, dtype=jnp.int32))
  if window is not None and window - 1 <= T:
    entering = _state(halo.before(split, kv, past, ids), k.shape[3])
    names = ("past_k", "past_v", "past_valid")
    o, *_ = attend(**{**arguments, **dict(zip(names, entering))})
  else:
    o = _attend_all(split, arguments, past)
  return o, *_state(halo.after(split, kv, past, ids), k.shape[3])


def _state(window: halo.Window, K: int):
  """Keys, values, and which there are."""
  kept = window.tokens.shape[1]
  there = jnp.arange(kept) >= kept - window.count[:, None]
  return window.tokens[..., :K], window.tokens[..., K:], there


class _How(NamedTuple):
  """Static, of one call."""

  split: Split
  sequence: str
  window: int | None
  rounds: int  # devices back that a query may see
  packed: bool  # whether places have to be sent, or are known


def _attend_all(split, arguments, past: halo.Window):
  q, k, v, ids, window = (arguments[name] for name in ("q", "k", "v", "segment_ids", "window"))
  T, base = k.shape[1], arguments["rotary_base"]
  at, rounds = _places(split, T, past.count, ids), split.P - 1
  turn = lambda x, at: rotary(x, at.position, base)
  q, kv = turn(q, at), jnp.concatenate([turn(k, at), v], axis=-1)
  if ids is not None:
    q, kv = (where_mask(ids >= 0, x) for x in (q, kv))
  elif window is not None:
    rounds = min(rounds, -(-(window - 1) // T))
  earlier = None
  if arguments["past_k"] is not None:
    kept, K = past.tokens.shape[1], k.shape[3]
    position = jnp.arange(kept) - kept + past.count[:, None]
    places = Places(position, jnp.where(position >= 0, 0, -1))
    tokens = past.tokens
    tokens = jnp.concatenate([turn(tokens[..., :K], places), tokens[..., K:]], axis=-1)
    earlier = Keys(tokens, places)
  how = _How(split, arguments["sequence"], window, rounds, ids is not None)
  return _run(how, q, Keys(kv, at), earlier)


def _places(split, T, count, ids) -> Places:
  """Of this part's tokens, in all of time; what came before the first counts too."""
  if ids is None:
    position = count[:, None] + split.order() * T + jnp.arange(T)
    return Places(position, jnp.zeros_like(position))
  crossing, segments = border(split, ids), find_segments(ids)
  documents = segments.document[:, -1] + crossing
  numbers = jnp.stack([jnp.sum(segments.real, axis=1, dtype=jnp.int32), documents])
  parts = jax.lax.all_gather(numbers, split.axis)
  earlier = (jnp.arange(split.P) < split.order())[:, None, None]
  tokens, documents = jnp.sum(jnp.where(earlier, parts, 0), axis=0)
  position = (count + tokens)[:, None] + jnp.cumsum(segments.real, axis=1, dtype=jnp.int32) - 1
  document = segments.document + (documents + crossing)[:, None]
  return Places(position, jnp.where(segments.real, document, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, q: Array, keys: Keys, past: Keys | None) -> Array:
  """The outputs of this device's queries, [B T H V]."""
  return _forward(how, q, keys, past)[0]


def _forward(how, q, keys, past):
  at, sums = _of_queries(keys.at), online_softmax.start(q, keys.kv)
  if past is not None:
    sums = online_softmax.add(sums, q, at, past, how.window)

  def add(sums, block):
    return online_softmax.add(sums, q, at, block, how.window), None

  if how.sequence == "all_gather":
    sums, _ = jax.lax.scan(add, sums, _gathered(how, keys))
  else:

    def step(carry, r):
      sums, moving = carry
      # Sent before they are used: the next part is on its way meanwhile.
      following = _hop(how, moving)
      return (add(sums, _block(how, keys, moving, r))[0], following), None

    (sums, moving), _ = jax.lax.scan(step, (sums, _moving(how, keys)), jnp.arange(how.rounds))
    sums, _ = add(sums, _block(how, keys, moving, how.rounds))
  o, log_total = online_softmax.finish(sums)
  o = o.astype(q.dtype)
  return o, (q, keys, past, o, log_total)


def _backward(how, residuals, do):
  q, keys, past, o, log_total = residuals
  given = online_softmax.pull(q, _of_queries(keys.at), o, log_total, do)
  dq, d_past = jnp.zeros(q.shape, log_total.dtype), None
  if past is not None:
    dq, d_past = online_softmax.gradients(given, dq, past, how.window)
    d_past = Keys(d_past.astype(past.kv.dtype), None)

  def pull(dq, block):
    return online_softmax.gradients(given, dq, block, how.window)

  if how.sequence == "all_gather":
    dq, d_blocks = jax.lax.scan(pull, dq, _gathered(how, keys))
    d_kv = jax.lax.psum_scatter(d_blocks, how.split.axis)
  else:

    def step(carry, r):
      dq, moving, d_kv = carry
      following = _hop(how, moving)
      dq, more = pull(dq, _block(how, keys, moving, r))
      return (dq, following, _hop(how, d_kv + more)), None

    start = dq, _moving(how, keys), jnp.zeros(keys.kv.shape, dq.dtype)
    (dq, moving, d_kv), _ = jax.lax.scan(step, start, jnp.arange(how.rounds))
    dq, more = pull(dq, _block(how, keys, moving, how.rounds))
    d_kv = _hop(how, d_kv + more, -how.rounds)
  return dq.astype(q.dtype), Keys(d_kv.astype(keys.kv.dtype), None), d_past


_run.defvjp(_forward, _backward)


def _of_queries(at: Places) -> Places:
  """Padding sees nothing, itself neither."""
  return at._replace(document=jnp.where(at.document < 0, -2, at.document))


def _gathered(how: _How, keys: Keys) -> Keys:
  """The keys of every part, [P B T ...]."""
  P, axis = how.split.P, how.split.axis
  kv = jax.lax.all_gather(keys.kv, axis)
  if how.packed:
    return Keys(kv, Places(*jnp.moveaxis(jax.lax.all_gather(jnp.stack(keys.at), axis), 1, 0)))
  return Keys(kv, jax.vmap(lambda part: _places_of(how, keys, part))(jnp.arange(P)))


def _places_of(how: _How, keys: Keys, part) -> Places:
  """Without padding and documents, places in another part of time are as far away as it is."""
  hops = part - how.split.order()
  return keys.at._replace(position=keys.at.position + hops * keys.kv.shape[1])


def _moving(how: _How, keys: Keys):
  """What a ring sends."""
  return keys.kv, jnp.stack(keys.at) if how.packed else None


def _block(how: _How, keys: Keys, moving, r) -> Keys:
  """The keys that are here after `r` hops."""
  kv, places = moving
  if places is not None:
    return Keys(kv, Places(*places))
  return Keys(kv, _places_of(how, keys, (how.split.order() - r) % how.split.P))


def _hop(how: _How, x, hops: int = 1):
  P = how.split.P
  links = [(p, (p + hops) % P) for p in range(P)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, how.split.axis, links), x)


time_axis.declare(
  "attend",
  _form,
  {
    "q": "B T H K", "k": "B T Hq K", "v": "B T Hq V", "past_k": "B kept Hq K",
    "past_v": "B kept Hq V", "past_valid": "B kept", "segment_ids": "B T",
  },
  ("B T H V", "B kept Hq K", "B kept Hq V", "B kept"),
)  # fmt: skip
