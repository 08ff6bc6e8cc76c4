"""Kernels under a mesh: what each device is given, and that nothing is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ops
from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import linear_attention as kernels
from ops.linear_attention_chunked import chunked
from tests.ops.kernels.hopper import lowered, needs_mosaic
from tests.quick_compilation import quick_compilation  # noqa: F401

B, T, K, V = 4, 6, 4, 4
AXES = ("data", "fsdp", "tensor", "seq")


def _mesh(**sizes):
  shape = [sizes.get(name, 1) for name in AXES]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)


def _inputs(heads, seed=0):
  draw = lambda i, *shape: jnp.asarray(np.random.default_rng([seed, i]).normal(size=shape), "f4")
  q, k = (0.5 * draw(i, B, T, heads[0], K) for i in range(2))
  gates = -jax.nn.softplus(draw(3, B, T, heads[1]))
  segment_ids = jnp.asarray([[0] * 2 + [1] * 4, [0] * 6, [0] * 5 + [3], [-1] + [2] * 5], jnp.int32)
  return {
    "q": q, "k": k, "v": draw(2, B, T, heads[1], V), "log_decay": gates,
    "beta": jax.nn.sigmoid(draw(4, B, T, heads[1])),
    "initial_state": draw(5, B, heads[1], K, V), "segment_ids": segment_ids,
  }  # fmt: skip


class StandIn:
  """The chunked form in the place of kernels; it notes what it is given."""

  shapes: list

  @classmethod
  def supports(cls, **arguments):
    return None

  @classmethod
  def run(cls, tokens, state, scale, chunk_size, precision):
    cls.shapes.append((tokens.q.shape, tokens.v.shape, state.shape))
    return chunked(tokens._replace(q=scale * tokens.q), state, chunk_size, precision)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
  monkeypatch.setattr(StandIn, "shapes", [], raising=False)
  monkeypatch.setattr(kernels, "_kernels", lambda *arguments: StandIn)
  monkeypatch.setattr(kernels, "WIDEST", V)


def _value_and_gradients(implementation):
  def loss(inputs, segment_ids):
    o, state = ops.linear_attention(
      **inputs, segment_ids=segment_ids, implementation=implementation
    )
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state)), (o, state)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
  ("heads", "mesh", "given"),
  [
    ((2, 4), {"data": 2, "fsdp": 2, "tensor": 2}, ((1, T, 1, K), (1, T, 1, 2, V))),
    ((1, 4), {"data": 2, "tensor": 4}, ((2, T, 1, K), (2, T, 1, 1, V))),
    ((2, 2), {"tensor": 2, "seq": 2}, ((B, T // 2, 1, K), (B, T // 2, 1, 1, V))),
  ],
  ids=["heads that share keys", "one key head", "time is split too"],
)
def test_devices_share_rows_and_heads(heads, mesh, given):
  inputs = _inputs(heads)
  segment_ids = inputs.pop("segment_ids")
  expected = _value_and_gradients("chunked")(inputs, segment_ids)
  with jax.set_mesh(_mesh(**mesh)):
    program = _value_and_gradients("pallas")
    place = lambda x: jax.device_put(x, jax.P(("data", "fsdp")))
    lowered = program.lower(jax.tree.map(place, inputs), place(segment_ids))
    actual = lowered.compile()(jax.tree.map(place, inputs), place(segment_ids))
  assert set((q, v) for q, v, _ in StandIn.shapes) >= {given}
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5), actual, expected)


def test_wide_heads_are_several_side_by_side(monkeypatch):
  inputs = _inputs((2, 4))
  segment_ids = inputs.pop("segment_ids")
  expected = _value_and_gradients("chunked")(inputs, segment_ids)
  monkeypatch.setattr(kernels, "WIDEST", V // 2)
  actual = _value_and_gradients("pallas")(inputs, segment_ids)
  assert StandIn.shapes == [((B, T, 2, K), (B, T, 2, 4, 2), (B, 2, 4, K, 2))]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5), actual, expected)


def test_nothing_is_gathered():
  inputs = _inputs((2, 4))
  with jax.set_mesh(_mesh(data=4, tensor=2)):
    place = lambda x: jax.device_put(x, jax.P("data", None, "tensor"))
    state = jax.device_put(inputs.pop("initial_state"), jax.P("data", "tensor"))
    segment_ids = jax.device_put(inputs.pop("segment_ids"), jax.P("data"))
    inputs = jax.tree.map(place, inputs) | {"initial_state": state}
    text = _value_and_gradients("pallas").lower(inputs, segment_ids).compile().as_text()
  assert not re.search("all-gather|all-to-all|collective-permute", text)


def test_what_devices_cannot_share_is_said():
  q = jax.ShapeDtypeStruct((B, T, 2, K), jnp.float32)
  v = jax.ShapeDtypeStruct((B, T, 6, V), jnp.float32)

  def reason(**mesh):
    with jax.set_mesh(_mesh(**mesh)):
      return dispatch.refusal(ops.linear_attention, "pallas", q=q, k=q, v=v)

  assert reason(data=4, tensor=2) is None
  assert reason(data=8) == "B is 4, and 8 devices share it"
  assert reason(tensor=4) == "H is 2, and 4 devices share it"
  # The form that splits time sees to the rest.
  assert reason(tensor=4, seq=2) is None
  assert shards.refusal(B=3) is None and shards.axes("B") == ()


@needs_mosaic
def test_kernels_on_shards_of_gpus_that_are_not_there(monkeypatch):
  monkeypatch.undo()
  q = jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16)
  run = lambda q, k, v: ops.linear_attention(q, k, v, implementation="pallas")[0]
  text = lowered(run, q, q, q, **dict(zip(AXES, (2, 1, 2, 1))))
  assert "manual_computation" in text
  (call,) = re.findall(r"custom_call @mosaic_gpu\w*\(.*", text)
  assert "tensor<2x128x1x64xbf16>" in call and "tensor<4x128" not in call


@pytest.mark.parametrize("op", ("linear_scan", "selective_scan"))
def test_devices_share_rows_and_channels(op, monkeypatch):
  D, N, shapes = 4, 3, []
  draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).normal(size=shape), "f4")
  inputs = {"a": jax.nn.sigmoid(draw(0, B, T, D)), "b": draw(1, B, T, D)}
  if op == "selective_scan":
    inputs = {
      "x": draw(0, B, T, D), "dt": jax.nn.softplus(draw(1, B, T, D)), "A": -jnp.exp(draw(2, D, N)),
      "B": draw(3, B, T, N), "C": draw(4, B, T, N), "D": draw(5, D),
    }  # fmt: skip
  function = getattr(ops, op)

  def stand_in(*arrays, reverse):
    *arrays, state, segments = arrays
    shapes.append((arrays[0].shape, state.shape))
    ids = jnp.where(segments.real, segments.document, -1)
    return function(
      *arrays, initial_state=state, segment_ids=ids, reverse=reverse, implementation="recurrent"
    )

  declared, preference = dispatch._declared[op]
  kernel = dispatch.Implementation(stand_in, dispatch.anything, "")
  monkeypatch.setitem(dispatch._declared, op, ({**declared, "pallas": kernel}, preference))
  segment_ids = _inputs((2, 2))["segment_ids"]

  def loss(inputs, implementation):
    o, state = function(**inputs, segment_ids=segment_ids, implementation=implementation)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state)), (o, state)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  expected = run(inputs, "recurrent")
  with jax.set_mesh(_mesh(data=4, tensor=2)):
    actual = run(inputs, "pallas")
  assert shapes[0][0] == (1, T, D // 2) and shapes[0][1][:2] == (1, D // 2)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5), actual, expected)
