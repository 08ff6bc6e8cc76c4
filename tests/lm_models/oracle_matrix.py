"""The truth for the models with a matrix state: the papers' equations for one document [T D].

numpy, float64, one token and one head after the other. `c` is a model's configuration, read as
data: nothing here calls the packages under test.
"""

import numpy as np

from tests.lm_models.numpy_layers import rotate, silu, softplus


def sigmoid(x):
  """1 / (1 + exp -x)."""
  return 1 / (1 + np.exp(-x))


def convolve(p, x):
  """Each channel of x [T ...] with its W weights, the last of which meets the token itself."""
  flat = x.reshape(len(x), -1)
  weight = p["conv_weight"]
  W, outputs = len(weight), []
  for t in range(len(flat)):
    y = p["conv_bias"].copy() if "conv_bias" in p else np.zeros(flat.shape[1])
    for back in range(min(W, t + 1)):
      y += weight[W - 1 - back] * flat[t - back]
    outputs.append(y)
  return np.stack(outputs).reshape(x.shape)


def heads(p, name, x):
  """W x, [T H K], convolved where there are weights for that."""
  y = np.einsum("td,dhk->thk", x, p[f"{name}_proj"]["kernel"])
  return convolve(p[f"{name}_conv"], y) if f"{name}_conv" in p else y


def scan(q, k, v, g=None, beta=None, scale=1.0):
  """S <- exp(g_t) S; S <- S + k_t (beta_t (v_t - [k_t^T S]))^T; o_t = scale q_t^T S: one head."""
  S, outputs = np.zeros((k.shape[1], v.shape[1])), []
  for t in range(len(q)):
    if g is not None:
      S = np.exp(g[t])[:, None] * S
    written = v[t] if beta is None else beta[t] * (v[t] - S.T @ k[t])
    S = S + np.outer(k[t], written)
    outputs.append(scale * (S.T @ q[t]))
  return np.stack(outputs)


def norm(p, x, epsilon):
  """Root mean square norm over the last axis, with the learnt scale."""
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * p["norm"]["scale"]


def output(p, o, gate, c):
  """W_o (norm(o) * gate)."""
  y = norm(p, o, c.norm_epsilon) * gate
  return y.reshape(len(y), -1) @ p["out_proj"]["kernel"]


def gla(p, x, c):
  """Gated linear attention."""
  q, k, v = (heads(p, name, x) for name in ("query", "key", "value"))
  if c.W:
    q, k, v = silu(q), silu(k), silu(v)
  if c.feature_map == "relu":
    q, k = np.maximum(q, 0), np.maximum(k, 0)
  up = p["decay_up_proj"]
  g = np.einsum("tr,rhk->thk", x @ p["decay_down_proj"]["kernel"], up["kernel"]) + up["bias"]
  g = -softplus(-g) / c.gate_normaliser
  if c.gate_min is not None:
    g = np.maximum(g, c.gate_min)
  shared = c.H // k.shape[1]
  o = [
    scan(q[:, h], k[:, h // shared], v[:, h // shared], g[:, h // shared], None, k.shape[2] ** -0.5)
    for h in range(c.H)
  ]
  gate = silu(heads(p, "gate", x)) if c.output_gate else 1
  return output(p, np.stack(o, 1), gate, c)


def unit(x):
  """x / |x|, with the epsilon of the definition."""
  return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def deltanet(p, x, c):
  """DeltaNet."""
  q, k, v = (heads(p, name, x) for name in ("query", "key", "value"))
  activation = {
    "silu": silu,
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "identity": lambda x: x,
  }[c.qk_activation]
  q, k = activation(q), activation(k)
  normed = unit if c.qk_norm == "l2" else lambda x: x / np.sum(x, axis=-1, keepdims=True)
  q, k, v = normed(q), normed(k), silu(v)
  beta = sigmoid(x @ p["beta_proj"]["kernel"]) * (2 if c.allow_neg_eigval else 1)
  scale = q.shape[2] ** -0.5
  o = [scan(q[:, h], k[:, h], v[:, h], None, beta[:, h], scale) for h in range(c.H)]
  gate = silu(heads(p, "gate", x)) if c.use_gate else 1
  return output(p, np.stack(o, 1), gate, c)


def gated_deltanet(p, x, c):
  """Gated DeltaNet; with a vector decay Kimi Delta Attention."""
  q, k, v = (silu(heads(p, name, x)) for name in ("query", "key", "value"))
  q, k = unit(q), unit(k)
  H = v.shape[1]
  shared = H // q.shape[1]
  beta = sigmoid(x @ p["beta_proj"]["kernel"]) * (2 if c.allow_neg_eigval else 1)
  if c.decay == "scalar":
    step = (x @ p["decay_proj"]["kernel"] + p["dt_bias"])[:, :, None]
    gate = silu(heads(p, "gate", x))
  else:
    low_rank = x @ p["decay_down_proj"]["kernel"]
    step = np.einsum("tr,rhk->thk", low_rank, p["decay_up_proj"]["kernel"]) + p["dt_bias"]
    low_rank = x @ p["gate_down_proj"]["kernel"]
    up = p["gate_up_proj"]
    gate = sigmoid(np.einsum("tr,rhv->thv", low_rank, up["kernel"]) + up["bias"])
  g = -np.exp(p["A_log"])[:, None] * softplus(step)
  scale = q.shape[2] ** -0.5
  o = [
    scan(q[:, h // shared], k[:, h // shared], v[:, h], g[:, h], beta[:, h], scale)
    for h in range(H)
  ]
  return output(p, np.stack(o, 1), gate, c)


def mamba2(p, u, c):
  """Mamba-2."""
  x, z = u @ p["in_proj"]["kernel"][:, 0], u @ p["in_proj"]["kernel"][:, 1]
  x = silu(convolve(p["x_conv"], x))
  BC = silu(convolve(p["bc_conv"], np.einsum("td,dign->tign", u, p["bc_proj"]["kernel"])))
  dt = softplus(u @ p["dt_proj"]["kernel"] + p["dt_bias"])
  dt = np.clip(dt, c.dt_limit_min, np.inf if c.dt_limit_max is None else c.dt_limit_max)
  H = dt.shape[1]
  P, shared = x.shape[1] // H, H // BC.shape[2]
  y = []
  for h in range(H):
    B, C = BC[:, 0, h // shared], BC[:, 1, h // shared]
    channels = x[:, h * P : (h + 1) * P]
    g = -np.exp(p["A_log"][h]) * dt[:, h : h + 1]
    y.append(scan(C, B, dt[:, h : h + 1] * channels, g) + p["skip"][h] * channels)
  y = np.concatenate(y, 1) * silu(z)
  return output(p, y.reshape(len(y), BC.shape[2], -1), 1, c)


def retnet(p, x, c):
  """RetNet."""
  q, k, v = (heads(p, name, x) for name in ("query", "key", "value"))
  o = []
  for h in range(c.H):
    turned = [np.stack([rotate(y[t, h], t, c.rotary_base) for t in range(len(x))]) for y in (q, k)]
    g = np.full((len(x), 1), np.log(1 - 2.0 ** (-5 - h)))
    o.append(scan(*turned, v[:, h], g, None, q.shape[2] ** -0.5))
  return output(p, np.stack(o, 1), silu(heads(p, "gate", x)), c)


def orthogonal(x):
  """Cayley's map of x - x^T, for each of the matrices [n J J]."""
  eye = np.eye(x.shape[-1])
  return np.stack([np.linalg.solve(eye - (X - X.T), eye + X - X.T) for X in x])


def plstm(p, x, c):
  """pLSTM: what a token reads, then what it writes, with J copies of the state."""
  u = convolve(p["input_conv"], x) if c.W else x
  project = lambda name, y: heads(p, name, y) + p[f"{name}_proj"]["bias"]
  q, k, v = project("query", u), project("key", u), project("value", x)
  gate = lambda name: heads({"x_proj": p[f"{name}_gate"]}, "x", u) + p[f"{name}_gate"]["bias"]
  act = {"sigmoid": sigmoid, "tanh": np.tanh, "identity": lambda x: x}
  (T, H, K), J = q.shape, c.J
  S, M, D = (
    act[c.gate_activation](gate(name)).reshape(T, H, J, J) for name in ("source", "mark", "direct")
  )
  sigma = act[c.transition_activation](c.transition_scale * gate("transition"))
  turn = np.ones((2, T * H, 1, 1))
  if J > 1:
    turns = np.moveaxis(gate("rotation").reshape(T * H, 2, J, J), 1, 0)
    turn = np.stack([orthogonal(X) for X in turns])
  turn = turn.reshape(2, T, H, J, J)
  v = v.reshape(T, H, -1, J)
  o = np.zeros(v.shape)
  for h in range(H):
    C = np.zeros((K, v.shape[2], J))
    for t in range(T):
      seen = np.einsum("oi,dvi->dvo", M[t, h], C)
      seen += np.einsum("ol,d,vl->dvo", D[t, h], k[t, h], v[t, h])
      o[t, h] = np.einsum("d,dvo->vo", q[t, h], seen) / np.sqrt(K)
      transition = turn[0, t, h] @ np.diag(sigma[t, h]) @ turn[1, t, h]
      C = np.einsum("ij,dvj->dvi", transition, C)
      C += np.einsum("il,d,vl->dvi", S[t, h], k[t, h], v[t, h])
  y = norm(p, o.reshape(T, H, -1), c.norm_epsilon).reshape(T, -1)
  if c.passthrough:
    y += p["skip"] * u
  return y @ p["out_proj"]["kernel"]
