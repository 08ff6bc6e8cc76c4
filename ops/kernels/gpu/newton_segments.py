"""A nonlinear recurrence over segments of the sequence, all at once: Newton's method between them.

Where there are few channels, most of a GPU waits for the one chain from state to state. So the
sequence is cut, and every segment starts from a guess, s_i, of the state before it. Its loop ends
in e_i = F_i(s_i) and yields J_i = dF_i/ds_i on the way; the starts that fit together follow from
one short linear recurrence,

  s'_{i+1} = e_i + J_i (s'_i - s_i)

and the loops run again, until each starts where the one before it ends. Cells that forget within a
segment need two runs; after i runs the first i segments are exact whatever the cell, so that the
states are always those of the loop. The gradients are linear: one run without what comes from
behind, the same recurrence with transposed J_i from the right, and one run with it.

A run is the kernel of `newton_loop.py`; segments are rows.
"""

import jax
import jax.numpy as jnp

from ops.kernels.gpu import newton_cell, newton_loop
from ops.kernels.gpu.newton_cell import ChannelCell

TOLERANCE = 4e-6  # of the size of a state and 1, where one segment ends and the next one starts
PROGRAMS = 264  # that run at once: two on each multiprocessor
SHORTEST = 64  # tokens of a segment
FEWEST = 8  # segments: fewer gain nothing


def choose_segments(B: int, T: int, D: int) -> int:
  """How many segments of equal length T tokens are cut in, for B rows of D channels."""
  programs, segments = B * D // newton_loop.CHANNELS, 1
  while T % (2 * segments) == 0 and 2 * segments * programs <= PROGRAMS:
    segments *= 2
  segments = min(segments, T // SHORTEST)
  return segments if segments >= FEWEST and T % segments == 0 else 1


def states(cell: ChannelCell, params, state, kinds, xs, segments: int, interpret=None):
  """All states [B T M D]; by how much segments do not fit together [B D]; how often they ran [B D];
  where they started [B S M D], and their maps [B S M M D].

  Args:
    params, state, xs: as in `newton_loop.loop`.
    kinds: int32 [B T], or None.
  """
  fold = lambda x: _fold(x, segments)
  rows = [fold(x) for x in xs]
  kinds, params = newton_loop.padded(fold(kinds)), _each(params, segments)
  guess = cell.step(*_guess_arguments(params, state, rows))
  guess = jnp.stack(guess, 1).reshape(-1, segments, *state.shape[1:])
  starts = jnp.concatenate([state[:, None], guess[:, :-1]], axis=1)

  def run(starts):
    h, maps = newton_loop.loop(
      cell, params, _flat(starts), kinds, rows, maps=True, interpret=interpret
    )
    ends, maps = _unflat(h[:, -1], starts), maps.reshape(*starts.shape[:2], *maps.shape[1:])
    return h, maps, ends

  def misfit(starts, ends):
    a, b = starts[:, 1:], ends[:, :-1]
    same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
    return jnp.max(jnp.where(same, 0, jnp.abs(a - b) / (1 + jnp.abs(b))), axis=(1, 2))

  def unfinished(carry):
    starts, (_, _, ends), count = carry
    return (count < segments) & ~jnp.all(misfit(starts, ends) <= TOLERANCE)

  def again(carry):
    starts, (_, maps, ends), count = carry
    later = _follow(maps, ends, starts, state, interpret)[:, :-1]
    starts = jnp.concatenate([state[:, None], later], axis=1)
    return starts, run(starts), count + 1

  first = (starts, run(starts), jnp.ones((), jnp.int32))
  starts, (h, maps, ends), count = jax.lax.while_loop(unfinished, again, first)
  h, error = h.reshape(*xs[0].shape[:2], *state.shape[1:]), misfit(starts, ends)
  return h, error, jnp.full(error.shape, count), starts, maps


def gradients(cell: ChannelCell, params, kinds, xs, h, g, starts, maps, interpret=None):
  """As `newton_loop.loop_gradients`, from what `states` returned."""
  segments = starts.shape[1]
  fold = lambda x: _fold(x, segments)
  rows, h, g = [fold(x) for x in xs], fold(h), fold(g)
  arguments = (
    cell,
    _each(params, segments),
    _flat(starts),
    newton_loop.padded(fold(kinds)),
    rows,
    h,
    g,
  )
  nothing = jnp.zeros_like(_flat(starts))
  local = newton_loop.loop_gradients(*arguments, nothing, only_state=True, interpret=interpret)
  flip = lambda x: jnp.flip(x, 1)
  local, maps = flip(_unflat(local, starts)), flip(jnp.swapaxes(maps, 2, 3))
  zeros = jnp.zeros_like(starts)
  reached = flip(_follow(maps, local, zeros, zeros[:, 0], interpret))
  later = jnp.concatenate([reached[:, 1:], zeros[:, :1]], axis=1)
  dstarts, dparams, dxs = newton_loop.loop_gradients(*arguments, _flat(later), interpret=interpret)
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


def _guess_arguments(params, state, rows):
  """For `ChannelCell.step`: each segment's last token, from a state of zero."""
  numbers = lambda x: [x[:, i] for i in range(x.shape[1])]
  x = [number for row in rows for number in numbers(row[:, -1])]
  return numbers(params), [jnp.zeros_like(x[0])] * state.shape[1], x


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
