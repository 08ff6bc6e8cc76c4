"""Nonlinear recurrent cells h_t = f(h_{t-1}, u_t), where u_t = B x_t + b is computed before them.

`KINDS` lists them. Those of ParaRNN multiply the state by vectors, so that each channel is a
recurrence of its own, and are made to be solved in parallel over time (Danieli et al., "ParaRNN",
2025, arXiv:2510.21450):

  paragru    z = sig(a_z h + u_z);  r = sig(a_r h + u_r);  n = tanh(a_n h r + u_n)
             h' = (1 - z) h + z n
  paralstm   f = sig(a_f h + w_f c + u_f);  n = tanh(a_n h + u_n);  c' = f c + (1 - f) n
             o = sig(a_o h + w_o c' + u_o);  h' = o tanh(c')

The ordinary ones multiply it by matrices R that are block-diagonal over heads. They are the ones of
FlashRNN (Pöppel et al., 2024, arXiv:2412.07752):

  elman      h' = tanh(R h + u)
  gru        r = sig(R_r h + u_r);  z = sig(R_z h + u_z);  n = tanh(u_n + r (R_n h + b_n))
             h' = z h + (1 - z) n
  lstm       c' = sig(f) c + sig(i) tanh(n);  h' = sig(o) tanh(c'),   each gate R h + u
  slstm      C' = exp(i - m') tanh(n) + exp(log sig(f) + m - m') C;  N' likewise, with 1 for tanh(n)
             m' = max(i, log sig(f) + m);  h' = sig(o) C' / N'

A state is an array of float32 (float64): [... D] where a channel has one number, [... M D] for
the blocks of paralstm, (c, h); [... M D], flattened to [... M * D], for the dense ones: lstm
(h, c), slstm (h, C, N, m). A parameter `a` is [G D], in the order of the gates above, `w` (of f
and o) [2 D], `R` [G H D/H D/H] with its inputs on the axis before the last, and `b_n` [D].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import ops

sigmoid, tanh = jax.nn.sigmoid, jnp.tanh


class Kind(NamedTuple):
  """What a model has to know of a cell."""

  cell: ops.Cell
  gates: int  # G: u is [... G D]
  numbers: int  # M: how many numbers of state a channel has
  output: int  # which of them the cell gives
  keeps: tuple[int, float]  # the gate that keeps the state, and the sign with which it does

  @property
  def serial(self) -> bool:
    """Whether its Jacobian is a full matrix, hence Newton's method no bargain."""
    return self.cell.structure == "dense"


def paragru(
  params: dict, h: Float[Array, "*axes D"], u: Float[Array, "*axes 3 D"]
) -> Float[Array, "*axes D"]:
  """One step of ParaGRU; `params` has `a` [3 D]."""
  z, _, n = _paragru_gates(params["a"], h, u)
  return (1 - z) * h + z * n


def paragru_jacobian(
  params: dict, h: Float[Array, "*axes D"], u: Float[Array, "*axes 3 D"]
) -> Float[Array, "*axes D"]:
  """dh'/dh, a number for each channel."""
  a_z, a_r, a_n = params["a"]
  z, r, n = _paragru_gates(params["a"], h, u)
  through_n = z * (1 - n * n) * a_n * (r + h * r * (1 - r) * a_r)
  return (1 - z) + (n - h) * z * (1 - z) * a_z + through_n


def _paragru_gates(a, h, u):
  z = sigmoid(a[0] * h + u[..., 0, :])
  r = sigmoid(a[1] * h + u[..., 1, :])
  return z, r, tanh(a[2] * h * r + u[..., 2, :])


def paralstm(
  params: dict, state: Float[Array, "*axes 2 D"], u: Float[Array, "*axes 3 D"]
) -> Float[Array, "*axes 2 D"]:
  """One step of ParaLSTM, (c, h); `params` has `a` [3 D] of the gates f, n, o, and `w` [2 D]."""
  *_, c, o = _paralstm_gates(params, state, u)
  return jnp.stack([c, o * tanh(c)], axis=-2)


def paralstm_jacobian(
  params: dict, state: Float[Array, "*axes 2 D"], u: Float[Array, "*axes 3 D"]
) -> Float[Array, "*axes 2 2 D"]:
  """d(c', h')/d(c, h), a block of two by two for each channel: [new, old]."""
  (a_f, a_n, a_o), (w_f, w_o) = params["a"], params["w"]
  f, n, c, o = _paralstm_gates(params, state, u)
  through_f = (state[..., 0, :] - n) * f * (1 - f)
  c_by_c = f + through_f * w_f
  c_by_h = through_f * a_f + (1 - f) * (1 - n * n) * a_n
  # o looks at the new c, so what moves c moves h in two ways.
  squashed = tanh(c)
  slope = squashed * o * (1 - o)
  h_by_c = slope * w_o + o * (1 - squashed * squashed)
  rows = [[c_by_c, c_by_h], [h_by_c * c_by_c, h_by_c * c_by_h + slope * a_o]]
  return jnp.stack([jnp.stack(row, axis=-2) for row in rows], axis=-3)


def _paralstm_gates(params, state, u):
  """f, n, the new c, and o."""
  a, w = params["a"], params["w"]
  c, h = state[..., 0, :], state[..., 1, :]
  f = sigmoid(a[0] * h + w[0] * c + u[..., 0, :])
  n = tanh(a[1] * h + u[..., 1, :])
  c = f * c + (1 - f) * n
  return f, n, c, sigmoid(a[2] * h + w[1] * c + u[..., 2, :])


def elman(
  params: dict, h: Float[Array, "*axes D"], u: Float[Array, "*axes 1 D"]
) -> Float[Array, "*axes D"]:
  """One step of Elman's network; `params` has `R` [1 H D/H D/H]."""
  return tanh((_recurrent(params["R"], h) + u)[..., 0, :])


def gru(
  params: dict, h: Float[Array, "*axes D"], u: Float[Array, "*axes 3 D"]
) -> Float[Array, "*axes D"]:
  """One step of the GRU of Cho et al., 2014, with the reset behind the matrix; `params` has `R`
  [3 H D/H D/H] of the gates r, z, n, and `b_n` [D]."""
  Rh = _recurrent(params["R"], h)
  r, z = sigmoid(Rh[..., 0, :] + u[..., 0, :]), sigmoid(Rh[..., 1, :] + u[..., 1, :])
  n = tanh(u[..., 2, :] + r * (Rh[..., 2, :] + params["b_n"]))
  return z * h + (1 - z) * n


def lstm(
  params: dict, state: Float[Array, "*axes S"], u: Float[Array, "*axes 4 D"]
) -> Float[Array, "*axes S"]:
  """One step of the LSTM, (h, c); `params` has `R` [4 H D/H D/H] of the gates i, f, n, o."""
  h, c = jnp.split(state, 2, axis=-1)
  i, f, n, o = jnp.moveaxis(_recurrent(params["R"], h) + u, -2, 0)
  c = sigmoid(f) * c + sigmoid(i) * tanh(n)
  return jnp.concatenate([sigmoid(o) * tanh(c), c], axis=-1)


def slstm(
  params: dict, state: Float[Array, "*axes S"], u: Float[Array, "*axes 4 D"]
) -> Float[Array, "*axes S"]:
  """One step of the sLSTM (Beck et al., "xLSTM", 2024), (h, C, N, m); `params` as for the LSTM.

  C and N are divided by exp(m), so that no exponential overflows. N is at least 1 after the first
  step; the floor of 1 that others put under it changes nothing.
  """
  h, C, N, m = jnp.split(state, 4, axis=-1)
  i, f, n, o = jnp.moveaxis(_recurrent(params["R"], h) + u, -2, 0)
  # Before the first token C = N = 0, whatever m is: 0 of it must be kept, not 0 times infinity.
  kept = jnp.where(N == 0, i, jax.nn.log_sigmoid(f) + m)
  m = jnp.maximum(i, kept)
  write, keep = jnp.exp(i - m), jnp.exp(kept - m)
  C, N = keep * C + write * tanh(n), keep * N + write
  return jnp.concatenate([sigmoid(o) * C / N, C, N, m], axis=-1)


def _recurrent(R, h):
  """R h for every gate, [... G D]."""
  heads = h.reshape(*h.shape[:-1], *R.shape[1:3])
  products = jnp.einsum("...hd,ghde->...ghe", heads, R)
  return products.reshape(*h.shape[:-1], R.shape[0], h.shape[-1])


KINDS = {
  "paragru": Kind(ops.Cell(paragru, "diagonal", 1.0, paragru_jacobian), 3, 1, 0, (0, -1.0)),
  "paralstm": Kind(ops.Cell(paralstm, "block", 1.0, paralstm_jacobian), 3, 2, 1, (0, 1.0)),
  "elman": Kind(ops.Cell(elman, "dense", 1.0), 1, 1, 0, (0, 0.0)),
  "gru": Kind(ops.Cell(gru, "dense", 1.0), 3, 1, 0, (1, 1.0)),
  "lstm": Kind(ops.Cell(lstm, "dense"), 4, 2, 0, (1, 1.0)),
  "slstm": Kind(ops.Cell(slstm, "dense"), 4, 4, 0, (1, 1.0)),
}
