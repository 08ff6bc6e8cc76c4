"""Configs, names, sizes and counts of models: promises to checkpoints and to users."""

import functools

import jax
import pytest

from configs import mamba_lm
from experiments.models import language_model
from lm_models import lm
from tests.lm_models.models import make_config

BLOCK_OF_MAMBA = {
  "norm/scale": (3, 8),
  "mixer/A_log": (3, 16, 3),
  "mixer/conv_bias": (3, 16),
  "mixer/conv_weight": (3, 4, 16),
  "mixer/dt_bias": (3, 16),
  "mixer/dt_proj/kernel": (3, 2, 16),
  "mixer/in_proj/kernel": (3, 8, 2, 16),
  "mixer/out_proj/kernel": (3, 16, 8),
  "mixer/skip": (3, 16),
  "mixer/x_proj/kernel": (3, 16, 8),
}
BLOCK_OF_ATTENTION = {
  "norm/scale": (3, 8),
  "mixer/query_proj/kernel": (3, 8, 4, 4),
  "mixer/key_proj/kernel": (3, 8, 2, 4),
  "mixer/value_proj/kernel": (3, 8, 2, 4),
  "mixer/out_proj/kernel": (3, 4, 4, 8),
  "mlp_norm/scale": (3, 8),
  "mlp/in_proj/kernel": (3, 8, 2, 12),
  "mlp/out_proj/kernel": (3, 12, 8),
}
NORM = {"norm/scale": (1, 8), "mixer/norm/scale": (1, 4), "mixer/out_proj/kernel": (1, 8, 8)}
HEADS = {f"mixer/{name}_proj/kernel": (1, 8, 2, 4) for name in ("query", "key", "value")}
CONVOLUTIONS = {f"mixer/{name}_conv/conv_weight": (1, 4, 8) for name in ("query", "key", "value")}
PLSTM_GATES = ("source", "transition", "mark", "direct")
MATRIX_STATE = {
  "gla": {
    **NORM,
    **HEADS,
    "mixer/gate_proj/kernel": (1, 8, 2, 4),
    "mixer/decay_down_proj/kernel": (1, 8, 16),
    "mixer/decay_up_proj/kernel": (1, 16, 2, 4),
    "mixer/decay_up_proj/bias": (1, 2, 4),
  },
  "retnet": {**NORM, **HEADS, "mixer/gate_proj/kernel": (1, 8, 2, 4)},
  "deltanet": {**NORM, **HEADS, **CONVOLUTIONS, "mixer/beta_proj/kernel": (1, 8, 2)},
  "gated_deltanet": {
    **NORM,
    **HEADS,
    **CONVOLUTIONS,
    "mixer/beta_proj/kernel": (1, 8, 2),
    "mixer/decay_proj/kernel": (1, 8, 2),
    "mixer/gate_proj/kernel": (1, 8, 2, 4),
    "mixer/A_log": (1, 2),
    "mixer/dt_bias": (1, 2),
  },
  "kda": {
    **NORM,
    **HEADS,
    **CONVOLUTIONS,
    "mixer/beta_proj/kernel": (1, 8, 2),
    "mixer/decay_down_proj/kernel": (1, 8, 4),
    "mixer/decay_up_proj/kernel": (1, 4, 2, 4),
    "mixer/gate_down_proj/kernel": (1, 8, 4),
    "mixer/gate_up_proj/kernel": (1, 4, 2, 4),
    "mixer/gate_up_proj/bias": (1, 2, 4),
    "mixer/A_log": (1, 2),
    "mixer/dt_bias": (1, 2, 4),
  },
  "mamba2": {
    "norm/scale": (1, 8),
    "mixer/norm/scale": (1, 1, 16),
    "mixer/in_proj/kernel": (1, 8, 2, 16),
    "mixer/bc_proj/kernel": (1, 8, 2, 1, 3),
    "mixer/dt_proj/kernel": (1, 8, 4),
    "mixer/out_proj/kernel": (1, 16, 8),
    "mixer/x_conv/conv_weight": (1, 4, 16),
    "mixer/x_conv/conv_bias": (1, 16),
    "mixer/bc_conv/conv_weight": (1, 4, 6),
    "mixer/bc_conv/conv_bias": (1, 6),
    "mixer/A_log": (1, 4),
    "mixer/dt_bias": (1, 4),
    "mixer/skip": (1, 4),
  },
  "plstm": {
    **HEADS,
    **{f"mixer/{name}_proj/bias": (1, 2, 4) for name in ("query", "key", "value")},
    **{f"mixer/{name}_gate/kernel": (1, 8, 2, 1) for name in PLSTM_GATES},
    **{f"mixer/{name}_gate/bias": (1, 2, 1) for name in PLSTM_GATES},
    "norm/scale": (1, 8),
    "mixer/norm/scale": (1, 2, 4),
    "mixer/input_conv/conv_weight": (1, 4, 8),
    "mixer/skip": (1, 8),
    "mixer/out_proj/kernel": (1, 8, 8),
  },
}
NONLINEAR = {
  "norm/scale": (1, 8),
  "residual_scale": (1, 8),
  "mixer/in_proj/kernel": (1, 8, 2, 8),
  "mixer/x_conv/conv_weight": (1, 4, 8),
  "mixer/input_proj/kernel": (1, 2, 4, 3, 4),
  "mixer/gate_bias": (1, 3, 8),
  "mixer/norm/scale": (1, 8),
  "mixer/out_proj/kernel": (1, 8, 8),
}
NONLINEAR = {
  "paragru": {**NONLINEAR, "mixer/recurrent_weight": (1, 3, 8)},
  "paralstm": {
    **NONLINEAR,
    "mixer/recurrent_weight": (1, 3, 8),
    "mixer/peephole_weight": (1, 2, 8),
  },
  "gru": {
    **NONLINEAR,
    "mixer/recurrent_matrix": (1, 3, 2, 4, 4),
    "mixer/recurrent_bias": (1, 8),
  },
  **{
    name: {
      **NONLINEAR,
      "mixer/input_proj/kernel": (1, 2, 4, gates, 4),
      "mixer/gate_bias": (1, gates, 8),
      "mixer/recurrent_matrix": (1, gates, 2, 4, 4),
    }
    for name, gates in (("elman", 1), ("lstm", 4), ("slstm", 4))
  },
}
# Checkpoints outlive code: what is listed here may be added to, never renamed.
PARAMETERS = {
  "embedding": (13, 8),
  "norm/scale": (8,),
  "head": (8, 13),
  **{f"blocks/0_mamba/{name}": shape for name, shape in BLOCK_OF_MAMBA.items()},
  **{f"blocks/1_sliding_attention/{name}": shape for name, shape in BLOCK_OF_ATTENTION.items()},
  **{f"blocks/2_attention/{name}": shape for name, shape in BLOCK_OF_ATTENTION.items()},
}


def names_and_shapes(config):
  """{path: shape} of the parameters."""
  shapes = jax.eval_shape(functools.partial(lm.init, config), jax.random.key(0))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_parameter_names_and_shapes(remat):
  assert names_and_shapes(make_config("three", L=9, tied=False, remat=remat)) == PARAMETERS


@pytest.mark.parametrize("name", MATRIX_STATE)
def test_parameter_names_and_shapes_of_models_with_a_matrix_state(name):
  quick = {"implementation": "recurrent", "mlp_width": 0}
  heads = {**quick, "H": 2}
  options = {
    "mamba2": {**quick, "P": 4, "N": 3},
    "gla": {**heads, "expand_k": 1.0},
    "retnet": {**heads, "expand_v": 1.0},
    "deltanet": heads,
    "gated_deltanet": {**heads, "K": 4, "expand_v": 1.0},
    "kda": {**heads, "K": 4},
    "plstm": heads,
  }
  config = lm.make_config(vocab_size=13, D=8, L=1, pattern=(name,), **options)
  found = names_and_shapes(config)
  prefix = f"blocks/0_{name}/"
  block = {path[len(prefix) :]: shape for path, shape in found.items() if path.startswith(prefix)}
  assert block == MATRIX_STATE[name]


@pytest.mark.parametrize("name", NONLINEAR)
def test_parameter_names_and_shapes_of_nonlinear_recurrent_networks(name):
  fields = {name: {"H": 2, "mode": "sequential", "mlp_width": 0}}
  found = names_and_shapes(lm.make_config(vocab_size=13, D=8, L=1, pattern=(name,), **fields))
  prefix = f"blocks/0_{name}/"
  block = {path[len(prefix) :]: shape for path, shape in found.items() if path.startswith(prefix)}
  assert block == NONLINEAR[name]


def test_a_tied_model_has_no_head():
  tied = names_and_shapes(make_config("three", L=9, tied=True))
  assert tied == {name: shape for name, shape in PARAMETERS.items() if "head" not in name}


@pytest.mark.parametrize(
  "size, count", [("130m", 129_135_360), ("370m", 371_516_416), ("1b4", 1_372_178_432)]
)
def test_the_published_models_have_the_published_sizes(size, count):
  assert lm.parameter_count(language_model(mamba_lm.get_config(size))) == count


@pytest.mark.parametrize(
  "options",
  [
    {"pattern": ("mamba",), "mamba": {"implementation": "recurrent"}},
    {"pattern": ("attention",), "attention": {"kv_heads": 2}},
    {
      "pattern": ("mamba", "sliding_attention"),
      "mamba": {"implementation": "recurrent"},
      "sliding_attention": {"window": 8},
    },
    {
      "pattern": ("gla", "mamba2"),
      "gla": {"implementation": "recurrent", "kv_heads": 2, "W": 4},
      "mamba2": {"implementation": "recurrent", "N": 16, "P": 16},
    },
    {
      "pattern": ("deltanet", "retnet"),
      "deltanet": {"implementation": "recurrent", "H": 2, "use_gate": True},
      "retnet": {"implementation": "recurrent", "H": 2},
    },
    {
      "pattern": ("gated_deltanet", "kda"),
      "gated_deltanet": {"implementation": "recurrent", "H": 1, "value_heads": 2, "K": 32},
      "kda": {"implementation": "recurrent", "H": 2, "K": 32},
    },
    {"pattern": ("plstm",), "plstm": {"implementation": "recurrent"}},
    {"pattern": ("paragru", "gru"), "paragru": {"mode": "sequential"}, "gru": {"H": 1}},
    {"pattern": ("paralstm", "slstm"), "paralstm": {"mode": "sequential", "bare": True}},
  ],
)
def test_flops_are_those_that_the_compiler_counts(options):
  """Of one token, on a model whose layers are unrolled: XLA counts a loop's body once."""
  config = lm.make_config(D=64, L=2, vocab_size=96, unroll=2, **options)
  params = jax.eval_shape(functools.partial(lm.init, config), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  logits = jax.jit(lambda params, tokens: lm.apply(config, params, tokens)[0])
  counted = logits.lower(params, tokens).cost_analysis()["flops"]
  assert lm.flops_per_token(config, 1) == pytest.approx(counted, rel=0.04)


def test_flops_grow_with_context_only_up_to_the_window():
  whole = lm.make_config(D=64, L=2, pattern=("attention",))
  window = lm.make_config(
    D=64, L=2, pattern=("sliding_attention",), sliding_attention={"window": 8}
  )
  flops = lambda config, T: lm.flops_per_token(config, T)
  # Two blocks, two products of 2 * 64 operations for each token seen: (T + 1) / 2 on average.
  assert flops(whole, 1001) - flops(whole, 1) == 2 * 4 * 64 * 500
  assert flops(window, 10**6) - flops(window, 1) == pytest.approx(2 * 4 * 64 * 7, rel=1e-3)
  # The first 7 of 16 tokens see fewer than 8.
  seen = (sum(range(1, 8)) + 9 * 8) / 16
  assert flops(window, 16) - flops(window, 1) == pytest.approx(2 * 4 * 64 * (seen - 1))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"width": 3}, "model.width is no field; there are "),
    ({"pattern": ("perceptron",)}, r"model.pattern is \('perceptron',\), its names must be among "),
    ({"pattern": ()}, r"model.pattern is \(\), its names must be among "),
    ({"L": 3, "pattern": ("mamba", "attention")}, "model.L is 3, must be a multiple of "),
    ({"L": 0}, "model.L is 0, must be at least 1"),
    ({"D": 0}, "model.D is 0, must be at least 1"),
    ({"vocab_size": -1}, "model.vocab_size is -1, must be at least 1"),
    ({"unroll": 0}, "model.unroll is 0, must be at least 1"),
    ({"remat": "some"}, r"model.remat is 'some', must be one of \['dots', 'full', 'none'\]"),
    ({"dtype": "float"}, "model.dtype is 'float', must be one of "),
    ({"mamba": {"K": 1}}, "model.mamba.K is no field; there are "),
    ({"mamba": {"D": 3}}, "model.mamba.D is no field; there are "),
    ({"mamba": {"N": 0}}, "model.mamba.N is 0, must be at least 1"),
    ({"mamba": {"W": 0}}, "model.mamba.W is 0, must be at least 1"),
    ({"mamba": {"dt_min": 0.0}}, "model.mamba.dt_min is 0.0, must be above 0"),
    ({"mamba": {"dt_min": 1.0}}, "model.mamba.dt_min is 1.0, must be above 0 and at most dt_max"),
    ({"mamba": {"implementation": "fast"}}, "model.mamba.implementation is 'fast', must be one of"),
    (
      {"pattern": ("attention",), "attention": {"H": 5}},
      "model.attention.H is 5, must divide D = 256",
    ),
  ],
)
def test_a_wrong_field_is_one_line_that_names_it(fields, message):
  with pytest.raises(ValueError, match=f"^{message}") as error:
    lm.make_config(**fields)
  assert "\n" not in str(error.value)


def test_fields_reach_the_architectures():
  config = lm.make_config(
    D=64,
    L=6,
    dtype="bfloat16",
    pattern=("mamba", "mamba", "sliding_attention"),
    mamba={"N": 7},
    attention={"H": 3},  # not in the pattern: not looked at
  )
  assert config.names == ("mamba", "sliding_attention") and config.repeats == 2
  for mixer in config.mixers:
    assert (mixer.D, mixer.L, mixer.dtype) == (64, 6, "bfloat16")
  assert config.mixer("mamba").N == 7
  assert config.mixer("sliding_attention").window == 256
