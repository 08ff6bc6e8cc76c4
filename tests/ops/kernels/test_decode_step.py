"""The Hopper kernel of one token, in the interpreter on a CPU, and lowered for a GPU that is not
there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from ops.kernels.gpu import decode_step
from tests.ops import compare
from tests.ops.kernels.hopper import lowered, needs_mosaic, on_hopper


def _inputs(B, Hq, H, K, V, decay, beta):
  """A token, as T = 1."""
  rng = np.random.default_rng(K + V)
  normal = lambda *shape: rng.standard_normal(shape)
  inputs = {"q": normal(B, 1, Hq, K), "k": normal(B, 1, Hq, K) / K**0.5, "v": normal(B, 1, H, V)}
  if decay is not None:
    shape = (B, 1, H) if decay == "scalar" else (B, 1, H, K)
    # One head, or row of the state, forgets everything.
    inputs["log_decay"] = np.where(np.arange(shape[-1]) == 1, -1e9, -np.abs(normal(*shape)))
  if beta:
    inputs["beta"] = rng.uniform(0, 2, (B, 1, H))
  inputs["initial_state"] = normal(B, H, K, V)
  return compare.cast(inputs, "float32")


def _kernel(q, k, v, initial_state, log_decay=None, beta=None):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  one = lambda x: None if x is None else x[:, 0]
  arrays = map(one, (q, k, v, log_decay, beta))
  scale, interpret = k.shape[-1] ** -0.5, plgpu.InterpretGPUParams()
  o, state = decode_step.step(initial_state, *arrays, scale, interpret)
  return o[:, None], state


@needs_mosaic
@pytest.mark.parametrize(
  ("Hq", "H", "K", "V", "decay", "beta"),
  [
    (1, 2, 64, 64, None, False),
    (2, 2, 128, 64, "scalar", True),
    (1, 2, 64, 32, "vector", True),
    (2, 4, 256, 32, "scalar", False),
  ],
)
def test_values_and_gradients(Hq, H, K, V, decay, beta):
  inputs = _inputs(2, Hq, H, K, V, decay, beta)
  actual = compare.run(_kernel, inputs)
  compare.check(actual, compare.truth(reference.linear_attention, inputs))


@needs_mosaic
def test_vmap_is_more_rows():
  inputs = _inputs(4, 2, 2, 64, 32, "scalar", True)
  mapped = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), inputs)
  o, state = jax.jit(jax.vmap(lambda inputs: _kernel(**inputs)))(mapped)
  expected = compare.truth(reference.linear_attention, inputs)
  actual = {"o": o.reshape(4, *o.shape[2:]), "state": state.reshape(4, *state.shape[2:])}
  compare.check(jax.tree.map(np.asarray, actual), {name: expected[name] for name in actual})


def _structs(B, Hq, H, K, V, decay, beta):
  inputs = _inputs(B, Hq, H, K, V, decay, beta)
  state = inputs.pop("initial_state")
  token = {name: jax.ShapeDtypeStruct(x[:, 0].shape, x.dtype) for name, x in inputs.items()}
  return jax.ShapeDtypeStruct(state.shape, state.dtype), token


@needs_mosaic
@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_a_loop_keeps_the_state_in_place(decay):
  state, token = _structs(1, 2, 4, 128, 128, decay, beta=True)

  @functools.partial(jax.jit, donate_argnums=0)
  def many(state, token):
    step = lambda state, _: ops.linear_attention_step(state, **token, implementation="pallas")[::-1]
    return jax.lax.scan(step, state, length=5)

  text = lowered(many, state, token)
  assert text.count("custom_call @mosaic_gpu_v2") == 1
  assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text


@needs_mosaic
def test_gradients_lower_and_explain_tells():
  state, token = _structs(8, 16, 16, 128, 128, "scalar", beta=True)

  def loss(state, token):
    o, state = ops.linear_attention_step(state, **token, implementation="pallas")
    return jnp.sum(o) + jnp.sum(state)

  lowered(jax.grad(loss, argnums=(0, 1)), state, token)
  with on_hopper():
    text = ops.explain(ops.linear_attention_step, state, **token)
  assert "pallas     runs" in text
  token["v"] = jax.ShapeDtypeStruct((8, 16, 200), jnp.float32)
  state = jax.ShapeDtypeStruct((8, 16, 128, 200), jnp.float32)
  with on_hopper():
    text = ops.explain(ops.linear_attention_step, state, **token)
  assert "recurrent  runs" in text
  assert "V is 200, it takes multiples of 32" in text
