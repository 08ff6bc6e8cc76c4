"""Cells for the tests of Newton's method, with their parameters and inputs, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import Cell, newton_scan

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


def chaos(T, policy, implementation="parallel"):
  """The gradient of the rate, and the results, of a map for which no iterates settle."""
  x = np.zeros((2, T, D), np.float32)
  state = np.linspace(0.1, 0.6, 2 * D, dtype=np.float32).reshape(2, D)

  def run(rate, x, state):
    cell = Cell(logistic, "diagonal", box=1.0)
    options = dict(policy=policy, report=True, implementation=implementation)
    h, final_state, report = newton_scan(cell, rate, x, initial_state=state, **options)
    return h.sum() * 0 + h[:, :3].sum(), (h, final_state, report)

  # A number of Python's own as parameters.
  gradient, results = jax.jit(jax.grad(run, has_aux=True))(1.9, x, state)
  return gradient, *results


def spoilt(where, lengths):
  """x, a state and documents of these lengths, with one NaN: in the "input", in the second
  document, or in the "initial state"."""
  T = sum(lengths)
  x = np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32)
  state = np.zeros((2, 3), np.float32)
  if where == "input":
    x[0, 12, 1] = np.nan
  else:
    state[0, 2] = np.nan
  ids = np.repeat(np.arange(len(lengths)), lengths)[None].repeat(2, 0).astype(np.int32)
  return jax.tree.map(jnp.asarray, (x, state, ids))
