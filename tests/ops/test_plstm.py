"""What the laws do not see of `plstm_1d`: every form, any number of copies, rounding, memory."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from tests.ops.compare import check, compiled
from tests.quick_compilation import quick_compilation as quick_compilation

COPIES = {
  "scalar": {},
  "values": {"J": 4, "Jq": 1, "Jk": 1, "Jv": 4, "Jo": 4},
  "everything": {"J": 2, "Jq": 3, "Jk": 2, "Jv": 2, "Jo": 3},
}
AXES = {
  "q": "B T H K Jq",
  "k": "B T H K Jk",
  "v": "B T H V Jv",
  "source": "B T H J Jk Jv",
  "transition": "B T H J J",
  "mark": "B T H Jo Jq J",
  "direct": "B T H Jo Jq Jk Jv",
  "initial_state": "B H K V J",
}


def make_inputs(T, copies, seed=0, **sizes):
  """Float64; transitions of any sign, one in three of them zero."""
  rng = np.random.default_rng(seed)
  sizes = {"B": 2, "T": T, "H": 2, "K": 3, "V": 4, **copies, **sizes}
  shape = lambda axes: tuple(sizes[axis] for axis in axes.split() if axis in sizes)
  inputs = {name: rng.normal(size=shape(axes)) for name, axes in AXES.items()}
  inputs["transition"] *= rng.permuted(np.resize([0.0, 0.5, -1.0], inputs["transition"].shape))
  return inputs


@pytest.mark.parametrize(
  "copies, forms",
  [
    ("scalar", [("recurrent", None), ("parallel", None)]),
    ("values", [("recurrent", None), ("parallel", None)]),
    ("everything", [("recurrent", None), ("chunked", 4)]),
  ],
)
def test_every_form_equals_the_oracle_with_zero_and_negative_transitions(copies, forms):
  with jax.enable_x64(True):
    inputs = make_inputs(13, COPIES[copies])

    @jax.jit
    def everything(inputs):
      run = lambda name, size: compiled(ops.plstm_1d, implementation=name, chunk_size=size)
      truth = compiled(reference.plstm_1d)(inputs, {})
      return [run(*form)(inputs, {}) for form in forms], truth

    actual, truth = jax.tree.map(np.asarray, everything(inputs))
  assert (inputs["transition"] == 0).any() and (inputs["transition"] < 0).any()
  for form, found in zip(forms, actual, strict=True):
    check(found, truth, "float64", f"{form}")


def test_products_of_a_thousand_gates_are_not_rounded_with_the_inputs():
  """0.9995 in bfloat16 is 1; beside keys and values in bfloat16, gates stay float32."""
  inputs = make_inputs(1000, {}, B=1, H=1)
  inputs["transition"] = np.full((1, 1000, 1), 0.9995)
  narrow = {
    name: jnp.asarray(x, "bfloat16" if name in "qkv" else "float32") for name, x in inputs.items()
  }
  with jax.enable_x64(True):
    wide = {name: np.asarray(x, np.float64) for name, x in narrow.items()}
    o, state = map(np.asarray, jax.jit(reference.plstm_1d)(**wide))
  for chunk_size in (None, 16):
    actual = jax.jit(functools.partial(ops.plstm_1d, chunk_size=chunk_size))(**narrow)
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    assert actual[0].dtype == jnp.bfloat16
    assert rms(np.asarray(actual[0], np.float64) - o) < 5e-3 * rms(o)
    assert rms(np.asarray(actual[1], np.float64) - state) < 2e-6 * rms(state)


def test_memory_of_the_chunked_gradient_is_linear_in_time():
  def temporary_bytes(T, implementation, chunk_size=16):
    inputs = make_inputs(T, COPIES["values"], K=16, V=16)
    inputs = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in inputs.items()}
    op = functools.partial(ops.plstm_1d, implementation=implementation, chunk_size=chunk_size)
    gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(op(**inputs)[0])))
    return gradient.lower(inputs).compile().memory_analysis().temp_size_in_bytes

  short, long = temporary_bytes(512, "chunked"), temporary_bytes(2048, "chunked")
  assert long < 4.5 * short
  assert long < temporary_bytes(2048, "recurrent") / 2


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_what_overflows_stays_in_its_document(implementation):
  """Forwards, and backwards as gradients do."""
  half = 12  # the second of three chunks holds the second document's start
  inputs = jax.tree.map(np.float32, make_inputs(2 * half, {}))
  ids = jnp.repeat(jnp.arange(2), half)[None].repeat(2, 0)

  @jax.jit
  def run(inputs):
    def loss(inputs):
      options = {"implementation": implementation, "chunk_size": 8}
      o, state = ops.plstm_1d(**inputs, segment_ids=ids, **options)
      return jnp.sum(o) + jnp.sum(state), {"o": o}

    (_, o), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    del gradients["initial_state"]
    return o | gradients

  for document in range(2):
    spoilt, healthy = (slice(half * i, half * (i + 1)) for i in (document, 1 - document))
    huge = {**inputs, "transition": inputs["transition"].copy()}
    huge["transition"][:, spoilt] = 1e30
    expected, found = run(inputs), run(huge)
    assert not np.isfinite(found["source"][:, spoilt]).all()
    for name, x in expected.items():
      np.testing.assert_array_equal(found[name][:, healthy], x[:, healthy], err_msg=name)


def test_one_token_is_a_step_and_many_are_chunks():
  inputs = jax.tree.map(np.float32, make_inputs(2, {}))
  text = ops.explain(ops.plstm_1d, **inputs)
  assert "  chunked    runs" in text and "no kernel" in text
  one = {name: x[:, :1] if name != "initial_state" else x for name, x in inputs.items()}
  assert "  recurrent  runs" in ops.explain(ops.plstm_1d, **one)


@pytest.mark.parametrize(
  "copies, wrong, message",
  [
    ("scalar", {"mark": (2, 5, 2, 1, 1, 1)}, r"mark has shape .* expected \[B T H\] with B=2, T=5"),
    ("scalar", {"k": (2, 5, 2, 4)}, r"k has shape .* expected \[B T H K\] with .*K=3"),
    ("values", {"source": (2, 5, 2, 3, 1, 4)}, r"source has shape .* \[B T H J Jk Jv\] with .*J=4"),
    ("values", {"transition": (2, 5, 2, 4, 3)}, r"transition has shape .* expected \[B T H J J\]"),
    ("values", {"initial_state": (2, 2, 3, 4)}, r"initial_state has .* expected \[B H K V J\]"),
  ],
)
def test_a_wrong_shape_names_the_argument(copies, wrong, message):
  inputs = make_inputs(5, COPIES[copies])
  inputs |= {name: np.zeros(shape) for name, shape in wrong.items()}
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(ops.plstm_1d)(**jax.tree.map(jnp.asarray, inputs))
