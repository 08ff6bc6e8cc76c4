"""Sequence parallelism of `ops.causal_conv`: each device sends its last W-1 tokens to the next."""

import jax.numpy as jnp

from ops import halo, time_axis
from ops.causal_conv import causal_conv
from ops.precision import state_dtype


def _form(split, arguments):
  x, weight, state = (arguments[name] for name in ("x", "weight", "initial_state"))
  B, W = x.shape[0], weight.shape[0]
  if state is None:
    state = jnp.zeros((B, W - 1, x.shape[2]), state_dtype(x, weight, arguments["bias"]))
  first = halo.Window(state, jnp.full((B,), W - 1, jnp.int32))
  window = halo.before(split, x, first, arguments["segment_ids"])
  y, after = causal_conv(**{**arguments, "initial_state": window.tokens})
  return y, split.from_last(after)


time_axis.declare(
  "causal_conv",
  _form,
  {
    "x": "B T D", "weight": "W D", "bias": "D", "initial_state": "B W-1 D", "segment_ids": "B T",
  },
  ("B T D", "B W-1 D"),
)  # fmt: skip
