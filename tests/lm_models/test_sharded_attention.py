"""The attention mixer on a mesh that splits time: a layer like any other, and nothing gathered but
what attention needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from experiments.collectives import collectives
from lm_models import attention
from tests.lm_models.models import random_params
from tests.quick_compilation import quick_compilation as quick_compilation

B, T, D = 2, 32, 10
IDS = np.array([[0] * 5 + [1] * 14 + [-1] * 6 + [2] * 7, [-1] * 9 + [4] * 23], np.int32)


def make(**fields):
  """A mixer, its parameters and an input."""
  config = attention.Config(D=D, L=2, H=4, kv_heads=2, K=6, mlp_width=0, context=16, **fields)
  mixer = attention.Mixer(config)
  x = jnp.asarray(1.5 * np.random.default_rng(1).standard_normal((B, T, D)), jnp.float32)
  return mixer, random_params(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"]), x


def make_mesh(tensor, seq):
  devices = np.array(jax.devices()[: tensor * seq]).reshape(1, 1, tensor, seq)
  return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
  ("sequence", "window", "ids"), [("all_gather", None, IDS), ("ring", None, None), ("ring", 4, IDS)]
)
def test_two_calls_equal_one_device(sequence, window, ids):
  """With the state of the first in the second; outputs, the last state, gradients."""
  mixer, params, x = make(sequence=sequence, window=window)
  ids = None if ids is None else jnp.asarray(ids)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def twice(params, x, weights):
    first, state = mixer.apply({"params": params}, x, None, ids)
    second, state = mixer.apply({"params": params}, x[:, ::-1], state, ids)
    return jnp.sum((first + second) * weights), (first, second, state)

  weights = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape), jnp.float32)
  expected = jax.device_get(twice(params, x, weights))
  with jax.set_mesh(make_mesh(2, 4)):
    actual = jax.device_get(twice(params, x, weights))
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, atol=2e-5 * (1 + np.abs(other).max()))


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"sequence": "ring"}, {("collective-permute", 7, "f32[2,4,2,12]")}),
    ({"sequence": "all_gather"}, {("all-gather", 1, "f32[1,2,4,2,12]")}),
    ({"window": 3}, {("collective-permute", 1, "f32[2,2,2,12]")}),
  ],
)
def test_what_is_sent(fields, expected):
  mixer, params, x = make(**fields)
  mesh = make_mesh(1, 8)
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "seq")))
  with jax.set_mesh(mesh):
    run = jax.jit(lambda x: mixer.apply({"params": params}, x)[0])
    found = collectives(run.lower(x).compile().as_text())
  assert {(r.kind, r.count, r.arrays.split("{")[0]) for r in found} == expected
