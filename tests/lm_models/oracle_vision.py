"""The truth for vision models: the papers' equations for one image, token after token.

numpy, float64. `c` is a configuration, read as data: nothing here calls the packages under test.
"""

import numpy as np

from tests.lm_models.oracle_matrix import norm, sigmoid

ACTIVATIONS = {
  "sigmoid": sigmoid,
  "tanh": np.tanh,
  "squared_tanh": lambda x: np.tanh(x) ** 2,
  "identity": lambda x: x,
}


def gate(p, x, o, h):
  """b + W x of one orientation and head at one token x [D]; W is [D O H n], or [O H D/OH n] for
  slices."""
  y = p["bias"][o, h]
  if "kernel" not in p:
    return y
  kernel, (O, H, n) = p["kernel"], p["bias"].shape
  if kernel.shape == (len(x), O, H, n):
    return y + x @ kernel[:, o, h]
  return y + x.reshape(O, H, -1)[o, h] @ kernel[o, h]


def gates(p, x, o, h, c):
  """S, T [out, in] and M at one token x [D]."""
  numbers = lambda name: gate(p[f"{name}_gate"], x, o, h)
  s, m = (ACTIVATIONS[c.gate_activation](numbers(name)) for name in ("source", "mark"))
  g = ACTIVATIONS[c.transition_activation](c.transition_scale * numbers("transition"))
  if c.mode == "D":
    right, down, turn = g
    return s, np.array([[right, turn], [0, down]]), m
  (s,), (m,), (g,), a = s, m, g, sigmoid(numbers("angle")[0])
  if c.pmode == "published":
    g = g if c.unsafe else min(max(g, 0), 1)
    return [a * s, 1 - a * s], np.array([[a * g, a * g], [1 - a * g, 1 - a * g]]), [m, m]
  return [a * s, (1 - a) * s], g * np.array([[a, a], [1 - a, 1 - a]]), [m, m]


def convolve(weight, x):
  """Each channel of x [Y X D] with its W x W weights, zeros around."""
  Y, X, _ = x.shape
  W = round(len(weight) ** 0.5)
  out = np.zeros_like(x)
  for y in range(Y):
    for z in range(X):
      for i in range(W):
        for j in range(W):
          row, column = y + i - W // 2, z + j - W // 2
          if 0 <= row < Y and 0 <= column < X:
            out[y, z] += weight[i * W + j] * x[row, column]
  return out


def project(p, name, x, H):
  """Heads [Y X H K] of x [Y X D]."""
  if f"{name}_heads" in p:
    q = p[f"{name}_heads"]
    return np.einsum("yxhi,hij->yxhj", x.reshape(*x.shape[:2], H, -1), q["kernel"]) + q["bias"]
  q = p[f"{name}_proj"]
  return np.einsum("yxd,dhk->yxhk", x, q["kernel"]) + q["bias"]


def plstm(p, x, c):
  """One layer on x [Y X D]."""
  (Y, X, D), K = x.shape, c.D // c.H
  seen = convolve(p["conv"]["conv_weight"], x) if c.W else x
  q, k = (project(p, name, seen, c.H) for name in ("query", "key"))
  v = project(p, "value", x, c.H)
  out = np.zeros((Y, X, c.H, K))
  for h in range(c.H):
    for o in range(4):
      rows, columns = range(Y)[:: -1 if o >= 2 else 1], range(X)[:: -1 if o % 2 else 1]
      down = [np.zeros((K, K)) for _ in range(X)]
      for y in rows:
        left = np.zeros((K, K))
        for z in columns:
          s, T, m = gates(p, seen[y, z], o, h, c)
          up, write = down[z], np.outer(k[y, z, h], v[y, z, h])
          out[y, z, h] += K**-0.5 * q[y, z, h] @ (m[0] * left + m[1] * up)
          left, down[z] = (T[i, 0] * left + T[i, 1] * up + s[i] * write for i in range(2))
    for y in range(Y):
      for z in range(X):
        d = ACTIVATIONS[c.gate_activation](gate(p["direct_gate"], seen[y, z], 0, h)[0])
        out[y, z, h] += d * K**-0.5 * (q[y, z, h] @ k[y, z, h]) * v[y, z, h]
  y = norm(p, out, c.norm_epsilon).reshape(Y, X, D)
  return (y + p["skip"] * seen if c.passthrough else y) @ p["out_proj"]["kernel"]


def attention(p, x, c):
  """Every token to every other."""
  q, k, v = (project(p, name, x, c.H).reshape(-1, c.H, c.D // c.H) for name in
             ("query", "key", "value"))  # fmt: skip
  scores = np.exp(np.einsum("ihk,jhk->hij", q, k) * (c.D // c.H) ** -0.5)
  o = np.einsum("hij,jhk->ihk", scores / scores.sum(-1, keepdims=True), v)
  y = np.einsum("ihk,hkd->id", o, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]
  return y.reshape(x.shape)


MIXERS = {"plstm_p": plstm, "plstm_d": plstm, "attention": attention}


def cubic(old, new):
  """Weights [new old] of bicubic interpolation between centres of cells, a = -1/2, wider for fewer
  cells (Keys, 1981)."""
  ratio = old / new
  weights = np.zeros((new, old))
  for i in range(new):
    for j in range(old):
      d = abs(j - ((i + 0.5) * ratio - 0.5)) / max(ratio, 1)
      near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
      weights[i, j] = near if d < 1 else far if d < 2 else 0
  return weights / weights.sum(1, keepdims=True)


def gelu(x):
  """The usual approximation by tanh."""
  return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def linear(p, x):
  """W x + b."""
  return x @ p["kernel"] + p["bias"]


def repeat_of(tree, n):
  """Parameters of one repeat of the pattern."""
  return {k: repeat_of(x, n) if isinstance(x, dict) else x[n] for k, x in tree.items()}


def model(p, image, c):
  """Logits of one image [height width channels]."""
  Y, X = (size // c.patch for size in image.shape[:2])
  patches = image.reshape(Y, c.patch, X, c.patch, -1).transpose(0, 2, 1, 3, 4).reshape(Y, X, -1)
  x = linear(p["patch_proj"], patches)
  if c.position_embedding:
    rows, columns = (cubic(old, new) for old, new in zip(c.grid, (Y, X)))
    x = x + np.einsum("ij,kl,jld->ikd", rows, columns, p["position_embedding"])
  for repeat in range(c.L // len(c.pattern)):
    for i, name in enumerate(c.pattern):
      b = repeat_of(p["blocks"][f"{i}_{name}"], repeat)
      x = x + MIXERS[name](b["mixer"], norm(b, x, c.norm_epsilon), c.mixer(name))
      y = norm({"norm": b["mlp_norm"]}, x, c.norm_epsilon)
      x = x + linear(b["mlp"]["down_proj"], gelu(linear(b["mlp"]["up_proj"], y)))
  x = norm(p, x, c.norm_epsilon)
  pooled = {
    "corners": lambda: np.concatenate([x[0, 0], x[0, X - 1], x[Y - 1, 0], x[Y - 1, X - 1]]),
    "mean": lambda: x.mean((0, 1)),
    "none": lambda: x,
  }
  return linear(p["head_proj"], pooled[c.pooling]())
