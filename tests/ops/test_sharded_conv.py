"""The causal convolution with time split over devices: what crosses a border, and what is sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import ops
from experiments.collectives import collectives
from tests.quick_compilation import quick_compilation as quick_compilation

B, D = 3, 4


def make_mesh(seq, tensor=1):
  devices = np.array(jax.devices()[: tensor * seq]).reshape(1, 1, tensor, seq)
  return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)


def inputs(T, W, seed=0):
  draw = np.random.default_rng(seed).normal
  shapes = {"x": (B, T, D), "weight": (W, D), "bias": (D,), "initial_state": (B, W - 1, D)}
  return {name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()}


def documents(T):
  """A document that spans parts of padding alone, short documents, and ends at borders."""
  ids = np.zeros((B, T), np.int32)
  ids[0, 2:-2] = np.where(np.arange(T - 4) % 7 == 3, 0, -1)
  ids[1] = np.arange(T) // 3
  ids[1, ::5] = -1
  ids[2] = np.where(np.arange(T) < T // 2, 4, 5)
  ids[2, : T // 4] = -2
  return jnp.asarray(ids)


def loss(arrays, ids, reverse):
  y, state = ops.causal_conv(**arrays, segment_ids=ids, reverse=reverse)
  weigh = lambda array: jnp.sin(1 + jnp.arange(array.size, dtype=array.dtype)).reshape(array.shape)
  return jnp.sum(y * weigh(y)) + jnp.sum(state * weigh(state)), (y, state)


@functools.partial(jax.jit, static_argnames="reverse")
def everything(arrays, ids, reverse):
  return jax.value_and_grad(loss, has_aux=True)(arrays, ids, reverse)


def run(arrays, ids, reverse, mesh):
  with jax.set_mesh(mesh):
    return everything(arrays, ids, reverse)


# Devices along time and width, tokens of a row, the window, within a part's reach and beyond it,
# whether there are documents, the direction.
CASES = [
  (2, 2, 16, 4, False, False),
  (4, 1, 16, 5, False, True),
  (8, 1, 16, 6, False, True),
  (4, 2, 16, 1, False, False),
  (2, 2, 16, 4, True, True),
  (4, 1, 16, 1, True, True),
  (8, 1, 16, 6, True, False),
  (8, 1, 32, 4, True, True),
]


@pytest.mark.parametrize(("P", "tensor", "T", "W", "packed", "reverse"), CASES)
def test_equals_one_device(P, tensor, T, W, packed, reverse):
  with jax.enable_x64(True):
    arrays, ids = inputs(T, W), documents(T) if packed else None
    expected = run(arrays, ids, reverse, make_mesh(1))
    actual = run(arrays, ids, reverse, make_mesh(P, tensor))
  assert actual[0][1][0].dtype == np.float64
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9),
    jax.device_get(actual), jax.device_get(expected),
  )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
def test_a_nan_stays_in_its_document(reverse):
  """In a document that ends within a part, in one that spans parts, in padding."""
  ids, arrays = documents(32), inputs(32, 4)
  clean = run(arrays, ids, reverse, make_mesh(8))[0][1][0]
  for row, place in ((1, 4), (2, 3), (0, 3)):
    spoilt = arrays["x"].at[row, place].set(jnp.nan)
    document = np.asarray((ids == ids[row, place]) & (ids >= 0) & (jnp.arange(B) == row)[:, None])
    (_, (y, _)), gradient = run({**arrays, "x": spoilt}, ids, reverse, make_mesh(8))
    np.testing.assert_array_equal(np.asarray(y)[~document], np.asarray(clean)[~document])
    assert np.isfinite(gradient["x"]).all()
    assert np.isnan(y).any() == document.any()


def sent(T, W, ids, differentiate, P=8):
  """(kind, arrays) of every collective of a program that reads the outputs alone."""

  def outputs(x, state):
    arrays = {**inputs(T, W), "x": x, "initial_state": state}
    return jnp.sum(ops.causal_conv(**arrays, segment_ids=ids)[0] ** 2)

  mesh = make_mesh(P)
  place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
  x = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=place(None, "seq"))
  state = jax.ShapeDtypeStruct((B, W - 1, D), jnp.float32, sharding=place())
  function = jax.grad(outputs) if differentiate else outputs
  with jax.set_mesh(mesh):
    text = jax.jit(function).lower(x, state).compile().as_text()
  found = [record for record in collectives(text) if record.arrays != "f32[]"]  # not the loss
  assert all(record.count == 1 for record in found)
  return sorted((record.kind, record.arrays.split("{")[0]) for record in found)


@pytest.mark.parametrize("T", [64, 256])
def test_one_send_each_way(T):
  window = ("collective-permute", f"f32[{B},3,{D}]")
  assert sent(T, 4, None, False) == [window]
  assert sent(T, 4, None, True) == [window] * 2


@pytest.mark.parametrize("T", [64, 256])
def test_with_documents_windows_are_gathered(T):
  numbers = [("all-gather", f"s32[1,2,{B}]"), ("all-gather", f"s32[1,{B}]")]
  forward = [("all-gather", f"f32[1,{B},3,{D}]"), *numbers]
  assert sent(T, 4, documents(T), False) == forward
  assert sent(T, 4, documents(T), True) == [*forward, ("reduce-scatter", f"f32[8,{B},3,{D}]")]
