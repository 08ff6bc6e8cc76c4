"""A nonlinear recurrence over segments of the sequence, all at once: Newton's method between them.

Where there are few channels, most of a GPU waits for the one chain from state to state. So the
sequence is cut, and every segment starts from a guess, s_i, of the state before it: what the few
tokens before make of zero. Its loop ends in e_i = F_i(s_i) and yields J_i = dF_i/ds_i on the way.
If some segment does not start where the one before it ends, the starts follow that would fit if
F_i were linear,

  s'_{i+1} = e_i + J_i (s'_i - s_i)

and the loops run again. Cells that forget within a few tokens need one run; after i runs the first
i segments are those of the loop whatever the cell, so that it ends. The gradients go the same way
from the right with transposed J_i; as they are linear, they fit after the second run, where all are
numbers. What fits does so to rounding, which chaotic cells amplify.

A run is the kernel of `newton_loop.py`; segments are rows.
"""

import jax
import jax.numpy as jnp

from ops.kernels.gpu import heuristics, newton_cell, newton_loop
from ops.kernels.gpu.newton_cell import ChannelCell

TOLERANCE = 4e-6  # of a channel's largest number, where one segment ends and the next one starts
PROGRAMS = 2  # of a multiprocessor, at once
SHORTEST = 64  # tokens of a segment
FEWEST = 8  # segments: fewer gain nothing
LEAST = 4096  # tokens: the loop over fewer ends before segments have been fitted together
WARM = 64  # tokens from which a start is guessed, at most


def choose_segments(B: int, T: int, D: int) -> int:
  """How many segments of equal length T tokens are cut in, for B rows of D channels."""
  programs, segments = B * D // newton_loop.CHANNELS, 1
  most = PROGRAMS * heuristics.here().multiprocessors // programs
  while T % (2 * segments) == 0 and 2 * segments <= most:
    segments *= 2
  while SHORTEST * segments > T:
    segments //= 2
  return segments if segments >= FEWEST and T >= LEAST else 1


def states(cell: ChannelCell, params, state, kinds, xs, segments: int, interpret=None):
  """All states [B T M D]; by how much segments do not fit together [B D]; how often they ran [B D];
  where they started [B S M D], and their maps [B S M M D].

  Args:
    params, state, xs: as in `newton_loop.loop`.
    kinds: int32 [B T], or None.
  """
  fold = lambda x: _fold(x, segments)
  rows, marks, params = [fold(x) for x in xs], fold(kinds), _each(params, segments)
  kinds, zeros = newton_loop.padded(marks), _each(jnp.zeros_like(state), segments)
  last = lambda x: None if x is None else x[:, -_warm(x.shape[1]) :]
  guess = newton_loop.loop(
    cell, params, zeros, newton_loop.padded(last(marks)), list(map(last, rows)), interpret=interpret
  )[:, -1].reshape(-1, segments, *state.shape[1:])
  starts = jnp.concatenate([state[:, None], guess[:, :-1]], axis=1)

  def run(starts):
    h, maps = newton_loop.loop(
      cell, params, _flat(starts), kinds, rows, maps=True, interpret=interpret
    )
    ends, maps = _unflat(h[:, -1], starts), maps.reshape(*starts.shape[:2], *maps.shape[1:])
    return h, maps, ends

  def unfinished(carry):
    starts, (_, _, ends), count = carry
    return (count < segments) & ~_fit(starts[:, 1:], ends[:, :-1])

  def again(carry):
    starts, (_, maps, ends), count = carry
    later = _follow(maps, ends, starts, state, interpret)[:, :-1]
    starts = jnp.concatenate([state[:, None], later], axis=1)
    return starts, run(starts), count + 1

  first = (starts, run(starts), jnp.ones((), jnp.int32))
  starts, (h, maps, ends), count = jax.lax.while_loop(unfinished, again, first)
  h = h.reshape(*xs[0].shape[:2], *state.shape[1:])
  error = jnp.max(_misfit(starts[:, 1:], ends[:, :-1]), axis=(1, 2))
  return h, error, jnp.full(error.shape, count), starts, maps


def gradients(cell: ChannelCell, params, kinds, xs, h, g, starts, maps, interpret=None):
  """As `newton_loop.loop_gradients`, from what `states` returned."""
  segments = starts.shape[1]
  fold = lambda x: _fold(x, segments)
  rows, h, g = [fold(x) for x in xs], fold(h), fold(g)
  marks, params, zeros = fold(kinds), _each(params, segments), jnp.zeros_like(starts)
  left_of = lambda later: jnp.concatenate([later[:, 1:], zeros[:, :1]], axis=1)
  first = lambda x: None if x is None else x[:, : _warm(x.shape[1])]
  guess = newton_loop.loop_gradients(
    cell, params, _flat(starts), newton_loop.padded(first(marks)), list(map(first, rows)), first(h),
    first(g), _flat(zeros), only_state=True, interpret=interpret,
  )  # fmt: skip

  def run(later):
    kinds = newton_loop.padded(marks)
    return newton_loop.loop_gradients(
      cell, params, _flat(starts), kinds, rows, h, g, _flat(later), interpret=interpret
    )

  def unfinished(carry):
    later, (reached, _, _), count = carry
    return (count < segments) & ~_fit(later[:, :-1], _unflat(reached, starts)[:, 1:])

  def again(carry):
    later, (reached, _, _), count = carry
    flip = lambda x: jnp.flip(x, 1)
    arguments = jnp.swapaxes(maps, 2, 3), _unflat(reached, starts), later
    later = left_of(flip(_follow(*map(flip, arguments), zeros[:, 0], interpret)))
    return later, run(later), count + 1

  later = left_of(_unflat(guess, starts))
  carry = (later, run(later), jnp.ones((), jnp.int32))
  _, (dstarts, dparams, dxs), _ = jax.lax.while_loop(unfinished, again, carry)
  dparams = dparams.reshape(-1, segments, *dparams.shape[1:]).sum(1)
  return _unflat(dstarts, starts)[:, 0], dparams, [dx.reshape(x.shape) for dx, x in zip(dxs, xs)]


def _follow(maps, ends, starts, state, interpret):
  """s'_{i+1} = e_i + J_i (s'_i - s_i) from s'_0 = `state`: all but that, [B S M D]."""
  B, S, M, D = ends.shape
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

  def step(nothing, s, x):
    J, end, start = x
    moved = s - start
    # Nothing multiplies a difference of zero, were it infinite; what is no number is left out.
    parts = [jnp.where(moved[m] == 0, 0.0, J[:, m] * moved[m]) for m in range(M)]
    new = end + sum(parts)
    return jnp.where(jnp.abs(new) < 1e30, new, end)

  shapes = struct(M, M, D), struct(M, D), struct(M, D)
  cell = newton_cell.trace(step, None, shapes[1], shapes)
  nothing = jnp.zeros((B, 0, D), jnp.float32)
  return newton_loop.loop(
    cell, nothing, state, None, [maps.reshape(B, S, M * M, D), ends, starts], interpret=interpret
  )


def _misfit(a, b):
  return jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0, jnp.abs(a - b))


def _fit(a, b):
  """Whether a [B S M D] are b, up to rounding of the largest of a channel."""
  size = jnp.where(jnp.isfinite(b), jnp.abs(b), 0)
  return jnp.all(_misfit(a, b) <= TOLERANCE * jnp.max(size, axis=(1, 2), keepdims=True))


def _warm(length):
  """From how many tokens of a segment the start of its neighbour is guessed."""
  return min(WARM, -(-length // 4))


def _fold(x, segments):
  """[B T ...] as [B S T/S ...], B and S being one axis."""
  B, T = (0, 0) if x is None else x.shape[:2]
  return None if x is None else x.reshape(B * segments, T // segments, *x.shape[2:])


def _each(x, segments):
  return jnp.repeat(x, segments, axis=0)


def _flat(x):
  return x.reshape(-1, *x.shape[2:])


def _unflat(x, like):
  return x.reshape(like.shape)
