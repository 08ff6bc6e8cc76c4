"""Sequence parallelism: every recurrence over a mesh axis that splits time.

A device's part of time is one affine map h -> A h + b. Forward, with s the state that enters:

  b = final state of the part from zero        A = product of its transitions
  s = the maps of the parts before, composed   (`ops.device_scan`: the only exchange)
  o, s' = op(part, s)

Backward, with ds' the cotangent of what leaves and do that of o, the exchange runs reversed:

  db = pull(do, 0)                             what reaches s from this part's outputs alone
  ds' = db' of the parts after, composed with A^T
  pull(do, ds')                                every gradient of the part

so the transitions are never differentiated, and a state crosses each border once each way. A
document that begins in a part cuts A; one that begins at its border cuts s. The public ops run
these forms by themselves where a mesh splits time (`ops.time_axis`).

Sun et al., "Linear Attention Sequence Parallelism", 2024 (arXiv:2404.02882), whose exchange of
states this is, without decays, resets or delta rules.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ops import affine, time_axis
from ops.device_scan import Algebra, border, enter, incoming
from ops.linear_attention import FORGOTTEN, linear_attention
from ops.linear_scan import linear_scan
from ops.plstm import plstm_1d
from ops.segments import find_segments, quarantine, where_mask
from ops.selective_scan import selective_scan
from ops.time_axis import Split
from ops.time_axis import exchange as exchange

DENSE = Algebra((("dense", True),))


class Part(NamedTuple):
  """An op on one device's part of time; static, its arrays are given."""

  split: Split
  op: Callable  # arrays, state -> o, state after
  whole: Callable  # arrays, zero state -> the part as one map, without its resets
  algebra: Callable  # arrays -> the `Algebra` of that map


def recurrence(
  op: Callable, whole: Callable, algebra: Callable = lambda **arrays: Algebra()
) -> time_axis.Form:
  """The form of a recurrence whose parts are affine maps of its state.

  Args:
    op: the public op.
    whole: a function of (arrays by name, zero state, options by name) to the `affine.Affine` of the
      part, resets left out of its transition.
    algebra: a function of the op's arrays to that of the map.
  """

  def form(split, arguments):
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    options = {name: x for name, x in arguments.items() if name not in arrays}
    state = arrays.pop("initial_state", None)
    options.pop("initial_state", None)
    after = jax.eval_shape(functools.partial(op, **options), **arrays)[1]
    state = jnp.zeros(after.shape, after.dtype) if state is None else state.astype(after.dtype)
    ids = arrays.get("segment_ids")
    crossing = None if ids is None else border(split, ids)
    part = Part(
      split,
      lambda arrays, state: op(**arrays, initial_state=state, **options),
      lambda arrays, zero: whole(arrays, zero, options),
      lambda arrays: algebra(**arrays),
    )
    o, last = _run(part, arrays, crossing, state)
    return o, split.from_last(last)

  return form


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(part: Part, arrays: dict[str, Any], crossing, state):
  """The outputs of this device's part, and the state after it."""
  return _forward(part, arrays, crossing, state)[0]


def _forward(part, arrays, crossing, state):
  split, op, whole, algebra = part
  element = whole(arrays, jnp.zeros_like(state))
  if crossing is not None:
    start = find_segments(arrays["segment_ids"], reverse=split.reverse).start
    element = affine.reset(element, start.any(axis=1) | crossing)
  entered, gathered = incoming(split, element, state, algebra(arrays))
  (o, last), pull = jax.vjp(
    lambda arrays, state: op(arrays, enter(crossing, state)), arrays, entered
  )
  return (o, last), (arrays, pull, element._replace(input=None), gathered)


def _backward(part, residuals, cotangents):
  split = part.split
  arrays, pull, element, gathered = residuals
  algebra = part.algebra(arrays)
  do, d_last = cotangents
  transpose = lambda A: jnp.swapaxes(A, -1, -2) if algebra == DENSE else A
  element = element._replace(
    transition=transpose(element.transition), input=pull((do, jnp.zeros_like(d_last)))[1]
  )
  if gathered is not None:
    gathered = transpose(gathered[0]), gathered[1]
  backwards = split._replace(reverse=not split.reverse)
  d_last, _ = incoming(backwards, element, d_last, algebra, gathered)
  d_arrays, d_state = pull((do, d_last))
  return d_arrays, None, jnp.where(split.order() == 0, d_state, 0)


_run.defvjp(_forward, _backward)


def _real(arrays, x, other=0.0):
  """`x` [B T ...], `other` at padding."""
  ids = arrays.get("segment_ids")
  return x if ids is None else where_mask(ids >= 0, x, other)


def _after(op, arrays, zero, options):
  return op(**arrays, initial_state=zero, **options)[1]


def _linear_scan_whole(arrays, zero, options):
  a = _real(arrays, arrays["a"].astype(zero.dtype), 1.0)
  return affine.Affine(jnp.prod(a, axis=1), _after(linear_scan, arrays, zero, options))


def _selective_scan_whole(arrays, zero, options):
  dt = jnp.sum(_real(arrays, arrays["dt"].astype(zero.dtype)), axis=1)
  return affine.Affine(dt, _after(selective_scan, arrays, zero, options))


def _selective_scan_algebra(A, **arrays):
  """Sent is the sum of dt, [B D], from which every device has the transition [B D N]."""
  return Algebra(expand=lambda dt: jnp.exp(dt[..., None] * A.astype(dt.dtype)))


def _linear_attention_whole(arrays, zero, options):
  """Without the delta rule a state is one sum, S = sum_t exp(g_{t+1} + ... + g_T) k_t v_t^T."""
  if arrays.get("beta") is not None:
    return _delta_rule_whole(arrays, zero, options)
  k, v, log_decay = arrays["k"], arrays["v"], arrays.get("log_decay")
  (B, T, Hq, K), (H, V) = k.shape, v.shape[2:]
  narrow = jnp.result_type(arrays["q"], k, v)
  operand = narrow if narrow.itemsize == 2 else zero.dtype
  k, v = k.astype(zero.dtype), v.astype(zero.dtype)
  if log_decay is not None:
    log_decay = jnp.maximum(log_decay.astype(zero.dtype), FORGOTTEN)
  spoilt = None
  if arrays.get("segment_ids") is not None:
    segments = find_segments(arrays["segment_ids"], reverse=options["reverse"])
    (k, v, log_decay), *_, spoilt = _quarantine(segments, (k, v, log_decay), zero, options)
    # Only the last document reaches the state.
    k = where_mask(segments.document == segments.document.max(axis=1, keepdims=True), k)
  k = k[:, :, :, None]
  transition = jnp.zeros((B, 0), zero.dtype)  # nothing to send
  if log_decay is not None:
    # Sums of what comes after a token, not differences of sums, which large decays would round.
    one = ((0, 0), (1, 0)) if options["reverse"] else ((0, 0), (0, 1))
    sums = jax.lax.cumsum(log_decay, axis=1, reverse=not options["reverse"])
    later = sums[:, :-1] if options["reverse"] else sums[:, 1:]
    later = jnp.exp(jnp.pad(later, one + ((0, 0),) * (sums.ndim - 2)))
    k = k * later.reshape(B, T, Hq, H // Hq, -1)
    transition = jnp.exp(jnp.sum(log_decay, axis=1))
  state = jnp.einsum(
    "btgmk,btgmv->bgmkv",
    jnp.broadcast_to(k, (B, T, Hq, H // Hq, K)).astype(operand),
    v.reshape(B, T, Hq, H // Hq, V).astype(operand),
    precision=None if operand.itemsize == 2 else jax.lax.Precision.HIGHEST,
    preferred_element_type=zero.dtype,
  ).reshape(zero.shape)
  if spoilt is not None:
    state = where_mask(~spoilt, state, jnp.nan)
  return affine.Affine(transition, state)


def _linear_attention_algebra(beta=None, log_decay=None, **arrays):
  if beta is not None:
    return DENSE
  return Algebra() if log_decay is not None else Algebra(expand=_no_decay)


def _no_decay(sent):
  return jnp.ones(sent.shape[:1], sent.dtype)


def _quarantine(segments, arrays, zero, options):
  """As `ops.segments.quarantine`; last, whether the state that comes out is spoilt, bool [B]."""
  if options["reverse"]:
    flip = lambda x: None if x is None else jnp.flip(x, 1)
    arrays, *_, spoilt = quarantine(jax.tree.map(flip, segments), [flip(x) for x in arrays], zero)
    return [flip(x) for x in arrays], spoilt[:, -1]
  arrays, _, spoilt = quarantine(segments, arrays, zero)
  return arrays, spoilt[:, -1]


def _delta_rule_whole(arrays, zero, options):
  """A part that starts from the identity, and writes nothing, ends with its transition: both run
  as one, side by side along V."""
  v, K = arrays["v"], zero.shape[2]
  wide = jnp.concatenate([v, jnp.zeros((*v.shape[:3], K), v.dtype)], axis=-1)
  eye = jnp.broadcast_to(jnp.eye(K, dtype=zero.dtype), (*zero.shape[:2], K, K))
  start = jnp.concatenate([zero, eye], axis=-1)
  options = {**options, "implementation": _any_device(options["implementation"])}
  both = _after(linear_attention, {**arrays, "v": wide}, start, options)
  return affine.Affine(both[..., zero.shape[3] :], both[..., : zero.shape[3]])


def _any_device(implementation):
  """Kernels have narrower limits on V than this needs."""
  return None if implementation == "pallas" else implementation


def _plstm_whole(arrays, zero, options):
  transition = arrays["transition"].astype(zero.dtype)
  after = _after(plstm_1d, arrays, zero, options)
  if transition.ndim == 3:
    return affine.Affine(jnp.prod(_real(arrays, transition, 1.0), axis=1), after)
  transition = _real(arrays, transition - jnp.eye(transition.shape[-1], dtype=zero.dtype))
  transition += jnp.eye(transition.shape[-1], dtype=zero.dtype)
  return affine.Affine(_product(transition, options["reverse"]), after)


def _product(matrices, reverse):
  """... A_2 A_1 A_0 of [B T ... M M], in log T steps."""
  while (T := matrices.shape[1]) > 1:
    earlier, later = matrices[:, 0 : T - 1 : 2], matrices[:, 1:T:2]
    pairs = earlier @ later if reverse else later @ earlier
    matrices = jnp.concatenate([pairs, matrices[:, T - 1 :]], axis=1) if T % 2 else pairs
  return matrices[:, 0]


def _tracked_plstm(split, arguments):
  """With state tracking the matrix acts on the state's last axis, and goes first."""
  if arguments["transition"].ndim == 3:
    return recurrence(plstm_1d, _plstm_whole)(split, arguments)
  to_rows = lambda state: jnp.moveaxis(state, -1, 2).reshape(*state.shape[:2], state.shape[-1], -1)
  (K, V), J = (arguments[name].shape[3] for name in ("k", "v")), arguments["transition"].shape[3]
  from_rows = lambda rows: jnp.moveaxis(rows.reshape(*rows.shape[:2], J, K, V), 2, -1)

  def op(*, initial_state=None, **given):
    state = None if initial_state is None else from_rows(initial_state)
    o, after = plstm_1d(**given, initial_state=state)
    return o, to_rows(after)

  def whole(arrays, zero, options):
    element = _plstm_whole(arrays, from_rows(zero), options)
    return element._replace(input=to_rows(element.input))

  if arguments["initial_state"] is not None:
    arguments = {**arguments, "initial_state": to_rows(arguments["initial_state"])}
  o, after = recurrence(op, whole, lambda **arrays: DENSE)(split, arguments)
  return o, from_rows(after)


time_axis.declare(
  "linear_scan",
  recurrence(linear_scan, _linear_scan_whole),
  {"a": "B T D", "b": "B T D", "initial_state": "B D", "segment_ids": "B T"},
  ("B T D", "B D"),
)
time_axis.declare(
  "selective_scan",
  recurrence(selective_scan, _selective_scan_whole, _selective_scan_algebra),
  {
    "x": "B T D", "dt": "B T D", "A": "D N", "B": "B T N", "C": "B T N", "D": "D",
    "initial_state": "B D N", "segment_ids": "B T",
  },
  ("B T D", "B D N"),
)  # fmt: skip
time_axis.declare(
  "linear_attention",
  recurrence(
    linear_attention,
    _linear_attention_whole,
    _linear_attention_algebra,
  ),
  {
    "q": "B T Hq K", "k": "B T Hq K", "v": "B T H V", "log_decay": "B T H", "beta": "B T H",
    "initial_state": "B H K V", "segment_ids": "B T",
  },
  ("B T H V", "B H K V"),
  # One chunk, or the states of the last tokens: for decoding, where T is short.
  lambda tree_mask, emit_states, **arguments: tree_mask is not None or emit_states > 0,
)  # fmt: skip
time_axis.declare(
  "plstm_1d",
  _tracked_plstm,
  {
    **dict.fromkeys(("q", "k", "v", "source", "transition", "mark", "direct"), "B T H"),
    "initial_state": "B H", "segment_ids": "B T",
  },
  ("B T H", "B H"),
)  # fmt: skip
