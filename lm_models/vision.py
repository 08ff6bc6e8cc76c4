"""Vision models: patches, a stack of blocks on their grid, a head.

    x = W_p patches + b_p + position
    for each block: x += mixer(norm(x)), x += mlp(norm(x))
    logits = W_h pool(norm(x)) + b_h

as pLSTM-Vis (`pattern=("plstm_p", "plstm_d")`, corners pooled; Pöppel et al., 2025) and the vision
transformer (`pattern=("attention",)`; Dosovitskiy et al., 2021), with the same MLP of gelu. Images
may have any size that is whole patches, square or not, whatever the model was trained on.

The blocks repeat a pattern; `lax.scan` runs over the repeats as in `lm`. A model is a `Config` and
these pure functions:

    params = init(config, key)
    logits = apply(config, params, images)
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm_models import grid_layers, layers, lm, plstm_2d, recurrent_layers, vision_attention

# What a name in a pattern stands for: the architecture's module and what its Config starts from.
MIXERS = {
  "plstm_p": (plstm_2d, {"mode": "P"}),
  "plstm_d": (plstm_2d, {"mode": "D"}),
  "attention": (vision_attention, {}),
}

# What the head sees of the features x [B Y X D].
POOLINGS = {
  "corners": lambda x: jnp.concatenate([x[:, y, z] for y in (0, -1) for z in (0, -1)], axis=-1),
  "mean": lambda x: jnp.mean(x.astype(jnp.float32), axis=(1, 2)),
  "none": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A vision model. `mixers` holds one architecture's Config for each name in the pattern."""

  patch: int = 16  # side of a patch, pixels; 1 takes each pixel as a token
  channels: int = 3  # of a pixel
  outputs: int = 1000  # logits of an image, or of a token where pooling is none
  D: int = 192  # model width
  L: int = 12  # blocks
  pattern: tuple[str, ...] = ("plstm_p", "plstm_d")  # kinds of block, repeated until there are L
  mixers: tuple[
    Any, ...
  ] = ()  # one Config for each distinct name in `pattern`, in order of appearance
  position_embedding: bool = True  # adds a learnt vector to each token, resized to any grid
  grid: tuple[int, int] = (14, 14)  # rows and columns of the position embedding, tokens
  position_scale: float = 0.02  # standard deviation of the initial position embedding
  pooling: str = (
    "corners"  # corners (four tokens side by side), mean, or none: logits of each token
  )
  mlp_ratio: float = 4.0  # width of the MLP in multiples of D, rounded up to 64; 0 leaves it out
  init_variance: float = 0.4  # of initial weights, in multiples of 1 / inputs; 1 for few blocks
  drop_path: float = 0.0  # probability that training leaves out a branch of an image
  norm_epsilon: float = 1e-5  # of the norms before mixers, MLPs and head
  remat: str = "none"  # none, dots (keep matrix products) or full (keep nothing)
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

  @property
  def mlp_width(self) -> int:
    """Width of the MLPs."""
    return 64 * -int(-self.D * self.mlp_ratio // 64)

  def mixer(self, name: str) -> Any:
    """The Config of the architecture called `name` in the pattern."""
    return self.mixers[self.names.index(name)]


def make_config(**fields) -> Config:
  """A Config from plain fields, with the options of each architecture under its name in the
  pattern.

  make_config(D=384, pattern=("plstm_p", "plstm_d"), plstm_p=dict(H=6), plstm_d=dict(H=6))

  Raises:
    ValueError: a field that does not exist, a name that is no architecture, L that the pattern does
      not divide, a word that is not among those allowed, a number out of its range.
  """
  known = {field.name for field in dataclasses.fields(Config)} - {"mixers"}
  pattern = tuple(fields.get("pattern", Config.pattern))
  unknown = sorted(set(pattern) - set(MIXERS))
  if unknown or not pattern:
    raise ValueError(f"model.pattern is {pattern}, its names must be among {sorted(MIXERS)}")
  options = {key: value for key, value in fields.items() if key not in known}
  wrong = sorted(set(options) - set(MIXERS))
  if wrong:
    raise ValueError(f"model.{wrong[0]} is no field; there are {sorted(known | set(MIXERS))}")
  common = {key: value for key, value in fields.items() if key in known}
  grid = tuple(fields.get("grid", Config.grid))
  config = Config(**{**common, "pattern": pattern, "grid": grid})
  try:
    _check(config)
  except ValueError as error:
    raise ValueError(f"model.{error}") from None
  shared = {field: getattr(config, field) for field in ("D", "L", "init_variance", "dtype")}
  mixers = tuple(_mixer_config(name, shared, options.get(name, {})) for name in config.names)
  return dataclasses.replace(config, mixers=mixers)


def _check(config):
  layers.check_at_least(config, 1, "patch", "channels", "outputs", "D", "L", "unroll")
  layers.check_at_least(config, 0, "mlp_ratio", "init_variance", "position_scale")
  for field, allowed in (
    ("dtype", lm.DTYPES),
    ("pooling", POOLINGS),
    ("remat", lm.REMAT_POLICIES),
  ):
    recurrent_layers.check_choice(config, field, allowed)
  if config.L % len(config.pattern):
    raise ValueError(f"L is {config.L}, must be a multiple of the pattern's {len(config.pattern)}")
  if len(config.grid) != 2 or min(config.grid) < 1:
    raise ValueError(f"grid is {config.grid}, must be rows and columns, at least 1 each")
  if not 0 <= config.drop_path < 1:
    raise ValueError(f"drop_path is {config.drop_path}, must be at least 0 and below 1")


def _mixer_config(name, shared, options):
  module, start = MIXERS[name]
  # What is shared is the whole model's, and the name says the mode.
  known = {field.name for field in dataclasses.fields(module.Config)} - set(shared) - set(start)
  wrong = sorted(set(options) - known)
  if wrong:
    raise ValueError(f"model.{name}.{wrong[0]} is no field; there are {sorted(known)}")
  try:
    return module.Config(**{**start, **shared, **options})
  except ValueError as error:
    raise ValueError(f"model.{name}.{error}") from None


class Block(nn.Module):
  """x += mixer(norm(x)), then x += mlp(norm(x))."""

  name_in_pattern: str
  config: Config

  @nn.compact
  def __call__(self, x):
    c = self.config
    module, _ = MIXERS[self.name_in_pattern]
    norm = functools.partial(layers.RMSNorm, c.norm_epsilon, c.dtype)
    y = module.Mixer(c.mixer(self.name_in_pattern), name="mixer")(norm(name="norm")(x))
    x = _constrain(x + grid_layers.DropPath(c.drop_path)(y))
    if c.mlp_width:
      mlp = grid_layers.MLP(c.mlp_width, c.L, c.init_variance, c.dtype, name="mlp")
      x = _constrain(x + grid_layers.DropPath(c.drop_path)(mlp(norm(name="mlp_norm")(x))))
    return x


class Repeat(nn.Module):
  """One pass over the pattern."""

  config: Config

  @nn.compact
  def __call__(self, x, _):
    for i, name in enumerate(self.config.pattern):
      x = Block(name, self.config, name=f"{i}_{name}")(x)
    return x, None


class VisionModel(nn.Module):
  """Images to logits; see the module's docstring. Blocks' parameters carry the repeats on their
  first axis."""

  config: Config

  @nn.compact
  def __call__(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B ..."]:
    c = self.config
    # The residual stream stays float32 whatever the products are: it is a long sum.
    x = self._tokens(images)
    x = _constrain(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    repeat = Repeat
    if c.remat != "none":
      repeat = nn.remat(Repeat, policy=lm.REMAT_POLICIES[c.remat], prevent_cse=False)
    stack = nn.scan(
      repeat,
      variable_axes={"params": 0, "metrics": 0},
      split_rngs={"params": True, "drop_path": True},
      length=c.repeats,
      unroll=min(c.unroll, c.repeats),
    )
    x, _ = stack(c, name="blocks")(x, None)
    x = POOLINGS[c.pooling](layers.RMSNorm(c.norm_epsilon, c.dtype, name="norm")(x))
    init = nn.initializers.normal(0.02)
    head = layers.Projection(c.outputs, 1, True, c.dtype, init, name="head_proj")
    logits = head(x)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

  def _tokens(self, images):
    c = self.config
    B, height, width, channels = images.shape
    if height % c.patch or width % c.patch or channels != c.channels:
      raise ValueError(
        f"images is {images.shape}, must be [B height width {c.channels}] with height and width"
        f" multiples of {c.patch}"
      )
    Y, X = height // c.patch, width // c.patch
    patches = images.reshape(B, Y, c.patch, X, c.patch, channels)
    patches = jnp.moveaxis(patches, 2, 3).reshape(B, Y, X, -1)
    # Empty patches differ from nothing from the start: a norm of zeros would pass no gradient.
    start = nn.initializers.normal(0.02)
    patch_proj = layers.Projection(
      c.D, 1, True, c.dtype, grid_layers.fan_in_init(c.init_variance), start, name="patch_proj"
    )
    x = patch_proj(patches)
    if c.position_embedding:
      position_init = nn.initializers.normal(c.position_scale)
      position = self.param("position_embedding", position_init, (*c.grid, c.D))
      if c.grid != (Y, X):
        position = jax.image.resize(position, (Y, X, c.D), "bicubic")
      x = x + position
    return x


def _constrain(x):
  # Images have no time: what would share it shares them.
  return layers.constrain(x, ("data", "fsdp", "seq"), None, None, None)


def init(config: Config, key: Array) -> dict:
  """Initial parameters, float32, from one key."""
  images = jnp.zeros((1, config.patch, config.patch, config.channels))
  return VisionModel(config).init(key, images)["params"]


def apply(
  config: Config,
  params: dict,
  images: Float[Array, "B height width channels"],
  key: Array | None = None,
) -> Float[Array, "B ..."]:
  """Logits, float32: [B outputs], or [B Y X outputs] where pooling is none.

  Args:
    config: the model.
    params: from `init`.
    images: of any height and width that are multiples of `patch`.
    key: draws what `drop_path` leaves out; None leaves nothing out.

  Raises:
    ValueError: images whose size is not whole patches, or whose channels are not the config's.
  """
  return VisionModel(config).apply({"params": params}, images, rngs=_rngs(key))


def apply_and_metrics(
  config: Config,
  params: dict,
  images: Float[Array, "B height width channels"],
  key: Array | None = None,
) -> tuple[Float[Array, "B ..."], dict[str, Array]]:
  """`apply`, and the largest values over all blocks of what they sow as "metrics", by name."""
  logits, sown = VisionModel(config).apply(
    {"params": params}, images, rngs=_rngs(key), mutable=["metrics"]
  )
  return logits, layers.largest_sown(sown)


def _rngs(key):
  return {} if key is None else {"drop_path": key}


def flops(config: Config, height: int, width: int) -> float:
  """Floating-point operations of an image's forward pass; training takes thrice."""
  Y, X = height // config.patch, width // config.patch
  embedding = 2.0 * Y * X * config.patch**2 * config.channels * config.D
  heads, inputs = {"corners": (1, 4), "mean": (1, 1), "none": (Y * X, 1)}[config.pooling]
  total = embedding + 2.0 * heads * inputs * config.D * config.outputs
  mlp = 4.0 * Y * X * config.D * config.mlp_width
  for name in config.pattern:
    total += config.repeats * (MIXERS[name][0].flops(config.mixer(name), Y, X) + mlp)
  return total


def parameter_count(config: Config) -> int:
  """Number of parameters, without making them."""
  shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))
