"""What the oracles of several models share, in numpy."""

import numpy as np


def silu(x):
  """x sigmoid(x)."""
  return x / (1 + np.exp(-x))


def softplus(x):
  """log(1 + exp x)."""
  return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rotate(x, position, base):
  """One head's vector turned: channels (i, i + K/2) as one complex number."""
  half = len(x) // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
  return np.concatenate([turned.real, turned.imag])
