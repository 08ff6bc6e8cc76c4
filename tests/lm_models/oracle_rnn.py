"""The truth for the nonlinear recurrent networks: their equations for one document [T D].

numpy, float64, one token, one channel's gates or one head's matrices after the other. `c` is a
model's configuration, read as data: nothing here calls the packages under test.
"""

import numpy as np

from tests.lm_models.numpy_layers import silu
from tests.lm_models.oracle_matrix import convolve, norm, sigmoid


def paragru(p, u, c):
  """z, r, n in this order; h' = (1 - z) h + z n."""
  a_z, a_r, a_n = clipped(p["recurrent_weight"], c)
  h, outputs = np.zeros(u.shape[2]), []
  for u_z, u_r, u_n in u:
    z, r = sigmoid(a_z * h + u_z), sigmoid(a_r * h + u_r)
    h = (1 - z) * h + z * np.tanh(a_n * h * r + u_n)
    outputs.append(h)
  return np.stack(outputs)


def paralstm(p, u, c):
  """f, n, o in this order; f sees the old c, o the new one."""
  a_f, a_n, a_o = clipped(p["recurrent_weight"], c)
  w_f, w_o = clipped(p["peephole_weight"], c)
  cell = h = np.zeros(u.shape[2])
  outputs = []
  for u_f, u_n, u_o in u:
    f, n = sigmoid(a_f * h + w_f * cell + u_f), np.tanh(a_n * h + u_n)
    cell = f * cell + (1 - f) * n
    h = sigmoid(a_o * h + w_o * cell + u_o) * np.tanh(cell)
    outputs.append(h)
  return np.stack(outputs)


def clipped(weights, c):
  """Not larger than the configuration allows."""
  return (
    weights if c.recurrent_clip is None else np.clip(weights, -c.recurrent_clip, c.recurrent_clip)
  )


def recurrent(p, gate, y):
  """R y, head by head."""
  blocks = p["recurrent_matrix"][gate]
  return np.concatenate([head @ block for head, block in zip(np.split(y, len(blocks)), blocks)])


def elman(p, u, c):
  """y = tanh(Wx + R y)."""
  y, outputs = np.zeros(u.shape[2]), []
  for (u_y,) in u:
    y = np.tanh(u_y + recurrent(p, 0, y))
    outputs.append(y)
  return np.stack(outputs)


def gru(p, u, c):
  """r, z, n; the reset multiplies what the matrix made."""
  y, outputs = np.zeros(u.shape[2]), []
  for u_r, u_z, u_n in u:
    g = recurrent(p, 2, y) + p["recurrent_bias"]
    r, z = sigmoid(u_r + recurrent(p, 0, y)), sigmoid(u_z + recurrent(p, 1, y))
    y = z * y + (1 - z) * np.tanh(u_n + r * g)
    outputs.append(y)
  return np.stack(outputs)


def gates(p, u, y):
  """i, f, n, o before their nonlinearities."""
  return [u_gate + recurrent(p, gate, y) for gate, u_gate in enumerate(u)]


def lstm(p, u, c):
  """The LSTM without peepholes."""
  y = cell = np.zeros(u.shape[2])
  outputs = []
  for token in u:
    i, f, n, o = gates(p, token, y)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(n)
    y = sigmoid(o) * np.tanh(cell)
    outputs.append(y)
  return np.stack(outputs)


def slstm(p, u, c):
  """Without the stabiliser: the exponentials themselves."""
  y = cell = normaliser = np.zeros(u.shape[2])
  outputs = []
  for token in u:
    i, f, n, o = gates(p, token, y)
    cell = sigmoid(f) * cell + np.exp(i) * np.tanh(n)
    normaliser = sigmoid(f) * normaliser + np.exp(i)
    y = sigmoid(o) * cell / normaliser
    outputs.append(y)
  return np.stack(outputs)


CELLS = {f.__name__: f for f in (paragru, paralstm, elman, gru, lstm, slstm)}


def pararnn(p, x, c):
  """The mixer of one document."""
  if not c.bare:
    both = np.einsum("td,dzc->ztc", x, p["in_proj"]["kernel"])
    x, z = both[0], both[1]
    if c.W:
      x = convolve(p["x_conv"], x)
  kernel = p["input_proj"]["kernel"]
  heads = np.split(x, len(kernel), axis=1)
  u = [np.einsum("td,dge->tge", head, block) for head, block in zip(heads, kernel)]
  h = CELLS[c.cell](p, np.concatenate(u, axis=2) + p["gate_bias"], c)
  if c.bare:
    return h
  if c.norm_before_gate:
    y = norm(p, h, c.norm_epsilon) * silu(z)
  else:
    y = norm(p, h * silu(z), c.norm_epsilon)
  return y @ p["out_proj"]["kernel"]
