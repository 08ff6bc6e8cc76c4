"""Vision models: layers and whole models against their equations, symmetries, bounds, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sharding
from lm_models import grid_layers, plstm_2d, vision
from tests.lm_models import oracle, oracle_vision
from tests.lm_models.models import random_params
from tests.quick_compilation import quick_compilation as quick_compilation

STEP = {"implementation": "recurrent"}
CASES = [
  {"mode": "P"},
  {"mode": "D"},
  {"mode": "P", "pmode": "published", "gate_inputs": "all", "direct_inputs": "all", **STEP},
  {
    "mode": "P", "pmode": "published", "unsafe": True, "gate_inputs": "none",
    "gate_activation": "tanh", "W": 3, "passthrough": True, **STEP,
  },
  {
    "mode": "D", "block_diagonal": True, "direct_inputs": "slice",
    "transition_activation": "squared_tanh", "gate_activation": "identity", **STEP,
  },
]  # fmt: skip


def make(fields, dtype="float32"):
  """A layer of width 8, and parameters far from their initial values."""
  mixer = plstm_2d.Mixer(plstm_2d.Config(**{"D": 8, "H": 2, "L": 2, **fields, "dtype": dtype}))
  x = jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32)
  return mixer, random_params(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"])


def random_input(*shape, seed=1):
  """Float32 noise."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_model(**fields):
  """A small model for images of 6 channels in patches of 2, and parameters far from initial."""
  small = {"H": 2, **STEP}
  options = {
    "patch": 2, "channels": 6, "outputs": 3, "D": 8, "L": 2, "mlp_ratio": 2.0, "grid": (2, 3),
    "plstm_p": small, "plstm_d": small, "attention": {"H": 2},
  }  # fmt: skip
  config = vision.make_config(**{**options, **fields})
  return config, random_params(jax.eval_shape(lambda: vision.init(config, jax.random.key(0))))


@pytest.mark.parametrize("fields", CASES)
def test_a_layer_equals_its_equations_on_grids_that_are_not_square(fields):
  mixer, params = make(fields)
  x = random_input(2, 3, 4, 8)
  y = jax.jit(mixer.apply)({"params": params}, x)
  truth = [oracle_vision.plstm(oracle.to_float64(params), np.float64(u), mixer.config) for u in x]
  np.testing.assert_allclose(y, truth, atol=2e-5 * np.abs(truth).max())


@pytest.mark.parametrize(
  "fields, size",
  [
    ({}, (4, 6)),
    ({"pooling": "none", "L": 4}, (8, 10)),
    ({"pattern": ("attention",), "pooling": "mean", "remat": "full"}, (2, 4)),
    ({"pattern": ("plstm_d", "attention"), "position_embedding": False}, (10, 2)),
  ],
)
def test_a_model_equals_its_equations_at_any_resolution(fields, size):
  """Of the position embedding's grid (2, 3), larger, smaller and without one."""
  config, params = make_model(**fields)
  images = random_input(2, *size, 6)
  logits = jax.jit(functools.partial(vision.apply, config))(params, images)
  p = oracle.to_float64(params)
  truth = [oracle_vision.model(p, np.float64(image), config) for image in images]
  np.testing.assert_allclose(logits, truth, atol=2e-5 * np.abs(truth).max())
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("mode", ["P", "D"])
def test_flips_of_the_image_swap_orientations(mode):
  """All gates see all channels here: slices would belong to orientations themselves."""
  mixer, params = make({"mode": mode, "gate_inputs": "all", **STEP})
  x, apply = random_input(1, 3, 4, 8), jax.jit(mixer.apply)
  y = apply({"params": params}, x)
  for axis, order in ((2, [1, 0, 3, 2]), (1, [2, 3, 0, 1])):
    swapped = dict(params)
    for name in mixer.config.gates:
      gate = params[f"{name}_gate"]
      kernel, bias = gate["kernel"][:, np.array(order)], gate["bias"][np.array(order)]
      swapped[f"{name}_gate"] = {"kernel": kernel, "bias": bias}
    flipped = apply({"params": swapped}, np.flip(x, axis))
    np.testing.assert_allclose(np.flip(flipped, axis), y, atol=1e-5)
    unswapped = apply({"params": params}, np.flip(x, axis))
    assert np.abs(np.flip(unswapped, axis) - y).max() > 0.1


@pytest.mark.parametrize(
  "fields, bound",
  [
    ({}, 1.0),
    ({"transition_activation": "squared_tanh"}, 1.0),
    ({"pmode": "published"}, 1.0),
    ({"pmode": "published", "unsafe": True}, 3.0),
  ],
)
def test_gates_however_extreme_keep_column_sums_at_one(fields, bound):
  """The unsafe form shows that these gates would exceed 1; all blocks count."""
  config, params = make_model(L=4, remat="dots", plstm_p={"H": 2, **STEP, **fields})
  gates = params["blocks"]["0_plstm_p"]["mixer"]
  for name in ("transition_gate", "angle_gate"):
    gates[name] = jax.tree.map(lambda x: 20 * x, gates[name])
  logits, metrics = jax.jit(functools.partial(vision.apply_and_metrics, config))(
    params, random_input(2, 6, 6, 6)
  )
  assert set(metrics) == {"largest_column_sum", "largest_transition"}
  assert 0.5 < metrics["largest_transition"] <= 1
  assert bound - 0.1 < metrics["largest_column_sum"] <= bound + 1e-6
  assert bound > 1 or np.isfinite(logits).all()


@pytest.mark.parametrize("mode", ["P", "D"])
def test_bfloat16_follows_float32(mode):
  exact, params = make({"mode": mode, **STEP})
  low, _ = make({"mode": mode, **STEP}, "bfloat16")
  x = random_input(2, 3, 4, 8)
  expected, y = (jax.jit(mixer.apply)({"params": params}, x) for mixer in (exact, low))
  assert y.dtype == jnp.bfloat16
  assert 0 < np.abs(np.float32(y) - expected).mean() < 0.03 * np.std(expected)


def initial(**fields):
  """Initial parameters of a layer of width 96 with three heads."""
  config = plstm_2d.Config(**{"D": 96, "L": 8, **STEP, **fields})
  x = jnp.zeros((1, 1, 1, 96))
  return jax.jit(plstm_2d.Mixer(config).init)(jax.random.key(3), x)["params"]


def test_a_layer_starts_with_angles_and_decays_spread_over_heads():
  p = initial(transition_spread=0.5, angle_spread=2.0, source_bias=-4.0, direct_bias=-6.0)
  for name, expected in (
    ("source", [-4, -4, -4]),
    ("mark", [-1, -1, -1]),
    ("transition", [0.5, 1, 1.5]),
    ("angle", [-2, 0, 2]),
  ):
    bias = p[f"{name}_gate"]["bias"]
    np.testing.assert_allclose(bias, np.broadcast_to(np.reshape(expected, (3, 1)), (4, 3, 1)))
  np.testing.assert_array_equal(p["direct_gate"]["bias"], np.full((1, 3, 1), -6))
  assert "kernel" not in p["direct_gate"]
  slices = [p[f"{name}_gate"]["kernel"].ravel() for name in ("source", "mark", "transition")]
  other = initial(mode="D", gate_inputs="all", block_diagonal=True, init_variance=1.0)
  small = (0.4 / 96) ** 0.5
  for values, deviation in (
    (p["query_proj"]["kernel"], small),
    (p["out_proj"]["kernel"], small / 4),
    (np.concatenate(slices), 0.1 * (0.4 / 8) ** 0.5),
    (other["mark_gate"]["kernel"], 0.1 * 96**-0.5),
    (other["value_heads"]["kernel"], 32**-0.5),
  ):
    assert abs(np.std(values) / deviation - 1) < 0.2
  one_head = initial(H=1, angle_spread=2.0, gate_scale=0.0)
  assert not one_head["angle_gate"]["bias"].any()
  assert not one_head["transition_gate"]["kernel"].any()


def test_a_models_position_embedding_and_patches_start_as_configured():
  config = vision.make_config(
    D=96, L=1, pattern=("attention",), init_variance=2.0, position_scale=0.5, attention={"H": 2}
  )
  p = jax.jit(functools.partial(vision.init, config))(jax.random.key(0))
  block = p["blocks"]["0_attention"]
  for values, deviation in (
    (p["position_embedding"], 0.5),
    (p["patch_proj"]["kernel"], (2 / 768) ** 0.5),
    (block["mixer"]["key_proj"]["kernel"], (2 / 96) ** 0.5),
    (block["mixer"]["out_proj"]["kernel"], (1 / 96) ** 0.5),
    (block["mlp"]["up_proj"]["kernel"], (2 / 96) ** 0.5),
    (block["mlp"]["down_proj"]["kernel"], (1 / 384) ** 0.5),
  ):
    assert abs(np.std(values) / deviation - 1) < 0.05
  assert p["patch_proj"]["bias"].any()


def test_drop_path_leaves_out_whole_branches_of_images_in_training_only():
  x = jnp.ones((400, 1, 2, 3))
  drop = functools.partial(grid_layers.DropPath(0.25).apply, {}, x)
  np.testing.assert_array_equal(drop(), x)
  y = drop(rngs={"drop_path": jax.random.key(0)})
  kept = y[:, 0, 0, 0] > 0
  np.testing.assert_allclose(y, np.broadcast_to(kept[:, None, None, None] / 0.75, x.shape))
  assert 0.65 < kept.mean() < 0.85
  # Two repeats of two branches are drawn one by one: all sixteen models occur.
  config, params = make_model(pattern=("attention",), drop_path=0.5)
  image = jnp.asarray(random_input(1, 4, 6, 6))
  apply = jax.jit(jax.vmap(lambda key: vision.apply(config, params, image, key)))
  logits = np.asarray(apply(jax.random.split(jax.random.key(0), 300)))
  assert len(np.unique(np.round(logits[:, 0, 0], 3))) == 16


@pytest.mark.parametrize("D, H, millions", [(192, 3, 6), (384, 6, 23), (768, 12, 89)])
def test_models_of_the_papers_sizes(D, H, millions):
  config = vision.make_config(D=D, plstm_p={"H": H}, plstm_d={"H": H})
  assert round(vision.parameter_count(config) / 1e6) == millions


def test_every_parameter_has_a_name_that_lasts_and_a_place_on_a_mesh():
  config, _ = make_model(
    pattern=("plstm_p", "plstm_d", "attention"), L=6,
    plstm_d={"H": 2, "block_diagonal": True, "gate_inputs": "all", "W": 3, "passthrough": True},
  )  # fmt: skip
  shapes = jax.eval_shape(functools.partial(vision.init, config), jax.random.key(0))
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  heads = {
    f"{name}_proj/{leaf}": shape
    for name in ("query", "key", "value")
    for leaf, shape in (("kernel", (8, 2, 4)), ("bias", (2, 4)))
  }
  around = {
    "norm/scale": (8,), "mlp_norm/scale": (8,),
    "mlp/up_proj/kernel": (8, 64), "mlp/up_proj/bias": (64,),
    "mlp/down_proj/kernel": (64, 8), "mlp/down_proj/bias": (8,),
  }  # fmt: skip
  gates = lambda name, kernel, bias: {f"{name}_gate/kernel": kernel, f"{name}_gate/bias": bias}
  mixers = {
    "0_plstm_p": {
      **heads, "norm/scale": (2, 4), "out_proj/kernel": (8, 8), "direct_gate/bias": (1, 2, 1),
      **{
        name: shape for gate in ("source", "transition", "mark", "angle")
        for name, shape in gates(gate, (4, 2, 1, 1), (4, 2, 1)).items()
      },
    },
    "1_plstm_d": {
      **{f"{name}_heads/{leaf}": shape for name in ("query", "key", "value")
         for leaf, shape in (("kernel", (2, 4, 4)), ("bias", (2, 4)))},
      "norm/scale": (2, 4), "out_proj/kernel": (8, 8), "direct_gate/bias": (1, 2, 1),
      "conv/conv_weight": (9, 8), "skip": (8,),
      **gates("source", (8, 4, 2, 2), (4, 2, 2)), **gates("mark", (8, 4, 2, 2), (4, 2, 2)),
      **gates("transition", (8, 4, 2, 3), (4, 2, 3)),
    },
    "2_attention": {**heads, "out_proj/kernel": (2, 4, 8), "out_proj/bias": (8,)},
  }  # fmt: skip
  expected = {
    "patch_proj/kernel": (24, 8), "patch_proj/bias": (8,), "position_embedding": (2, 3, 8),
    "norm/scale": (8,), "head_proj/kernel": (32, 3), "head_proj/bias": (3,),
  }  # fmt: skip
  for block, mixer in mixers.items():
    leaves = {**around, **{f"mixer/{name}": shape for name, shape in mixer.items()}}
    expected |= {f"blocks/{block}/{name}": (2, *shape) for name, shape in leaves.items()}
  assert found == expected
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "seq": 1})
  places = sharding.parameter_shardings(mesh, shapes)
  split = lambda *path: functools.reduce(lambda tree, key: tree[key], path, places).spec
  assert split("position_embedding") == jax.P(None, None, "fsdp")
  assert split("blocks", "2_attention", "mixer", "out_proj", "kernel")[1] == "tensor"
  assert split("blocks", "0_plstm_p", "mlp", "up_proj", "kernel") == jax.P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
  "fields",
  [
    {"pooling": "none", "plstm_p": {"gate_inputs": "all", "W": 3}},
    {"pattern": ("attention",)},
  ],
)
def test_flops_are_those_that_the_compiler_counts(fields):
  """Of one token, on a model whose layers are unrolled: XLA counts a loop's body once."""
  plstm = {"H": 8, "gate_inputs": "none", **STEP}
  options = {
    "D": 64, "L": 2, "unroll": 2, "outputs": 10, "grid": (1, 1), "attention": {"H": 2},
    "plstm_d": plstm, **fields,
  }  # fmt: skip
  config = vision.make_config(**{**options, "plstm_p": {**plstm, **options.get("plstm_p", {})}})
  params = jax.eval_shape(functools.partial(vision.init, config), jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  lowered = jax.jit(functools.partial(vision.apply, config)).lower(params, image)
  counted = lowered.cost_analysis()["flops"]
  assert vision.flops(config, 16, 16) == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"width": 3}, "model.width is no field; there are "),
    ({"pattern": ("mamba",)}, r"model.pattern is \('mamba',\), its names must be among "),
    ({"pattern": ()}, r"model.pattern is \(\), its names must be among "),
    ({"L": 3}, "model.L is 3, must be a multiple of the pattern's 2"),
    ({"patch": 0}, "model.patch is 0, must be at least 1"),
    ({"outputs": 0}, "model.outputs is 0, must be at least 1"),
    ({"pooling": "max"}, "model.pooling is 'max', must be one of "),
    ({"remat": "some"}, "model.remat is 'some', must be one of "),
    ({"dtype": "float"}, "model.dtype is 'float', must be one of "),
    ({"grid": (0, 3)}, r"model.grid is \(0, 3\), must be rows and columns, at least 1 each"),
    ({"drop_path": 1.0}, "model.drop_path is 1.0, must be at least 0 and below 1"),
    ({"init_variance": -0.4}, "model.init_variance is -0.4, must be at least 0"),
    ({"mlp_ratio": -1.0}, "model.mlp_ratio is -1.0, must be at least 0"),
    ({"plstm_p": {"D": 8}}, "model.plstm_p.D is no field; there are "),
    ({"plstm_p": {"mode": "D"}}, "model.plstm_p.mode is no field; there are "),
    ({"plstm_p": {"H": 5}}, "model.plstm_p.H is 5, must divide D = 192"),
    ({"plstm_d": {"H": 96}}, "model.plstm_d.gate_inputs is 'slice', for which 4 H = 384 must div"),
    ({"plstm_p": {"pmode": "new"}}, "model.plstm_p.pmode is 'new', must be one of"),
    ({"plstm_p": {"W": 2}}, "model.plstm_p.W is 2, must be odd, or 0"),
    ({"plstm_d": {"transition_activation": "exp"}}, "model.plstm_d.transition_activation is 'exp'"),
    ({"plstm_d": {"implementation": "fast"}}, "model.plstm_d.implementation is 'fast', must be"),
  ],
)
def test_a_wrong_field_is_one_line_that_names_it(fields, message):
  with pytest.raises(ValueError, match=f"^{message}") as error:
    vision.make_config(**fields)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (1, 4, 4, 3)])
def test_images_that_are_not_whole_patches_are_refused(shape):
  config, params = make_model()
  with pytest.raises(ValueError, match=r"images is .*, must be \[B height width 6\] with height"):
    vision.apply(config, params, jnp.zeros(shape))
