"""Cells for the tests of Newton's method, with their parameters and inputs, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import Cell

D = 3  # channels


def gru(a, h, u):
  """ParaGRU: a [3 D], u [... 3 D]."""
  z = jax.nn.sigmoid(a[0] * h + u[..., 0, :])
  r = jax.nn.sigmoid(a[1] * h + u[..., 1, :])
  c = jnp.tanh(a[2] * h * r + u[..., 2, :])
  return (1 - z) * h + z * c


def lstm(params, state, u):
  """ParaLSTM, with peepholes: a [3 D], w [2 D], u [... 3 D], state (c, h)."""
  a, w = params["a"], params["w"]
  c, h = state[..., 0, :], state[..., 1, :]
  f = jax.nn.sigmoid(a[0] * h + w[0] * c + u[..., 0, :])
  c = f * c + (1 - f) * jnp.tanh(a[1] * h + u[..., 1, :])
  o = jax.nn.sigmoid(a[2] * h + w[1] * c + u[..., 2, :])
  return jnp.stack([c, o * jnp.tanh(c)], axis=-2)


def elman(params, h, x):
  """x is a pytree: a vector, and an index into a table."""
  return jnp.tanh(h @ params["W"] + x["u"] + params["table"][x["token"]])


def toggle(a, h, x):
  """A flip-flop: where x is -1 the sign of the state flips. Its Jacobian at 0 is a x."""
  return jnp.tanh(a * h * x)


def rotate(params, h, angle):
  """Turns (h_0, h_1) by an angle per channel: |J| = 1."""
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.stack(
    [c * h[..., 0, :] - s * h[..., 1, :], s * h[..., 0, :] + c * h[..., 1, :] + params], axis=-2
  )


def logistic(rate, h, x):
  """The chaotic map h -> 1 - rate h^2, pushed by x."""
  return 1 - rate * h * h + x


GRU = Cell(gru, "diagonal", box=1.0)
LSTM = Cell(lstm, "block", box=(1.0, 1.0))
ELMAN = Cell(elman, "dense", box=1.0)
TOGGLE = Cell(toggle, "diagonal", box=1.0)
CELLS = {"diagonal": GRU, "block": LSTM, "dense": ELMAN}


def narrow(tree):
  """On the device, float64 as float32."""
  return jax.tree.map(jnp.asarray, jax.tree.map(_narrow, tree))


def _narrow(leaf):
  return np.float32(leaf) if leaf.dtype == np.float64 else leaf


def draw(structure, B, T, seed=0, limit=0.5):
  """params, x and an initial state that leaves the box, for the cell of this structure."""
  rng = np.random.default_rng(seed)
  small = lambda *shape: np.clip(rng.normal(size=shape), -limit, limit)
  u = rng.normal(size=(B, T, 3, D))
  state = 1.5 * rng.normal(size=(B, 2, D) if structure == "block" else (B, D))
  if structure == "diagonal":
    return small(3, D), u, state
  if structure == "block":
    return {"a": small(3, D), "w": small(2, D)}, u, state
  x = {"u": u[:, :, 0], "token": rng.integers(0, 5, size=(B, T)).astype(np.int32)}
  return {"W": small(D, D), "table": small(5, D)}, x, state
