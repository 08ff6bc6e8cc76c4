"""The truth for every model: numpy, float64, one document at a time, one token after the other.

Nothing here imports the packages under test, and documents are cut apart by plain loops, so that
masks, caches and packing have something to be wrong against.
"""

import numpy as np

from tests.lm_models import oracle_matrix, oracle_rnn
from tests.lm_models.numpy_layers import rotate as rotate
from tests.lm_models.numpy_layers import silu as silu
from tests.lm_models.numpy_layers import softplus as softplus

MIXERS = {
  "gla": oracle_matrix.gla,
  "mamba2": oracle_matrix.mamba2,
  "retnet": oracle_matrix.retnet,
  "deltanet": oracle_matrix.deltanet,
  "gated_deltanet": oracle_matrix.gated_deltanet,
  "kda": oracle_matrix.gated_deltanet,
  "plstm": oracle_matrix.plstm,
  **dict.fromkeys(("paragru", "paralstm", "elman", "gru", "lstm", "slstm"), oracle_rnn.pararnn),
}


def documents(ids):
  """The places of each document in a row of segment ids: a list of lists, padding in none."""
  found, last = [], None
  for place, id in enumerate(ids):
    if id < 0:
      continue
    if id != last:
      found.append([])
    found[-1].append(place)
    last = id
  return found


def by_document(function, x, ids):
  """`function` of each document alone, put back in place; zeros at padding."""
  rows = []
  for row, row_ids in zip(np.asarray(x), np.asarray(ids)):
    parts = [(places, function(row[places])) for places in documents(row_ids)]
    out = np.zeros((len(row), *parts[0][1].shape[1:]))
    for places, part in parts:
      out[places] = part
    rows.append(out)
  return np.stack(rows)


def rms_norm(p, x, epsilon):
  """Root mean square norm of each token."""
  return np.stack([row / np.sqrt(np.mean(row**2) + epsilon) * p["scale"] for row in x])


def gated_mlp(p, x):
  """W_out (silu(W_gate x) * W_up x)."""
  gate, up = x @ p["in_proj"]["kernel"][:, 0], x @ p["in_proj"]["kernel"][:, 1]
  return (silu(gate) * up) @ p["out_proj"]["kernel"]


def mamba(p, u):
  """The equations of Mamba's section 3 and algorithm 2, for one document u [T D]."""
  inner, N = p["A_log"].shape
  W, rank = len(p["conv_weight"]), len(p["dt_proj"]["kernel"])
  A = -np.exp(p["A_log"])
  x_all, z_all = u @ p["in_proj"]["kernel"][:, 0], u @ p["in_proj"]["kernel"][:, 1]
  h, outputs = np.zeros((inner, N)), []
  for t in range(len(u)):
    x = p["conv_bias"].copy()
    for back in range(min(W, t + 1)):
      x += p["conv_weight"][W - 1 - back] * x_all[t - back]
    x = silu(x)
    low_rank = x @ p["x_proj"]["kernel"]
    dt = softplus(low_rank[:rank] @ p["dt_proj"]["kernel"] + p["dt_bias"])
    B, C = low_rank[rank : rank + N], low_rank[rank + N :]
    for channel in range(inner):
      decay = np.exp(dt[channel] * A[channel])
      h[channel] = decay * h[channel] + dt[channel] * x[channel] * B
    y = h @ C + p["skip"] * x
    outputs.append((y * silu(z_all[t])) @ p["out_proj"]["kernel"])
  return np.stack(outputs)


def attention(p, x, window=None, base=10000.0):
  """Softmax attention of each token over those before it, for one document x [T D]."""
  q, k, v = (
    np.einsum("td,dhk->thk", x, p[f"{name}_proj"]["kernel"]) for name in ("query", "key", "value")
  )
  T, H, K = q.shape
  group = H // k.shape[1]
  o = np.zeros((T, H, K))
  for t in range(T):
    first = 0 if window is None else max(0, t - window + 1)
    for head in range(H):
      query = rotate(q[t, head], t, base)
      scores = np.array(
        [query @ rotate(k[j, head // group], j, base) for j in range(first, t + 1)]
      ) / np.sqrt(K)
      weights = np.exp(scores - scores.max())
      o[t, head] = weights / weights.sum() @ v[first : t + 1, head // group]
  return np.einsum("thk,hkd->td", o, p["out_proj"]["kernel"])


def language_model(p, tokens, pattern, *, configs, epsilon):
  """Logits of one document. `configs` has each architecture's configuration by its name."""
  x = p["embedding"][tokens]
  repeats = len(p["blocks"][f"0_{pattern[0]}"]["norm"]["scale"])
  for repeat in range(repeats):
    for i, name in enumerate(pattern):
      block = take(p["blocks"][f"{i}_{name}"], repeat)
      normed = rms_norm(block["norm"], x, epsilon)
      x = block.get("residual_scale", 1) * x
      if name == "mamba":
        x = x + mamba(block["mixer"], normed)
      elif name in MIXERS:
        x = x + MIXERS[name](block["mixer"], normed, configs[name])
      else:
        x = x + attention(block["mixer"], normed, configs[name].window)
      if "mlp" in block:
        x = x + gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x, epsilon))
  x = rms_norm(p["norm"], x, epsilon)
  return x @ (p["head"] if "head" in p else p["embedding"].T)


def take(tree, index):
  """A tree of one repeat's parameters."""
  return {
    key: take(value, index) if isinstance(value, dict) else value[index]
    for key, value in tree.items()
  }


def to_float64(tree):
  """The same tree with float64 arrays."""
  return {
    key: to_float64(value) if isinstance(value, dict) else np.asarray(value, np.float64)
    for key, value in tree.items()
  }


def leaves(tree, prefix=()):
  """(path, array) for every array."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, (*prefix, key))
    else:
      yield (*prefix, key), value


def check_gradient(function, params, gradient, *, seed=0, tolerance=2e-4):
  """Asserts that `gradient` is that of `function` (float64 params -> number), leaf by leaf.

  Along one random direction for each leaf, by central differences: an error in any entry shows.
  """
  generator = np.random.default_rng(seed)
  params, step, checked = to_float64(params), 1e-5, 0
  gradients = dict(leaves(gradient))
  for path, leaf in leaves(params):
    direction, kept = generator.standard_normal(leaf.shape), leaf.copy()
    leaf += step * direction
    above = function(params)
    leaf[...] = kept - step * direction
    below = function(params)
    leaf[...] = kept
    got = np.asarray(gradients[path], np.float64)
    scale = np.linalg.norm(got) + 1e-6
    error = abs((above - below) / (2 * step) - np.sum(got * direction))
    assert error < tolerance * scale, f"{'/'.join(path)}: {error / scale:.2e}"
    checked += 1
  assert checked == len(gradients)
