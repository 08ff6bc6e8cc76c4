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
from ops.time_axis import Split


def _form(split, arguments):
  q, k, v, ids, window = (arguments[name] for name in ("q", "k", "v", "segment_ids", "window"))
  (B, T, _, K), kept = k.shape, arguments["kept"]
  kv = jnp.concatenate([k, v], axis=-1)
  first = halo.Window(jnp.zeros((B, kept, *kv.shape[2:]), kv.dtype), jnp.zeros(B, jnp.int32))
  if arguments["past_k"] is not None:
    past = jnp.concatenate([arguments["past_k"], arguments["past_v"]], axis=-1).astype(kv.dtype)
    valid = arguments["past_valid"]
    first = halo.Window(where_mask(valid, past), jnp.sum(valid, axis=1, dtype=jnp.int32))
  packed, rounds = ids is not None, split.P - 1
  near = window is not None and window - 1 <= T
  if near:
    past = halo.before(split, kv, first, ids)
    at = _within(past.count, T, ids)
    how = _How(split, "ring", window, 0, packed)
  else:
    past, at = first, _places(split, first.count, T, ids)
    if window is not None and not packed:
      rounds = min(rounds, -(-(window - 1) // T))
    how = _How(split, arguments["sequence"], window, rounds, packed)

  turn = lambda x, at: rotary(x, at.position, arguments["rotary_base"])
  turn_keys = lambda kv, at: jnp.concatenate([turn(kv[..., :K], at), kv[..., K:]], axis=-1)
  q, keys, earlier = turn(q, at), turn_keys(kv, at), None
  if packed:
    q, keys = where_mask(ids >= 0, q), where_mask(ids >= 0, keys)
  if kept and (near or arguments["past_k"] is not None):
    position = jnp.arange(kept) - kept + past.count[:, None]
    places = Places(position, jnp.where(position >= 0, 0, -1))
    earlier = Keys(turn_keys(past.tokens, places), places)
  o = _run(how, q, Keys(keys, at), earlier)
  return o, *_state(halo.after(split, kv, first, ids), K)


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
  rounds: int  # hops of a ring: devices back that a query may see
  packed: bool  # whether places have to be sent, or are known


def _within(count, T: int, ids) -> Places:
  """Of a part's tokens, where `count` tokens of its first document come before it."""
  if ids is None:
    position = count[:, None] + jnp.arange(T)
    return Places(position, jnp.zeros_like(position))
  segments = find_segments(ids)
  position = count[:, None] + jnp.cumsum(segments.real, axis=1, dtype=jnp.int32) - 1
  return Places(position, jnp.where(segments.real, segments.document, -1))


def _places(split: Split, count, T: int, ids) -> Places:
  """Of a part's tokens, in all of time, where `count` tokens come before the first part."""
  if ids is None:
    return _within(count + split.order() * T, T, None)
  crossing, segments = border(split, ids), find_segments(ids)
  documents = segments.document[:, -1] + crossing
  numbers = jnp.stack([jnp.sum(segments.real, axis=1, dtype=jnp.int32), documents])
  parts = jax.lax.all_gather(numbers, split.axis)
  earlier = (jnp.arange(split.P) < split.order())[:, None, None]
  tokens, documents = jnp.sum(jnp.where(earlier, parts, 0), axis=0)
  at = _within(count + tokens, T, ids)
  document = at.document + (documents + crossing)[:, None]
  return at._replace(document=jnp.where(at.document < 0, -1, document))


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
  if hops == 0:
    return x
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
