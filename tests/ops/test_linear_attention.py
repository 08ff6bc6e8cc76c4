"""What the laws do not see of `linear_attention`: extremes, trees, emitted states, memory."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import reference
from tests.ops.compare import check, run, truth, weights
from tests.quick_compilation import quick_compilation as quick_compilation

KINDS = [(decay, delta) for decay in ("none", "scalar", "vector") for delta in (False, True)]
STRONG = [kind for kind in KINDS if kind[0] != "none"]


def draw(decay, delta, B=2, T=9, Hq=1, H=2, K=4, V=3, seed=0):
  """Inputs by name, in float32, with unit keys, beta up to 2 and an initial state."""
  rng = np.random.default_rng(seed)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  inputs = {
    "q": rng.normal(size=(B, T, Hq, K)),
    "k": unit(rng.normal(size=(B, T, Hq, K))),
    "v": rng.normal(size=(B, T, H, V)),
    "initial_state": rng.normal(size=(B, H, K, V)),
  }
  if decay != "none":
    shape = (B, T, H) + ((K,) if decay == "vector" else ())
    inputs["log_decay"] = -rng.exponential(size=shape)
  if delta:
    inputs["beta"] = rng.uniform(0, 2, size=(B, T, H))
  return {name: x.astype(np.float32) for name, x in inputs.items()}


def extremes(decay, delta, T=70):
  """One kind of extreme inputs per row of the batch."""
  inputs = draw(decay, delta, B=8, T=T, K=8)
  rng = np.random.default_rng(1)
  k, g = inputs["k"], inputs["log_decay"]
  rare = rng.random(g.shape[1:]) < 0.05
  g[0] = np.where(rare, -1e4, -0.05)
  g[1] = -20
  g[2] = 0
  g[3] = np.where(rare, -np.inf, -0.05)
  g[4:] = 0
  k[4] = k[4, :1]  # the same key again and again
  k[5] = k[5, :1] + 0.1 * k[5]
  k[5] /= np.linalg.norm(k[5], axis=-1, keepdims=True)
  k[6, ::3] = 0
  k[7] = 0
  if delta:
    inputs["beta"][4] = 2
  return inputs


@pytest.mark.parametrize(("decay", "delta"), STRONG)
@pytest.mark.parametrize("implementation", ["chunked", "parallel"])
def test_extreme_inputs(decay, delta, implementation):
  inputs = extremes(decay, delta)
  expected = truth(reference.linear_attention, inputs)
  actual = run(ops.linear_attention, inputs, implementation=implementation)
  for name, y in expected.items():
    assert np.isfinite(actual[name]).all(), name
    axes = tuple(range(1, y.ndim))
    largest = np.abs(y).max(axes) + 1e-30
    error = np.abs(actual[name] - y).max(axes) / largest
    # A key that comes again and again with beta = 2 loses some digits: nothing is ever forgotten.
    limit = np.where(np.arange(8) == 4, 5e-5, 1e-5)
    assert (error < limit).all(), f"{name}: {error}"


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 128])
def test_chunk_sizes_and_widths_of_one(chunk_size):
  inputs = draw("vector", True, T=37, K=1, V=1)
  actual = run(
    ops.linear_attention, inputs, implementation="chunked", chunk_size=chunk_size, scale=0.7
  )
  check(actual, truth(reference.linear_attention, inputs, scale=0.7))


@pytest.mark.parametrize("front", ["delta_rule", "kda", "retention"])
def test_fronts_that_are_not_in_the_table(front):
  decay = {"delta_rule": "none", "kda": "vector", "retention": "none"}[front]
  inputs = draw(decay, front != "retention", T=7, K=3)
  definition = dict(inputs)
  names = {"q": "q", "k": "k", "v": "v", "log_decay": "g", "beta": "beta"}
  given = {names.get(name, name): x for name, x in inputs.items()}
  if front == "retention":
    g = np.log1p(-(2.0 ** -(5.0 + np.arange(2))))
    definition["log_decay"] = np.broadcast_to(g, (2, 7, 2)).astype(np.float64)
  expected = truth(reference.linear_attention, definition)
  if front == "retention":
    del expected["dlog_decay"]
  expected = {"dg" if name == "dlog_decay" else name: x for name, x in expected.items()}
  check(run(getattr(ops, front), given), expected)

  def steps(inputs):
    state, outputs = inputs["initial_state"], []
    ordered = [inputs[name] for name in ("q", "k", "v", "g", "beta") if name in inputs]
    for t in range(7):
      o, state = getattr(ops, f"{front}_step")(state, *(x[:, t] for x in ordered))
      outputs.append(o)
    return jnp.stack(outputs, 1), state

  o, state = jax.tree.map(np.asarray, jax.jit(steps)(given))
  check({"o": o, "state": state}, {name: expected[name] for name in ("o", "state")})


def states_by_prefix(m, reverse, segment_ids, **inputs):
  """The state after each of the last m tokens [B m ...]: what comes later is made padding."""
  B, T = segment_ids.shape
  ends = np.arange(m) if reverse else np.arange(T - m, T)
  places = np.arange(T)
  seen = places >= ends[:, None] if reverse else places <= ends[:, None]
  ids = np.where(seen, segment_ids[:, None], -1).reshape(B * m, T)
  copies = {name: jnp.repeat(x, m, axis=0) for name, x in inputs.items()}
  _, state = reference.linear_attention(**copies, segment_ids=jnp.asarray(ids), reverse=reverse)
  return state.reshape(B, m, *state.shape[1:])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  ("implementation", "m"), [("chunked", 1), ("chunked", 5), ("parallel", 9), ("recurrent", 3)]
)
def test_emitted_states_are_those_of_prefixes(implementation, m, reverse):
  inputs = draw("vector", True)
  ids = np.array([[-1, 3, 3, 3, -1, 3, 5, 5, 5], [0, 0, 0, 0, 1, 1, -1, 1, -1]], np.int32)
  options = dict(segment_ids=jnp.asarray(ids), reverse=reverse)

  def emitted(**inputs):
    o, state, states = ops.linear_attention(
      **inputs, **options, implementation=implementation, emit_states=m
    )
    return o, jnp.concatenate([state[:, None], states], 1)

  def prefixes(**inputs):
    o, state = reference.linear_attention(**inputs, **options)
    states = states_by_prefix(m, reverse, ids, **inputs)
    return o, jnp.concatenate([state[:, None], states], 1)

  check(run(emitted, inputs), truth(prefixes, inputs))


def random_tree(T, seed):
  """bool [T T]: ancestors of each token, itself included; several tokens may have no parent."""
  rng = np.random.default_rng(seed)
  mask = np.eye(T, dtype=bool)
  for i in range(1, T):
    parent = rng.integers(-1, i)
    if parent >= 0:
      mask[i] |= mask[parent]
  return mask


def by_path(masks, **inputs):
  """Outputs and states [B T ...] of all tokens, each by the oracle on its own path."""
  B, T = masks.shape[:2]
  ids = np.where(masks, 0, -1).astype(np.int32).reshape(B * T, T)
  copies = {name: jnp.repeat(x, T, axis=0) for name, x in inputs.items()}
  o, state = reference.linear_attention(**copies, segment_ids=jnp.asarray(ids))
  own = jnp.asarray(np.tile(np.arange(T), B)[:, None, None, None])
  o = jnp.take_along_axis(o, own, axis=1)[:, 0]
  return o.reshape(B, T, *o.shape[1:]), state.reshape(B, T, *state.shape[1:])


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_tree_equals_every_path(decay, delta):
  T = 7
  inputs = draw(decay, delta, T=T)
  masks = np.stack([random_tree(T, 0), random_tree(T, 1)])
  accepted = np.array([4, 2])

  def tree(**inputs):
    o, state, states = ops.linear_attention(
      **inputs, tree_mask=jnp.asarray(masks), accepted=jnp.asarray(accepted), emit_states=T
    )
    return o, jnp.concatenate([state[:, None], states], 1)

  def paths(**inputs):
    o, states = by_path(masks, **inputs)
    chosen = jnp.stack([states[row, token] for row, token in enumerate(accepted.tolist())])
    return o, jnp.concatenate([chosen[:, None], states], 1)

  check(run(tree, inputs), truth(paths, inputs))


def test_tree_in_reverse_and_among_documents():
  T = 9
  inputs = draw("scalar", True, T=T)
  ids = np.array([[0] * 5 + [1] * 4, [-1] * 2 + [2] * 5 + [-1] * 2], np.int32)
  chain = np.tril(np.ones((T, T), bool))
  for reverse in (False, True):
    options = dict(segment_ids=jnp.asarray(ids), reverse=reverse)
    mask = chain.T if reverse else chain
    op = functools.partial(ops.linear_attention, tree_mask=jnp.asarray(mask), **options)
    accepted = jnp.full(2, 0 if reverse else T - 1)
    oracle = functools.partial(reference.linear_attention, **options)
    op = functools.partial(op, accepted=accepted)
    check(run(op, inputs), truth(oracle, inputs))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("implementation", ["recurrent"])
def test_overflow_stays_in_its_document(implementation, value):
  inputs = draw("scalar", True, T=18)
  ids = jnp.asarray(np.repeat([[0, 1, 2]], 2, 0).repeat(6, 1), jnp.int32)
  options = dict(segment_ids=ids, implementation=implementation)
  clean = run(ops.linear_attention, inputs, **options)
  spoilt = {**inputs, "k": inputs["k"].copy()}
  spoilt["k"][0, 7:9] = value
  actual = run(ops.linear_attention, spoilt, **options)
  others = np.ones((2, 18), bool)
  others[0, 6:12] = False
  assert not np.isfinite(actual["o"][0, 9:12]).any()
  for name in ("o", "dq", "dk", "dv", "dlog_decay", "dbeta"):
    np.testing.assert_array_equal(actual[name][others], clean[name][others], err_msg=name)
  np.testing.assert_array_equal(actual["state"], clean["state"])
  np.testing.assert_array_equal(actual["dinitial_state"], clean["dinitial_state"])


def test_packed_equals_alone():
  """The same tokens in the middle of a packed row and alone: one rounding of bfloat16 apart."""
  inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw("vector", True, T=40).items()}
  inputs.pop("initial_state")
  op = jax.jit(functools.partial(ops.linear_attention, implementation="chunked", chunk_size=16))
  ids = jnp.repeat(jnp.array([[0, 1, 2]]), jnp.array([11, 19, 10]), axis=1).repeat(2, 0)
  packed, _ = op(**inputs, segment_ids=ids)
  alone, _ = op(**{name: x[:, 11:30] for name, x in inputs.items()})
  a, b = (np.asarray(x, np.float32) for x in (packed[:, 11:30], alone))
  np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-9 * np.abs(b).max())


def test_second_and_forward_derivatives():
  with jax.enable_x64(True):
    inputs = {name: jnp.asarray(x, jnp.float64) for name, x in draw("vector", True).items()}
    tangents = jax.tree.map(lambda x: jnp.asarray(weights(x.shape), x.dtype), inputs)

    def derivatives(op):
      loss = lambda inputs: sum(jnp.sum(jnp.sin(x)) for x in op(**inputs))
      forward = jax.jvp(loss, (inputs,), (tangents,))[1]
      return forward, jax.jvp(jax.grad(loss), (inputs,), (tangents,))[1]

    op = functools.partial(ops.linear_attention, implementation="chunked", chunk_size=4)
    actual, expected = jax.jit(lambda: tuple(map(derivatives, (op, reference.linear_attention))))()
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), actual, expected)


def test_memory_of_chunked_grows_linearly_and_of_parallel_quadratically():
  def temporary_bytes(implementation, T):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    qk, v, g = array(1, T, 1, 16), array(1, T, 2, 16), array(1, T, 2)

    def loss(q, k, v, g):
      options = dict(implementation=implementation, chunk_size=64)
      return ops.linear_attention(q, k, v, log_decay=g, **options)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(qk, qk, v, g).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes("chunked", 8192) < 2.2 * temporary_bytes("chunked", 4096)
  assert temporary_bytes("parallel", 1024) > 3.5 * temporary_bytes("parallel", 512)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(k=np.ones((2, 9, 1, 5))), r"k has shape \(2, 9, 1, 5\), expected \[B T Hq K\]"),
    (dict(v=np.ones((2, 9, 3, 3))), r"log_decay has shape|H = 3|beta has shape"),
    (dict(beta=np.ones((2, 9))), r"beta has shape \(2, 9\), expected \[B T H\]"),
    (dict(log_decay=np.ones((2, 9, 2, 3))), r"log_decay has shape .* expected \[B T H K\]"),
    (dict(q=np.ones((2, 9, 1, 4), int)), "q has dtype int64, expected a floating dtype"),
    (dict(emit_states=10), "emit_states is 10, expected 0 to T = 9"),
    (dict(emit_states=True), "emit_states is True, expected an int"),
    (dict(accepted=jnp.zeros(2, int)), "accepted is given without tree_mask"),
    (dict(tree_mask=np.ones((9, 9))), "tree_mask has dtype float64, expected bool"),
    (dict(tree_mask=np.ones((9, 8), bool)), r"tree_mask has shape \(9, 8\), expected"),
    (
      dict(tree_mask=np.eye(9, dtype=bool), implementation="chunked"),
      "implementation is 'chunked', expected None with tree_mask",
    ),
    (
      dict(tree_mask=np.eye(9, dtype=bool), accepted=jnp.zeros(3, int)),
      r"accepted has shape \(3,\), expected \[B\] with B=2",
    ),
    (
      dict(tree_mask=np.eye(9, dtype=bool), accepted=jnp.zeros(2)),
      "accepted has dtype float32, expected an integer",
    ),
  ],
)
def test_a_wrong_argument_says_so(changes, message):
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(ops.linear_attention)(**{**draw("scalar", True), **changes})


def test_heads_must_be_a_multiple():
  inputs = draw("scalar", False, Hq=2, H=3)
  with pytest.raises(ValueError, match="v has H = 3 heads, expected a multiple of q's Hq = 2"):
    inspect.unwrap(ops.linear_attention)(**inputs)
