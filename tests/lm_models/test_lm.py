"""The whole model: equal to a float64 loop over documents; its states, its gradients, its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_models import layers, lm
from tests.lm_models import oracle
from tests.lm_models.models import (
  PATTERNS,
  SEGMENT_IDS,
  random_model,
  random_params,
  random_tokens,
)
from tests.quick_compilation import quick_compilation as quick_compilation

TOKENS = jnp.asarray(random_tokens(SEGMENT_IDS.shape))
IDS = jnp.asarray(SEGMENT_IDS)
COTANGENT = np.random.default_rng(5).standard_normal((*TOKENS.shape, 13))
COTANGENT *= (SEGMENT_IDS >= 0)[..., None]


class Small:
  """A small model, compiled once for whole rows and once for rows with documents in them."""

  def __init__(self, kind):
    self.kind = kind
    # The head is the embedding in one of two models.
    self.config, self.params = random_model(kind, tied=kind in ("hybrid", "transformer"))
    self.apply = jax.jit(functools.partial(lm.apply, self.config))

  @functools.cached_property
  def packed(self):
    """Logits, state and gradients of rows that hold documents and padding."""

    @jax.jit
    def run(params):
      def loss(params):
        logits, state = lm.apply(self.config, params, TOKENS, None, IDS)
        return jnp.sum(logits * COTANGENT), (logits, state)

      (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
      return *aux, gradients

    return run(self.params)

  @functools.cached_property
  def whole(self):
    """Logits and state of rows that are one document each."""
    return self.apply(self.params, TOKENS)

  def truth(self, params, ids=SEGMENT_IDS):
    """The oracle's logits."""
    pattern, _ = PATTERNS[self.kind]
    configs = dict(zip(self.config.names, self.config.mixers))
    document = lambda tokens: oracle.language_model(
      params, np.asarray(tokens), pattern, configs=configs, epsilon=self.config.norm_epsilon
    )
    return oracle.by_document(document, TOKENS, ids)


@pytest.fixture(scope="module", params=list(PATTERNS))
def small(request):
  """Each small model in turn."""
  return Small(request.param)


def close(got, truth, tolerance=1e-4):
  """Asserts equality up to float32's rounding of numbers as large as the largest."""
  np.testing.assert_allclose(got, truth, atol=tolerance * np.abs(truth).max())


def test_whole_rows_equal_the_oracle(small):
  logits, _ = small.whole
  assert logits.dtype == jnp.float32
  close(logits, small.truth(oracle.to_float64(small.params), np.zeros_like(SEGMENT_IDS)))


def test_packed_and_padded_rows_equal_each_document_alone(small):
  logits, _, _ = small.packed
  real = SEGMENT_IDS >= 0
  close(logits[real], small.truth(oracle.to_float64(small.params))[real])
  assert np.isfinite(logits).all()


def test_gradients_of_packed_and_padded_rows(small):
  """Of every parameter, against central differences of the oracle."""
  loss = lambda params: np.sum(small.truth(params) * COTANGENT)
  oracle.check_gradient(loss, small.params, small.packed[2], tolerance=5e-4)


def test_prefill_then_steps_equal_the_whole(small):
  step = jax.jit(functools.partial(lm.decode_step, small.config))
  empty = lm.init_state(small.config, len(TOKENS))
  logits, state = small.apply(small.params, TOKENS[:, :6], empty, jnp.zeros_like(IDS[:, :6]))
  parts = [logits]
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), empty
  )
  for t in range(6, 12):
    logits, state = step(small.params, TOKENS[:, t], state)
    parts.append(logits[:, None])
  close(jnp.concatenate(parts, 1), small.whole[0])
  jax.tree.map(lambda a, b: close(a, b, 1e-4) if a.dtype != bool else None, state, small.whole[1])


def test_split_and_carry_equals_the_whole_across_documents(small):
  empty = lm.init_state(small.config, len(TOKENS))
  logits, state = small.apply(small.params, TOKENS[:, :6], empty, IDS[:, :6])
  # A new document at the split itself is for the caller to see: keep_state makes it start afresh.
  ids = IDS[:, 6:]
  rest, _ = small.apply(small.params, TOKENS[:, 6:], state, ids)
  got, real = jnp.concatenate([logits, rest], 1), SEGMENT_IDS >= 0
  continued = np.ones(5, bool)
  continued[1] = False  # its second half begins with another document
  real = real & continued[:, None]
  close(got[real], small.packed[0][real])
  rest, _ = small.apply(
    small.params, TOKENS[:, 6:], lm.keep_state(state, jnp.asarray(continued)), ids
  )
  close(rest[1], small.packed[0][1, 6:])


def test_keep_state_forgets_even_what_is_not_a_number(small):
  state = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), lm.init_state(small.config, 3))
  kept = lm.keep_state(state, jnp.array([True, False, True]))
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(kept)):
    np.testing.assert_array_equal(new[:, 1], 0)
    np.testing.assert_array_equal(new[:, ::2], old[:, ::2])


def test_no_token_hears_of_later_ones_or_of_other_documents():
  """The gradient there is zero, exactly; and not zero where it may be otherwise."""
  config, params = random_model("three", tied=False)
  tokens = jnp.arange(12, dtype=jnp.int32)[None]  # each row of the embedding is one place
  ids = np.array([[0] * 7 + [1] * 5], np.int32)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None))
  def influence(t, ids):
    def logit(embedding):
      logits, _ = lm.apply(config, {**params, "embedding": embedding}, tokens, None, ids)
      return jnp.sum(logits[0, t] * COTANGENT[0, 0])

    return jnp.abs(jax.grad(logit)(params["embedding"])).max(-1)[:12]

  earlier = np.tril(np.ones((12, 12), bool))
  for row in (np.zeros_like(ids), ids):
    found = np.asarray(influence(jnp.arange(12), row)) != 0
    np.testing.assert_array_equal(found, earlier & (row[0][:, None] == row[0]))


@pytest.mark.parametrize("kind", ["hybrid", "transformer"])
def test_bfloat16_follows_float32(kind):
  config, params = random_model(kind, dtype="bfloat16", tied=kind == "hybrid")
  exact, _ = random_model(kind, tied=kind == "hybrid")
  apply = lambda c: jax.jit(functools.partial(lm.apply, c))(params, TOKENS, None, IDS)
  logits, state = apply(config)
  expected, _ = apply(exact)
  assert logits.dtype == jnp.float32
  types = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
  assert types - {"bool"} <= {"bfloat16", "float32"} and "bfloat16" in types
  error = np.abs(logits - expected)[SEGMENT_IDS >= 0]
  assert 1e-4 < error.mean() < 0.05 * np.std(expected)


def test_initial_parameters_differ_between_repeats_and_start_as_configured():
  config = lm.make_config(D=32, L=8, pattern=("attention",), vocab_size=100, embedding_scale=0.3)
  params = jax.jit(functools.partial(lm.init, config))(jax.random.key(0))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
  assert abs(np.std(params["embedding"]) - 0.3) < 0.02
  block = params["blocks"]["0_attention"]
  for kernel, scale in (
    (block["mixer"]["query_proj"], 0.02),
    (block["mixer"]["key_proj"], 0.02),
    (block["mixer"]["value_proj"], 0.02),
    (block["mixer"]["out_proj"], 0.02 / 4),
    (block["mlp"]["in_proj"], 0.02),
    (block["mlp"]["out_proj"], 0.02 / 4),
  ):
    values = np.asarray(kernel["kernel"])
    assert abs(values.std() / scale - 1) < 0.05
    repeats = values.reshape(8, -1)
    assert np.abs(np.corrcoef(repeats) - np.eye(8)).max() < 0.2
  np.testing.assert_array_equal(block["norm"]["scale"], 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_and_mlp(dtype):
  x = jnp.asarray(5 * np.random.default_rng(0).standard_normal((2, 3, 8)), jnp.float32)
  for module, truth in (
    (layers.RMSNorm(1e-2, dtype), lambda p, x: oracle.rms_norm(p, x, 1e-2)),
    (layers.GatedMLP(12, dtype), oracle.gated_mlp),
  ):
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    y = module.apply({"params": params}, x)
    assert y.dtype == dtype
    exact = oracle.to_float64(params)
    expected = np.stack([truth(exact, row) for row in np.float64(x)])
    close(np.asarray(y, np.float64), expected, 1e-5 if dtype == "float32" else 2e-2)


def test_norm_of_zeros_is_zero_with_a_finite_gradient():
  norm = layers.RMSNorm()
  apply = lambda x: norm.apply({"params": {"scale": jnp.ones(4)}}, x).sum()
  value, gradient = jax.value_and_grad(apply)(jnp.zeros(4))
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("D, width", [(96, 256), (384, 1024), (385, 1280), (1024, 2816)])
def test_mlp_width(D, width):
  assert layers.gated_mlp_width(D) == width


@pytest.mark.parametrize("chunk", [1, 5, 99])
def test_cross_entropy_in_chunks_is_that_of_the_logits(chunk):
  """Values and gradients, and chunks that do not divide the length."""
  config, params = random_model("transformer", tied=chunk == 5, loss_chunk=chunk)
  targets = jnp.roll(TOKENS, 3, axis=1)

  @jax.jit
  def both(params):
    logits, _ = lm.apply(config, params, TOKENS, None, IDS)
    chosen = jnp.sum(jax.nn.one_hot(targets, 13) * jax.nn.log_softmax(logits), -1)
    plain = jax.grad(
      lambda p: (
        -jnp.sum(
          jax.nn.one_hot(targets, 13)
          * jax.nn.log_softmax(lm.apply(config, p, TOKENS, None, IDS)[0])
        )
      )
    )(params)
    nats, _ = lm.token_nats(config, params, TOKENS, targets, None, IDS)
    chunked = jax.grad(lambda p: jnp.sum(lm.token_nats(config, p, TOKENS, targets, None, IDS)[0]))(
      params
    )
    return -chosen, nats, plain, chunked

  expected, nats, plain, chunked = both(params)
  assert nats.shape == TOKENS.shape and nats.dtype == jnp.float32
  close(nats, expected, 1e-5)
  jax.tree.map(lambda got, truth: close(got, truth, 2e-5), chunked, plain)


def test_chunks_of_cross_entropy_keep_less_for_the_backward_pass():
  def kept(chunk):
    config, params = random_model("transformer", vocab_size=5000, loss_chunk=chunk)
    loss = lambda p: jnp.sum(lm.token_nats(config, p, TOKENS, TOKENS)[0])
    residuals = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

  logits = TOKENS.size * 5000 * 4
  assert kept(0) - kept(3) > 0.9 * logits
