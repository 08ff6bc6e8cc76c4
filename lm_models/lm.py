"""Language models: embedding, a stack of blocks, head.

    x = E[tokens];   for each block: x += mixer(norm(x)), x += mlp(norm(x));   logits = norm(x)
    W_head

The blocks repeat a pattern, which is data: `pattern=("mamba", "mamba", "sliding_attention")`, 12
blocks, is four times these three. `lax.scan` runs over the repeats, so that compile time does not
grow with depth, and each repeat is rematerialised by a named policy. A model is a `Config` and
these pure functions:

    params = init(config, key)
    logits, state = apply(config, params, tokens, state, segment_ids)
    logits, state = decode_step(config, params, token, state)
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm_models import (
  attention,
  deltanet,
  gated_deltanet,
  gla,
  layers,
  mamba,
  mamba2,
  pararnn,
  plstm,
  retnet,
)

# What a name in a pattern stands for: the architecture's module and what its Config starts from.
MIXERS = {
  "mamba": (mamba, {}),
  "mamba2": (mamba2, {}),
  "gla": (gla, {}),
  "retnet": (retnet, {}),
  "deltanet": (deltanet, {}),
  "gated_deltanet": (gated_deltanet, {}),
  "kda": (gated_deltanet, {"decay": "vector", "H": 16, "K": 128, "expand_v": 1.0}),
  "plstm": (plstm, {}),
  "paragru": (pararnn, {}),
  "paralstm": (pararnn, {"cell": "paralstm"}),
  "elman": (pararnn, {"cell": "elman"}),
  "gru": (pararnn, {"cell": "gru"}),
  "lstm": (pararnn, {"cell": "lstm", "memory_bias_min": 1.0, "memory_bias_max": 1.0}),
  "slstm": (pararnn, {"cell": "slstm", "memory_bias_min": 3.0, "memory_bias_max": 6.0}),
  "attention": (attention, {}),
  "sliding_attention": (attention, {"window": 256}),
}

TOKENS = (("data", "fsdp"), "seq")  # how the rows and the tokens of a batch lie on a mesh
DTYPES = ("float32", "bfloat16", "float64")

# What a repeat keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A language model. `mixers` holds one architecture's Config for each name in the pattern."""

  vocab_size: int = 264  # rows of the embedding; at least the tokenizer's vocabulary
  D: int = 256  # model width
  L: int = 4  # blocks
  pattern: tuple[str, ...] = ("mamba",)  # kinds of block, repeated until there are L
  mixers: tuple[
    Any, ...
  ] = ()  # one Config for each distinct name in `pattern`, in order of appearance
  tied: bool = True  # the head is the embedding, transposed
  norm_epsilon: float = 1e-5  # of every RMSNorm
  embedding_scale: float = 0.02  # standard deviation of the initial embedding
  remat: str = "none"  # none, dots (keep matrix products) or full (keep nothing)
  loss_chunk: int = 0  # tokens of a row whose logits exist at a time in training; 0 is all
  unroll: int = 1  # repeats of the pattern unrolled in one step of the scan
  dtype: str = "float32"  # of matrix products and activations; parameters are float32

  @property
  def names(self) -> tuple[str, ...]:
    """Distinct names in the pattern, in order of appearance."""
    return tuple(dict.fromkeys(self.pattern))

  @property
  def repeats(self) -> int:
    """How often the pattern occurs."""
    return self.L // len(self.pattern)

  def mixer(self, name: str) -> Any:
    """The Config of the architecture called `name` in the pattern."""
    return self.mixers[self.names.index(name)]


def make_config(**fields) -> Config:
  """A Config from plain fields, with the options of each architecture under its name in the
  pattern.

  make_config(D=512, L=8, pattern=("mamba", "attention"), mamba=dict(N=32), attention=dict(H=8))

  Raises:
    ValueError: a field that does not exist, a name that is no architecture, L that the pattern does
      not divide, an unknown policy.
  """
  known = {field.name for field in dataclasses.fields(Config)} - {"mixers"}
  pattern = tuple(fields.get("pattern", Config.pattern))
  unknown = sorted(set(pattern) - set(MIXERS))
  if unknown or not pattern:
    raise ValueError(f"model.pattern is {pattern}, its names must be among {sorted(MIXERS)}")
  common = {key: value for key, value in fields.items() if key in known}
  options = {key: value for key, value in fields.items() if key not in known}
  wrong = sorted(set(options) - set(MIXERS))
  if wrong:
    raise ValueError(f"model.{wrong[0]} is no field; there are {sorted(known | set(MIXERS))}")
  config = Config(**{**common, "pattern": pattern})
  try:
    layers.check_at_least(config, 1, "vocab_size", "D", "L", "unroll")
  except ValueError as error:
    raise ValueError(f"model.{error}") from None
  if config.dtype not in DTYPES:
    raise ValueError(f"model.dtype is {config.dtype!r}, must be one of {DTYPES}")
  if config.L % len(pattern):
    raise ValueError(f"model.L is {config.L}, must be a multiple of the pattern's {len(pattern)}")
  if config.remat not in REMAT_POLICIES:
    raise ValueError(f"model.remat is {config.remat!r}, must be one of {sorted(REMAT_POLICIES)}")
  shared = {"D": config.D, "L": config.L, "dtype": config.dtype}
  mixers = tuple(_mixer_config(name, shared, options.get(name, {})) for name in config.names)
  return dataclasses.replace(config, mixers=mixers)


def _mixer_config(name, shared, options):
  module, start = MIXERS[name]
  # The width and the dtype are the whole model's.
  known = {field.name for field in dataclasses.fields(module.Config)} - set(shared)
  wrong = sorted(set(options) - known)
  if wrong:
    raise ValueError(f"model.{name}.{wrong[0]} is no field; there are {sorted(known)}")
  try:
    return module.Config(**{**start, **shared, **options})
  except ValueError as error:
    raise ValueError(f"model.{name}.{error}") from None


def _mlp_width(mixer) -> int:
  """Width of a block's MLP: as configured, or what its architecture is published with."""
  if mixer.mlp_width is not None:
    return mixer.mlp_width
  return layers.gated_mlp_width(mixer.D, getattr(mixer, "mlp_ratio", 4.0))


class Block(nn.Module):
  """x += mixer(norm(x)), then x += mlp(norm(x)) where the architecture has an MLP.

  An architecture whose Config has `residual_scale` set multiplies x by a learnt scale for each
  channel before its mixer's output is added.
  """

  name_in_pattern: str
  config: Config

  @nn.compact
  def __call__(self, x, state, segment_ids):
    module, _ = MIXERS[self.name_in_pattern]
    mixer = self.config.mixer(self.name_in_pattern)
    norm = functools.partial(layers.RMSNorm, self.config.norm_epsilon, self.config.dtype)
    y, state = module.Mixer(mixer, name="mixer")(norm(name="norm")(x), state, segment_ids)
    if getattr(mixer, "residual_scale", False):
      x = x * self.param("residual_scale", nn.initializers.ones, (self.config.D,))
    x = layers.constrain_activations(x + y)
    width = _mlp_width(mixer)
    if width:
      out_init = nn.initializers.normal(0.02 * (2 * mixer.L) ** -0.5)
      mlp = layers.GatedMLP(
        width, self.config.dtype, nn.initializers.normal(0.02), out_init, name="mlp"
      )
      x = layers.constrain_activations(x + mlp(norm(name="mlp_norm")(x)))
    return x, state


class Repeat(nn.Module):
  """One pass over the pattern."""

  config: Config

  @nn.compact
  def __call__(self, x, state, segment_ids):
    new_state = {}
    for i, name in enumerate(self.config.pattern):
      key = f"{i}_{name}"
      block = Block(name, self.config, name=key)
      x, new_state[key] = block(x, None if state is None else state[key], segment_ids)
    return x, new_state


class LanguageModel(nn.Module):
  """Tokens to logits; see the module's docstring. Parameters carry the repeats on their first
  axis."""

  config: Config

  def setup(self):
    c = self.config
    embed = nn.initializers.normal(c.embedding_scale)
    self.embedding = self.param("embedding", embed, (c.vocab_size, c.D))
    repeat = Repeat
    if c.remat != "none":
      repeat = nn.remat(Repeat, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    stack = nn.scan(
      repeat,
      variable_axes={"params": 0, "metrics": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=c.repeats,
      unroll=min(c.unroll, c.repeats),
    )
    self.blocks = stack(c)
    self.norm = layers.RMSNorm(c.norm_epsilon, c.dtype)
    if not c.tied:
      self.head = self.param("head", embed, (c.D, c.vocab_size))

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T vocab"], Any]:
    x, state = self.features(tokens, state, segment_ids)
    return self.logits(x), state

  def features(self, tokens, state, segment_ids):
    """What the head sees, [B T D], and the state after the last token."""
    # The residual stream stays float32 whatever the products are: it is a long sum.
    x = layers.look_up(self.embedding, tokens)
    x, state = self.blocks(x, state, segment_ids)
    return self.norm(x), state

  def logits(self, x):
    """Logits, float32, of features [B T D]."""
    logits = layers.product(x, self._head().astype(x.dtype), dtype=jnp.float32)
    return layers.constrain(logits, *TOKENS, "tensor")

  def _head(self):
    return self.embedding.T if self.config.tied else self.head

  def nats(self, tokens, targets, state, segment_ids):
    """Cross-entropy of each target, [B T] float32, and the state after the last token.

    With `loss_chunk`, the logits of so many tokens of each row exist at a time on a device,
    backwards too: with a large vocabulary they are the largest array of all.
    """
    x, state = self.features(tokens, state, segment_ids)
    size = self.config.loss_chunk
    if 0 < size < targets.shape[1] // layers.parts_of(targets.shape[1], TOKENS[1]):
      return self._chunked_nats(x, targets, size), state
    return _nats(self.logits(x), targets), state

  def _chunked_nats(self, x, targets, size):
    B, T = targets.shape
    # Each device cuts its own tokens into chunks: a chunk of all time would lie on one device. And
    # it has a head of its own, whose gradient it sums over chunks before it sends anything.
    rows, parts = (layers.parts_of(n, axes) for n, axes in zip((B, T), TOKENS))
    b, part = B // rows, T // parts
    chunks = -(-part // size)

    def split(y):
      y = y.reshape(rows, b, parts, part, *y.shape[2:])
      y = layers.constrain(y, TOKENS[0], None, TOKENS[1], *[None] * (y.ndim - 3))
      y = jnp.pad(y, [(0, 0)] * 3 + [(0, chunks * size - part)] + [(0, 0)] * (y.ndim - 4))
      y = jnp.moveaxis(y.reshape(rows, b, parts, chunks, size, *y.shape[4:]), (3, 0, 2), (0, 1, 2))
      return y.reshape(chunks, rows, parts, b * size, *y.shape[5:])

    heads = jnp.broadcast_to(self._head(), (rows, parts, x.shape[-1], self.config.vocab_size))

    @jax.checkpoint
    def nats(heads, x, targets):
      heads = layers.constrain(heads, *TOKENS, None, "tensor").astype(x.dtype)
      logits = jnp.matmul(x, heads, preferred_element_type=jnp.float32)
      return _nats(layers.constrain(logits, *TOKENS, None, "tensor"), targets)

    found = jax.lax.map(lambda chunk: nats(heads, *chunk), (split(x), split(targets)))
    found = found.reshape(chunks, rows, parts, b, size)
    return jnp.transpose(found, (1, 3, 2, 0, 4)).reshape(B, parts, -1)[:, :, :part].reshape(B, T)


def _nats(logits, targets):
  """Cross-entropy of each target."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def init(config: Config, key: Array) -> dict:
  """Initial parameters, float32, from one key."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return LanguageModel(config).init(key, tokens)["params"]


def apply(
  config: Config,
  params: dict,
  tokens: Int[Array, "B T"],
  state: Any = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T vocab"], Any]:
  """Logits of the token after each token, and the state after the last.

  Args:
    config: the model.
    params: from `init`.
    tokens: int32 token ids. To prefill a prompt is this call.
    state: from `init_state` or an earlier call; it belongs to each row's first document.
    segment_ids: int32 document of each token; where it changes a new document starts, and a
      negative id marks padding.

  Returns:
    Logits, float32, and the new state.
  """
  return LanguageModel(config).apply({"params": params}, tokens, state, segment_ids)


def apply_and_metrics(
  config: Config, params: dict, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T vocab"], dict[str, Array]]:
  """Logits as `apply` without a state, and the largest values over all blocks of what they sow as
  "metrics", by name."""
  (logits, _), sown = LanguageModel(config).apply({"params": params}, tokens, mutable=["metrics"])
  return logits, layers.largest_sown(sown)


def token_nats(
  config: Config,
  params: dict,
  tokens: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  state: Any = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Any]:
  """Cross-entropy in nats of each target given the tokens up to its place, and the state after.

  `apply` followed by a cross-entropy, in the memory that `Config.loss_chunk` allows.
  """
  return token_nats_and_metrics(config, params, tokens, targets, state, segment_ids)[:2]


def token_nats_and_metrics(
  config: Config,
  params: dict,
  tokens: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  state: Any = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Any, dict[str, Array]]:
  """`token_nats`, and the largest values over all blocks of what they sow as "metrics", by name."""
  (nats, state), sown = LanguageModel(config).apply(
    {"params": params}, tokens, targets, state, segment_ids, method="nats", mutable=["metrics"]
  )
  return nats, state, layers.largest_sown(sown)


def decode_step(
  config: Config, params: dict, token: Int[Array, " B"], state: Any
) -> tuple[Float[Array, "B vocab"], Any]:
  """Logits after one more token of each row; the cost does not depend on how many came before."""
  logits, state = apply(config, params, token[:, None], state)
  return logits[:, 0], state


def init_state(config: Config, batch: int) -> dict:
  """The state before any token, for `batch` rows: [repeats B ...] arrays under `<i>_<name>`."""

  def stacked(name):
    one = MIXERS[name][0].init_state(config.mixer(name), batch)
    return jax.tree.map(lambda x: jnp.zeros((config.repeats, *x.shape), x.dtype), one)

  return {f"{i}_{name}": stacked(name) for i, name in enumerate(config.pattern)}


def keep_state(state: Any, keep: Array) -> Any:
  """The state where `keep` [B] is True, the state before any token elsewhere, whatever was
  there."""

  def select(x):
    return jnp.where(keep.reshape((1, -1) + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

  return jax.tree.map(select, state)


def flops_per_token(config: Config, T: int) -> float:
  """Floating-point operations of one token's forward pass in a sequence of T; training takes
  thrice."""
  total = 2.0 * config.D * config.vocab_size
  for name in config.pattern:
    mixer = config.mixer(name)
    mlp = 2 * 3 * config.D * _mlp_width(mixer)
    total += config.repeats * (MIXERS[name][0].flops_per_token(mixer, T) + mlp)
  return total


def parameter_count(config: Config) -> int:
  """Number of parameters, without making them."""
  shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))
