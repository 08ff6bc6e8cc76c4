"""What the stack does over its depth: scan, unrolling, rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_models import lm
from tests.lm_models.models import make_config, random_model, random_tokens
from tests.quick_compilation import quick_compilation as quick_compilation

TOKENS = jnp.asarray(random_tokens((2, 9)))


def loss(config, params):
  """A number that depends on all logits, of a model with this config."""
  logits, _ = lm.apply(config, params, TOKENS)
  return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])


def residual_bytes(config, params):
  """Bytes that the forward pass keeps for the backward pass."""
  kept = jax.eval_shape(lambda p: jax.vjp(functools.partial(loss, config), p)[1], params)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.fixture(scope="module")
def plain():
  """A hybrid's parameters, value and gradients without rematerialisation."""
  config, params = random_model("hybrid")
  return params, jax.jit(jax.value_and_grad(functools.partial(loss, config)))(params)


@pytest.mark.parametrize("fields", [{"remat": "dots"}, {"remat": "full"}, {"unroll": 2}])
def test_the_same_values_and_gradients(plain, fields):
  params, (expected, expected_gradients) = plain
  config = make_config("hybrid", **fields)
  value, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, config)))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for got, truth in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)):
    np.testing.assert_allclose(got, truth, atol=2e-5 * max(1.0, np.abs(truth).max()))


def test_policies_keep_less_and_less(plain):
  kept = {
    remat: residual_bytes(make_config("hybrid", remat=remat), plain[0])
    for remat in ("none", "dots", "full")
  }
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(plain[0]))
  kept = {remat: size - weights for remat, size in kept.items()}  # all of them keep the weights
  assert kept["full"] < 0.7 * kept["dots"] and kept["dots"] < 0.7 * kept["none"], kept


def jaxpr(config):
  """The program of one forward and backward pass."""
  params = jax.eval_shape(functools.partial(lm.init, config), jax.random.key(0))
  return jax.make_jaxpr(jax.grad(functools.partial(loss, config)))(params)


def test_unrolling_is_what_it_says():
  def over_layers(config):
    return [
      equation.params["unroll"]
      for equation in jaxpr(config).eqns
      if equation.primitive.name == "scan" and equation.params["length"] == config.repeats
    ]

  assert set(over_layers(make_config("mamba", L=5))) == {1}
  assert set(over_layers(make_config("mamba", L=5, unroll=2))) == {2}


@pytest.mark.parametrize("kind, depths", [("hybrid", (4, 16)), ("transformer", (2, 16))])
def test_the_program_does_not_grow_with_depth(kind, depths):
  shallow, deep = (str(jaxpr(make_config(kind, L=L))).count("\n") for L in depths)
  assert shallow == deep > 100
  unrolled = str(jaxpr(make_config(kind, L=16, unroll=16))).count("\n")
  assert unrolled >= deep
