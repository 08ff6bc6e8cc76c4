"""`plstm_1d` in chunks: gates between all pairs of a chunk, a state from chunk to chunk.

A run of tokens maps the edge that enters it, and what its slots write, to the edge that leaves it
and to what its slots read: four matrices, and so do two neighbours together. With A before Z,

  transition = t_Z t_A     source = [t_Z s_A, s_Z]     mark = [m_A; m_Z t_A]
  gating = [[g_A, 0], [m_Z s_A, g_Z]]

Doubled from single tokens to a chunk this takes no logarithm and no division, so that transitions
may be negative or zero, and each entry of `gating` is computed once. Then, with C the state before,

  o = ((q k^T) * gating) v + (q mark) C      C' = transition C + (source k^T) v

A document's first token takes nothing from the edge that enters it: products across that edge are
masked. Several chunks are computed together; for gradients, the states between such groups are kept
and the rest is computed again, so that time and memory are linear in T.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ops import dispatch

SLOTS = 64  # reading or writing slots of a chunk, unless the caller says otherwise
# Tokens whose chunks are computed together: what a CPU's caches hold; elsewhere, few launches.
TOGETHER_ON_CPU, TOGETHER = 256, 4096


class Tokens(NamedTuple):
  """Each token has R slots that read and S that write; padding is neutral. All of one dtype."""

  q: Float[Array, "B T H R K"]
  k: Float[Array, "B T H S K"]
  v: Float[Array, "B T H S V"]
  source: Float[Array, "B T H J S"]
  transition: Float[Array, "B T H J J"]
  mark: Float[Array, "B T H R J"]
  direct: Float[Array, "B T H R S"]
  start: Bool[Array, "B T"] | None  # documents but the row's first start here


class Block(NamedTuple):
  """Runs of c tokens, N of them on one axis with the heads; masks are None without documents."""

  source: Float[Array, "n B N J cS"]
  transition: Float[Array, "n B N J J"]
  mark: Float[Array, "n B N cR J"]
  gating: Float[Array, "n B N cR cS"]
  sent: Bool[Array, "n B N cS"] | None  # no document starts between this slot and the run's end
  passed: Bool[Array, "n B N"] | None  # none starts in the run
  reached: (
    Bool[Array, "n B N cR"] | None
  )  # none between the run's begin and this slot, itself included


def contract(equation, x, y, precision=jax.lax.Precision.HIGHEST):
  """An einsum; gates are float32 throughout, hence the default."""
  return jnp.einsum(equation, x, y, precision=precision)


def outer(gate: Float[Array, "*n H c J"], x: Float[Array, "*n H c K"]) -> Float[Array, "*n H c JK"]:
  """What each copy of the state has to do with x."""
  # Few axes: on CPUs jaxlib 0.10.2 may crash in the sums of seven that gradients under vmap are.
  merge = lambda y: y.reshape(*y.shape[:-3], -1, y.shape[-1])
  y = merge(gate)[..., None] * merge(x)[..., None, :]
  return y.reshape(*gate.shape[:-1], -1)


def parallel(tokens, state, chunk_size, precision):
  """The quadratic form: the whole sequence is one chunk."""
  T = tokens.q.shape[1]
  arrays = jax.tree.map(lambda x: x[0], _split(tokens, _power_of_two(T), 1, 1))
  state, o = _chunks(precision, state, arrays)
  return _join(o, T, tokens.q.shape[3]), state


def chunked(tokens, state, chunk_size, precision):
  """Outputs [B T H R V] and the final state [B H J K V]."""
  T, R, S = tokens.q.shape[1], tokens.q.shape[3], tokens.k.shape[3]
  size = _power_of_two(min(T, chunk_size or max(1, SLOTS // max(R, S))))
  chunks = -(-T // size)
  together = TOGETHER_ON_CPU if dispatch.platform() == "cpu" else TOGETHER
  groups = -(-chunks // max(1, together // size))
  arrays = _split(tokens, size, groups, -(-chunks // groups))
  step = jax.checkpoint(functools.partial(_chunks, precision), prevent_cse=False)
  state, o = jax.lax.scan(step, state, arrays)
  return _join(o.reshape(-1, *o.shape[2:]), T, R), state


def _power_of_two(n):
  return 1 << (n - 1).bit_length()


def _split(tokens, size, groups, chunks):
  """Tokens as arrays [groups n B H C ...], neutral ones at the end; start [groups n B C]."""
  B, T = tokens.q.shape[:2]
  total = groups * chunks * size

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, total - T)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(B, groups, chunks, size, *x.shape[2:]), 0, 2)
    return x if x.ndim == 4 else jnp.moveaxis(x, 4, 3)

  arrays = jax.tree.map(split, tokens)
  if total > T:
    real = (jnp.arange(total) < T).reshape(groups, chunks, 1, 1, size, 1, 1)
    neutral = jnp.eye(tokens.transition.shape[3], dtype=tokens.transition.dtype)
    arrays = arrays._replace(transition=jnp.where(real, arrays.transition, neutral))
  return arrays


def _join(o, T, R):
  """[n B H cR V] -> [B T H R V]."""
  n, B, H, _, V = o.shape
  o = jnp.moveaxis(o.reshape(n, B, H, -1, R, V), (0, 3), (1, 2))
  return o.reshape(B, -1, H, R, V)[:, :T]


def _chunks(precision, state, tokens):
  """The state after n chunks [n B H C ...], and their outputs [n B H cR V]."""
  q, k, v = (x.reshape(*x.shape[:3], -1, x.shape[-1]) for x in tokens[:3])
  block = _whole(tokens)
  scores = contract("nbhrk,nbhsk->nbhrs", q, k, precision) * block.gating
  sources = _masked(block.sent, outer(jnp.swapaxes(block.source, -1, -2), k))
  marks = _masked(block.reached, outer(block.mark, q))
  # Also v, for 0 times what overflows in a later document is not 0 on the way back.
  writes = contract("nbhsi,nbhsv->nbhiv", sources, _masked(block.sent, v), precision)
  writes = writes.reshape(*writes.shape[:3], *state.shape[2:])

  def step(state, chunk):
    transition, passed, write = chunk
    kept = contract("bhij,bhjkv->bhikv", transition, state)
    return _masked(passed, kept) + write, state

  state, before = jax.lax.scan(step, state, (block.transition, block.passed, writes))
  before = before.reshape(*before.shape[:3], -1, before.shape[-1])
  read = contract("nbhri,nbhiv->nbhrv", marks, before, precision)
  o = contract("nbhrs,nbhsv->nbhrv", scores, v, precision)
  return state, o + _masked(block.reached, read)


def _whole(tokens):
  """The block of each chunk [n B H], out of its tokens [n B H C]."""
  C = tokens.q.shape[3]
  H = tokens.q.shape[2]
  gates = (tokens.source, tokens.transition, tokens.mark, tokens.direct)
  source, transition, mark, direct = (x.reshape(*x.shape[:2], H * C, *x.shape[4:]) for x in gates)
  masks = (None,) * 3
  if tokens.start is not None:
    inside = jnp.repeat(~tokens.start[:, :, None], H, axis=2).reshape(*source.shape[:3])
    slots = lambda mask, x: jnp.broadcast_to(mask[..., None], (*mask.shape, x))
    masks = (slots(jnp.ones_like(inside), source.shape[-1]), inside, slots(inside, mark.shape[-2]))
  block = Block(source, transition, mark, direct, *masks)
  while block.transition.shape[2] > H:
    earlier = jax.tree.map(lambda x: x[:, :, ::2], block)
    later = jax.tree.map(lambda x: x[:, :, 1::2], block)
    block = _merge(earlier, later)
  return block


def _merge(A, Z):
  """Two neighbours as one."""
  product = functools.partial(contract, "nbhij,nbhjk->nbhik")
  sent = passed = reached = across = None
  if A.passed is not None:
    sent = jnp.concatenate([A.sent & Z.passed[..., None], Z.sent], axis=-1)
    passed = A.passed & Z.passed
    reached = jnp.concatenate([A.reached, A.passed[..., None] & Z.reached], axis=-1)
    across = Z.reached[..., :, None] & A.sent[..., None, :]
  source = jnp.concatenate([product(Z.transition, A.source), Z.source], axis=-1)
  transition = product(Z.transition, A.transition)
  mark = jnp.concatenate([A.mark, product(Z.mark, A.transition)], axis=-2)
  below = _masked(across, product(Z.mark, A.source))
  above = jnp.zeros((*A.gating.shape[:-1], Z.gating.shape[-1]), below.dtype)
  gating = jnp.concatenate(
    [
      jnp.concatenate([A.gating, above], axis=-1),
      jnp.concatenate([below, Z.gating], axis=-1),
    ],
    axis=-2,
  )
  source = _masked(None if sent is None else sent[..., None, :], source)
  return Block(
    source, _masked(passed, transition), _masked(reached, mark), gating, sent, passed, reached
  )


def _masked(mask, x):
  """x where `mask`, over the leading axes of x, else 0, whatever x is; all of x without a mask."""
  if mask is None:
    return x
  return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, 0)
