"""Attention against a naive float64 softmax: windows, grouped heads, documents, the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_models import attention, layers
from tests.lm_models import oracle
from tests.lm_models.models import SEGMENT_IDS, random_params
from tests.quick_compilation import quick_compilation as quick_compilation

SIZES = {"D": 10, "L": 2, "H": 4, "K": 6, "mlp_width": 0, "context": 16}


def make(seed=0, **fields):
  """A mixer, its parameters, and a function x, state, ids -> y, state."""
  mixer = attention.Mixer(attention.Config(**{**SIZES, **fields}))
  x = jnp.zeros((1, 2, 10))
  params = random_params(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"], seed)
  return mixer, params, jax.jit(functools.partial(mixer.apply, {"params": params}))


def random_input(rows, T=12, seed=1):
  """Float32 [rows T 10], large enough that softmaxes are far from flat."""
  x = np.random.default_rng(seed).standard_normal((rows, T, 10))
  return (1.5 * x).astype(np.float32)


def truth(params, x, ids, window):
  """The oracle, each document alone."""
  return oracle.by_document(
    lambda u: oracle.attention(oracle.to_float64(params), u, window), x.astype(np.float64), ids
  )


@pytest.mark.parametrize(
  "window, kv_heads", [(None, None), (None, 2), (1, 4), (2, 1), (5, 2), (40, 4)]
)
def test_equals_naive_softmax_whole_and_by_document(window, kv_heads):
  _, params, run = make(window=window, kv_heads=kv_heads)
  x = random_input(len(SEGMENT_IDS))
  whole, _ = run(x)
  expected = truth(params, x, np.zeros_like(SEGMENT_IDS), window)
  np.testing.assert_allclose(whole, expected, atol=5e-5)
  packed, _ = run(x, None, SEGMENT_IDS)
  np.testing.assert_allclose(packed, truth(params, x, SEGMENT_IDS, window), atol=5e-5)


def test_gradients_of_parameters_and_input():
  mixer, params, _ = make(window=3, kv_heads=2)
  x = random_input(len(SEGMENT_IDS))
  cotangent = np.random.default_rng(2).standard_normal(x.shape) * (SEGMENT_IDS >= 0)[..., None]

  @jax.jit
  @jax.grad
  def gradient(p):
    p = dict(p)
    x = p.pop("x")
    return jnp.sum(mixer.apply({"params": p}, x, None, jnp.asarray(SEGMENT_IDS))[0] * cotangent)

  def loss(p):
    return np.sum(truth(p, p["x"], SEGMENT_IDS, 3) * cotangent)

  everything = {**params, "x": x}
  oracle.check_gradient(loss, everything, gradient(everything))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_cache_hands_over_at_every_split(window):
  """Every split at once: the first call padded on the right, the second on the left."""
  mixer, params, _ = make(window=window, kv_heads=2)
  x = jnp.asarray(random_input(1))
  places = np.arange(12)

  @jax.jit
  @jax.vmap
  def halves(n):
    apply = functools.partial(mixer.apply, {"params": params}, x)
    first, state = apply(None, jnp.where(places < n, 0, -1)[None])
    second, last = apply(state, jnp.where(places >= n, 0, -1)[None])
    return first + second, last

  y, last = halves(jnp.arange(0, 13))
  expected = truth(params, np.asarray(x), np.zeros((1, 12), int), window)
  np.testing.assert_allclose(y[:, 0], np.tile(expected, (13, 1, 1)), atol=5e-5)
  # Wherever the split, the state in the end is the same.
  for name, leaf in last.items():
    np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:1], leaf.shape), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("split", [1, 7])
def test_cache_hands_over_without_ids(split):
  mixer, params, run = make(window=4)
  x = random_input(2)
  first, state = run(x[:, :split], attention.init_state(mixer.config, 2))
  second, _ = run(x[:, split:], state)
  expected = truth(params, x, np.zeros((2, 12), int), 4)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), expected, atol=5e-5)


def test_cache_keeps_the_last_document_only():
  """What follows a call belongs to its last document; a document that ended is not seen again."""
  _, params, run = make(window=6)
  x = random_input(3, T=16)
  ids = np.array([[0] * 9 + [3] * 3, [0] * 11 + [1], [0] * 6 + [2] * 3 + [-1] * 3], np.int32)
  _, state = run(x[:, :12], None, ids)
  np.testing.assert_array_equal(state["valid"].sum(1), [3, 1, 3])
  y, _ = run(x[:, 12:], state)
  rest = np.tile(ids.max(1, keepdims=True), 4)
  expected = truth(params, x, np.concatenate([ids, rest], 1), 6)
  np.testing.assert_allclose(y, expected[:, 12:], atol=5e-5)
  # The second call may open new documents itself: the cache belongs to its first only.
  new = np.tile([4, 4, 5, 5], (3, 1)).astype(np.int32)
  y, state = run(x[:, 12:], state, new)
  joined = np.where(new == 4, rest, 9)
  expected = truth(params, x, np.concatenate([ids, joined], 1), 6)
  np.testing.assert_allclose(y, expected[:, 12:], atol=5e-5)
  np.testing.assert_array_equal(state["valid"].sum(1), [2, 2, 2])


def test_a_call_of_padding_alone_changes_nothing():
  mixer, _, run = make(window=5)
  x = random_input(1)
  _, state = run(x)
  y, after = run(x, state, np.full((1, 12), -1, np.int32))
  jax.tree.map(np.testing.assert_array_equal, after, state)
  np.testing.assert_array_equal(y, 0)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(
    jnp.shape, attention.init_state(mixer.config, 1)
  )


@pytest.mark.parametrize("fields, sees", [({"window": 4}, 4), ({"context": 6}, 7)])
def test_decoding_far_beyond_the_window(fields, sees):
  """Each token sees the window's worth before it, in a state that never grows."""
  mixer, params, _ = make(kv_heads=2, **fields)
  x = random_input(1, T=64)

  @jax.jit
  def decode(x):
    def step(state, token):  # lax.scan insists that the state's shapes and dtypes stay
      y, state = mixer.apply({"params": params}, token[:, None], state)
      return state, y[:, 0]

    return jax.lax.scan(step, attention.init_state(mixer.config, 1), jnp.moveaxis(x, 1, 0))

  state, y = decode(x)
  expected = truth(params, x, np.zeros((1, 64), int), sees)
  np.testing.assert_allclose(y[:, 0], expected[0], atol=1e-4)
  assert state["k"].shape == (1, sees - 1, 2, 6)


def test_padding_may_hold_anything():
  """Not-a-numbers in padding reach no token."""
  _, _, run = make(window=3)
  x = random_input(len(SEGMENT_IDS))
  bad = np.where((SEGMENT_IDS < 0)[..., None], np.nan, x)
  y, state = run(bad, None, SEGMENT_IDS)
  expected, expected_state = run(x, None, SEGMENT_IDS)
  np.testing.assert_array_equal(y, expected)
  jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def test_bfloat16_follows_float32():
  _, params, run = make(window=5)
  low = attention.Mixer(attention.Config(**SIZES, window=5, dtype="bfloat16"))
  x = random_input(len(SEGMENT_IDS))
  y, state = jax.jit(low.apply)({"params": params}, x, None, SEGMENT_IDS)
  expected, _ = run(x, None, SEGMENT_IDS)
  assert y.dtype == state["k"].dtype == jnp.bfloat16
  error = np.abs(np.asarray(y, np.float32) - expected)
  assert 0 < error.mean() < 0.02 * np.abs(expected).mean() * 2


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_rotary_turns_pairs_and_only_differences_matter(base):
  generator = np.random.default_rng(0)
  q, k = jnp.asarray(generator.standard_normal((2, 1, 5, 3, 8)), jnp.float32)
  positions = jnp.array([[0, 1, 5, 40, 3]], jnp.int32)
  turned = layers.rotary(q, positions, base)
  expected = [
    [oracle.rotate(np.float64(q[0, t, h]), int(positions[0, t]), base) for h in range(3)]
    for t in range(5)
  ]
  np.testing.assert_allclose(turned[0], expected, atol=1e-5)
  shifted = lambda x, shift: np.asarray(layers.rotary(x, positions + shift, base), np.float64)
  scores = np.einsum("bthk,bshk->bhts", shifted(q, 0), shifted(k, 0))
  moved = np.einsum("bthk,bshk->bhts", shifted(q, 17), shifted(k, 17))
  apart = np.einsum("bthk,bshk->bhts", shifted(q, 17), shifted(k, 0))
  np.testing.assert_allclose(moved, scores, atol=1e-4)
  assert np.abs(apart - scores).max() > 0.5


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"K": None, "H": 3}, "H is 3, must divide D = 10 where K is not given"),
    ({"K": 5}, "K is 5, must be even"),
    ({"kv_heads": 3}, "kv_heads is 3, must divide H = 4"),
    ({"window": 0}, "window is 0, must be at least 1 or None"),
    ({"H": 0}, "H is 0, must be at least 1"),
    ({"kv_heads": 0}, "kv_heads is 0, must be at least 1"),
    ({"kv_heads": -2}, "kv_heads is -2, must be at least 1"),
    ({"context": -1}, "context is -1, must be at least 0"),
    ({"sequence": "rings"}, "sequence is 'rings', must be one of all_gather, ring"),
    ({"mlp_width": -1}, "mlp_width is -1, must be at least 0"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    attention.Config(**{**SIZES, **fields})


def test_state_of_another_size():
  mixer, params, _ = make(window=4, kv_heads=2)
  state = attention.init_state(attention.Config(**SIZES, window=5, kv_heads=2), 1)
  expected = r"initial_state\['k'\] has shape \(1, 4, 2, 6\), expected \(1, 3, 2, 6\)"
  with pytest.raises(ValueError, match=expected):
    mixer.apply({"params": params}, jnp.asarray(random_input(1)), state)
