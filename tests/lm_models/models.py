"""Small models whose every parameter matters."""

import jax
import jax.numpy as jnp
import numpy as np

from lm_models import lm

PATTERNS = {
  "mamba": (("mamba",), 2),
  "hybrid": (("mamba", "sliding_attention"), 4),
  "transformer": (("attention",), 2),
  "three": (("mamba", "sliding_attention", "attention"), 3),
  "decays": (("gla", "mamba2"), 2),
  "delta_hybrid": (("deltanet", "sliding_attention"), 2),
  "gated_delta_hybrid": (("gated_deltanet", "attention"), 2),
  "vectors": (("kda", "retnet", "plstm"), 3),
  "nonlinear": (("paralstm", "slstm"), 2),
}

# Rows of 12 tokens: documents, and padding left, right and between.
SEGMENT_IDS = np.array(
  [
    [0] * 12,
    [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2],
    [-1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [7, 7, 7, 7, 7, 7, 7, 7, -1, -1, -1, -1],
    [-1, 5, 5, -1, -2, 5, 5, 2, 2, -1, 2, 5],
  ],
  np.int32,
)


def make_config(kind: str, **fields) -> lm.Config:
  """The small model of this kind."""
  pattern, L = PATTERNS[kind]
  attention = {"H": 4, "kv_heads": 2, "K": 4, "mlp_width": 12, "context": 16}
  # The default implementation of the scan compiles slowly; it is used where there is only Mamba.
  mamba = {"N": 3, "dt_rank": 2, **({"implementation": "recurrent"} if kind != "mamba" else {})}
  recurrent = {"implementation": "recurrent"}
  matrix_state = {**recurrent, "H": 2, "mlp_width": 0}
  options = {
    "vocab_size": 13,
    "D": 8,
    "L": L,
    "pattern": pattern,
    "mamba": mamba,
    "attention": attention,
    "sliding_attention": {**attention, "window": 4},
    "mamba2": {**recurrent, "P": 4, "N": 3, "n_groups": 2},
    "gla": {**matrix_state, "expand_k": 0.75, "gate_rank": 2, "gate_normaliser": 2.0},
    "retnet": {**matrix_state, "expand_v": 1.0, "mlp_width": 6},
    "deltanet": {**matrix_state, "allow_neg_eigval": True},
    "gated_deltanet": {**matrix_state, "value_heads": 4, "K": 3, "expand_v": 1.0},
    "kda": {**matrix_state, "K": 3, "expand_v": 2 / 3, "rank": 1},
    "plstm": {**matrix_state, "J": 2, "W": 2},
    "paralstm": {"mode": "newton", "H": 2, "W": 2, "mlp_width": 0},
    "slstm": {"H": 2, "W": 0, "mlp_width": 0},
  }
  return lm.make_config(**{**options, **fields})


def random_params(shapes, seed=0, gain=1.5):
  """Parameters far from their initial values, large enough that attention attends to something."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    noise = generator.standard_normal(leaf.shape)
    if name.endswith("kernel"):
      stacked = name.startswith("blocks/")
      first = stacked + ("input_proj" in name)  # heads with matrices of their own
      inputs = 2 if "attention/mixer/out_proj" in name else 1
      fan_in = np.prod(leaf.shape[first : first + inputs])
      noise = gain * noise * fan_in**-0.5
    elif name.endswith("recurrent_matrix"):
      noise = gain * noise * leaf.shape[-1] ** -0.5
    elif name == "head":
      noise = gain * noise * leaf.shape[0] ** -0.5
    elif name.endswith(("scale", "skip")):
      noise = 1 + 0.3 * noise
    elif name.endswith(("A_log", "_weight", "bias")):
      noise = 0.5 * noise
    return jnp.asarray(noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_model(kind: str, **fields):
  """A small model's config and parameters."""
  config = make_config(kind, **fields)
  shapes = jax.eval_shape(lambda key: lm.init(config, key), jax.random.key(0))
  return config, random_params(shapes)


def random_tokens(shape, seed=0) -> np.ndarray:
  """Token ids below 13."""
  return np.random.default_rng(seed).integers(0, 13, shape).astype(np.int32)
