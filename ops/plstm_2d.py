"""pLSTM on a grid: sources, transitions and marks carry states to the right and down.

With l the state that enters a node from the left, u the one that enters from above,

  o      = scale q^T (mark_l l + mark_u u + direct k v^T)       read, before the write
  right  = T_rl l + T_ru u + source_r k v^T                     enters the node to the right
  down   = T_dl l + T_du u + source_d k v^T                     enters the node below

A state that may turn at every node takes binomial(dx + dy, dx) ways to a node dx to the right and
dy below, so transitions of 1 explode. Two remedies: P-mode, where what enters a node leaves it once
(the columns of [T_rl T_ru; T_dl T_du] have absolute sums of at most 1: `largest_column_sum`), and
D-mode, where nothing turns from left to down (T_dl = 0), so that there is one way to each node and
|T| <= 1 suffices. Both are `structure`s, which have cheaper forms.

`plstm_2d_scans.py` holds the forms that carry states from node to node; `plstm_2d_dense.py` the one
of all pairs of nodes and `plstm_2d_chunked.py` the one of blocks, both out of the block maps of
`plstm_2d_blocks.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import dispatch, plstm_2d_chunked, plstm_2d_dense, plstm_2d_scans
from ops.plstm_2d_scans import Grid
from ops.precision import state_dtype, varying_like

STRUCTURES = ("general", "separable", "merged")


def plstm_2d(
  q: Float[Array, "B Y X H K"],
  k: Float[Array, "B Y X H K"],
  v: Float[Array, "B Y X H V"],
  source: Float[Array, "B Y X H 2"] | Float[Array, "B Y X 4 H 2"],
  transition: Float[Array, "B Y X H 2 2"] | Float[Array, "B Y X 4 H 2 2"],
  mark: Float[Array, "B Y X H 2"] | Float[Array, "B Y X 4 H 2"],
  direct: Float[Array, "B Y X H"],
  *,
  scale: float | None = None,
  initial_state: tuple[Float[Array, "..."], Float[Array, "..."]] | None = None,
  structure: str = "general",
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B Y X H V"], tuple[Float[Array, "..."], Float[Array, "..."]]]:
  """Linear attention on a grid of Y rows and X columns (Pöppel et al., "pLSTM: parallelizable
  Linear Source Transition Mark networks", 2025, arXiv:2506.11997), of any size.

  Without the axis of 4 the states run to the right and down. With it there are four runs, o = 0:
  right and down, 1: left and down, 2: right and up, 3: left and up, whose outputs are summed. The
  gates of a node are at that node for each; "right" in their last axes then means onwards, and
  "left" whence the run comes (the same for down and up).

  Args:
    q, k: [B Y X H K], used as given.
    v: [B Y X H V].
    source: [B Y X H 2] or [B Y X 4 H 2], what a node writes (to the right, down).
    transition: [B Y X H 2 2] or [B Y X 4 H 2 2], [out, in] with out (right, down) and in (left,
      above); any sign, zero too.
    mark: [B Y X H 2] or [B Y X 4 H 2], how a node reads what enters (from the left, from above).
    direct: [B Y X H], how a node reads itself; added once, not once for each run.
    scale: multiplies q; None is K**-0.5.
    initial_state: what enters at the borders, (left [B Y H K V], above [B X H K V]); with four runs
      [B 4 Y H K V] and [B 4 X H K V], each in the frame of its own run: "left" is where it starts,
      and its rows and columns are counted in the order in which it visits them. None is zero.
    structure: a promise about the transitions. "general"; "separable" (D-mode): transition[..., 1,
      0], from left to down, is taken as 0; "merged" (P-mode): what enters from the left and from
      above is treated alike, entry 0 of the last axis of transition and of mark is used for both.
    implementation: "recurrent" (node after node), "wavefront" (anti-diagonal after anti-diagonal),
      "parallel" (scores of all pairs of nodes), "chunked" (pairs inside blocks, states between
      them), for their structures also "separable" (down, then along) and "merged" (the wavefront
      with one state per node), or None.
    chunk_size: side of a block of "chunked"; None chooses.

  Returns:
    o [B Y X H V] in the dtype of `v`, and what leaves at the borders, (right [B Y H K V], below [B
    X H K V]), in the frame and with the axis of 4 of `initial_state`, in float32 (float64 for
    float64 inputs): the right border of a grid is the left border of the grid to its right.

  Raises:
    ValueError: a shape, a dtype, a `structure` or an `implementation` that cannot be.
  """
  _check(q, k, v, source, transition, mark, direct, initial_state, structure, chunk_size)
  _, run = dispatch.choose(
    "plstm_2d", implementation, q=q, k=k, v=v, source=source, transition=transition, mark=mark,
    direct=direct, scale=scale, initial_state=initial_state, structure=structure,
    chunk_size=chunk_size,
  )  # fmt: skip
  left, above = initial_state or (None, None)
  dtype, out_dtype = state_dtype(q, k, v, source, transition, mark, direct, left, above), v.dtype
  narrow = jnp.result_type(q, k, v).itemsize == 2
  precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q, k, v, direct = (x.astype(dtype) for x in (q * scale, k, v, direct))
  gates = [x.astype(dtype) for x in (source, _structured(transition, structure), mark)]
  if structure == "merged":
    gates[2] = jnp.broadcast_to(gates[2][..., :1], gates[2].shape)
  one_run = source.ndim == 5
  gates = [jnp.expand_dims(x, 3) for x in gates] if one_run else gates
  grid = Grid(q, k, v, *gates)
  if initial_state is not None:
    expand = lambda x: (x[:, None] if one_run else x).astype(dtype)
    initial_state = tuple(varying_like(expand(x), *grid) for x in initial_state)
  o, final_state = run(
    grid, initial_state, structure=structure, chunk_size=chunk_size, precision=precision
  )
  o = o + (direct * jnp.sum(q * k, axis=-1))[..., None] * v
  if one_run:
    final_state = tuple(x[:, 0] for x in final_state)
  return o.astype(out_dtype), final_state


def largest_column_sum(transition: Float[Array, "... out in"]) -> Float[Array, ""]:
  """The largest sum over out of |transition[..., out, in]|: at most 1 keeps `plstm_2d` and
  `plstm_1d` from growing, whatever the ways through the grid; the number to log in P-mode."""
  return jnp.max(jnp.sum(jnp.abs(transition), axis=-2))


def _structured(transition, structure):
  if structure == "separable":
    return transition.at[..., 1, 0].set(0)
  if structure == "merged":
    return jnp.broadcast_to(transition[..., :1], transition.shape)
  return transition


def _check(q, k, v, source, transition, mark, direct, initial_state, structure, chunk_size):
  O = "" if source.ndim == 5 else "O "
  if initial_state is not None and (
    not isinstance(initial_state, tuple) or len(initial_state) != 2
  ):
    raise ValueError(f"initial_state is {type(initial_state).__name__}, expected (left, above)")
  left, above = initial_state or (None, None)
  expected = {
    "source": (source, f"B Y X {O}H 2"),
    "transition": (transition, f"B Y X {O}H 2 2"),
    "mark": (mark, f"B Y X {O}H 2"),
  }
  dispatch.check_shapes(
    q=(q, "B Y X H K"), k=(k, "B Y X H K"), v=(v, "B Y X H V"), **expected,
    direct=(direct, "B Y X H"), initial_state=(left, f"B {O}Y H K V"),
  )  # fmt: skip
  dispatch.check_shapes(
    q=(q, "B Y X H K"), v=(v, "B Y X H V"), initial_state=(above, f"B {O}X H K V"),
    **({"source": expected["source"]} if above is not None else {}),
  )  # fmt: skip
  for name, (array, letters) in expected.items():
    fixed = {"O": 4, "2": 2}
    if any(fixed.get(axis, n) != n for axis, n in zip(letters.split(), array.shape)):
      letters = letters.replace("O", "4")
      raise ValueError(f"{name} has shape {array.shape}, expected [{letters}]")
  dispatch.check_dtypes(
    q=q, k=k, v=v, source=source, transition=transition, mark=mark, direct=direct,
    initial_state=left,
  )  # fmt: skip
  dispatch.check_dtypes(initial_state=above)
  dispatch.check_chunk_size(chunk_size)
  if structure not in STRUCTURES:
    raise ValueError(f"structure is {structure!r}, expected one of {', '.join(STRUCTURES)}")


def _only(needed):
  def supports(*, structure, **arguments):
    return None if structure == needed else f"structure is {structure!r}, not {needed!r}"

  return supports


def _preference(*, q, structure, **arguments):
  nodes = q.shape[1] * q.shape[2]
  if dispatch.platform() == "cpu":
    # Measured, forward and backward, K = V = 16, four runs: equal at 24 x 24, where pairs cost as
    # much as states; a fourth of the time at 8 x 8. A node's states stay in the cache.
    return ["parallel"] if nodes <= 576 else ["recurrent"]
  # Not measured: matrix units favour pairs for longer, and many small steps cost more than work.
  own = {"separable": ["separable"], "merged": ["merged"]}.get(structure, [])
  return ["parallel"] if nodes <= 1024 else [*own, "chunked"]


dispatch.declare(
  "plstm_2d",
  {
    "parallel": dispatch.Implementation(
      plstm_2d_dense.parallel, dispatch.anything, "all pairs of nodes, one pass for four runs"
    ),
    "recurrent": dispatch.Implementation(
      plstm_2d_scans.recurrent, dispatch.anything, "Y X steps, least memory"
    ),
    "wavefront": dispatch.Implementation(
      plstm_2d_scans.wavefront, dispatch.anything, "Y + X steps, work linear in the nodes"
    ),
    "chunked": dispatch.Implementation(
      plstm_2d_chunked.chunked, dispatch.anything, "pairs inside blocks, states between them"
    ),
    "separable": dispatch.Implementation(
      plstm_2d_scans.separable, _only("separable"), "Y + X steps, no state turns twice"
    ),
    "merged": dispatch.Implementation(
      plstm_2d_scans.merged, _only("merged"), "the wavefront with half of the states"
    ),
  },
  _preference,
)
