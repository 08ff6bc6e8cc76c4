"""Sampling: greedy is argmax, filters are their definitions, text ends where it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import generate
from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError
from lm_models import lm
from tests.lm_models.models import random_model
from tests.quick_compilation import quick_compilation as quick_compilation

PROMPT = np.array([1, 5, 2, 9, 9, 3], np.int32)


def make_sample(**fields):
  """The config group `sample`."""
  sample = {"tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
  return ConfigDict({**sample, **fields})


@pytest.fixture(scope="module")
def model():
  """A hybrid whose head is sharp enough for choices to differ and flat enough to be random."""
  return random_model("hybrid", tied=False)


def run(model, vocab_size=13, prompt=PROMPT, **fields):
  """The tokens that follow the prompt."""
  config, params = model
  sample = make_sample(**fields)
  return list(generate.generate(config, params, prompt, vocab_size=vocab_size, sample=sample))


def greedy_by_full_forwards(model, count, vocab_size=13):
  """The argmax after each longer prefix, forwarded anew each time; padded to one length."""
  config, params = model
  apply = jax.jit(functools.partial(lm.apply, config))
  tokens = list(PROMPT)
  for _ in range(count):
    row = np.zeros((1, 24), np.int32)
    row[0, : len(tokens)] = tokens
    logits, _ = apply(params, jnp.asarray(row))
    tokens.append(int(np.argmax(logits[0, len(tokens) - 1, :vocab_size])))
  return tokens[len(PROMPT) :]


def test_greedy_is_the_argmax_of_full_forwards(model):
  expected = greedy_by_full_forwards(model, 12)
  assert len(set(expected)) > 2
  assert run(model) == expected
  assert run(model, tokens=3) == expected[:3]
  assert run(model, temperature=5.0, top_k=1) == expected
  assert run(model, temperature=1.0, top_p=1e-6) == expected


def test_the_same_seed_makes_the_same_text(model):
  texts = [run(model, temperature=1.0, seed=seed, tokens=16) for seed in (0, 0, 1)]
  assert texts[0] == texts[1] != texts[2]


def test_no_tokens_and_a_prompt_of_one(model):
  assert run(model, tokens=0) == []
  assert len(run(model, prompt=PROMPT[:1], tokens=2)) == 2


def test_ids_beyond_the_tokenizer_are_never_chosen(model):
  config, params = model
  # The rows that only pad the embedding would be by far the likeliest.
  params = {**params, "head": params["head"].at[:, 9:].multiply(100.0)}
  assert max(run((config, params))) >= 9
  assert max(run((config, params), vocab_size=9)) < 9
  assert run((config, params), vocab_size=9) == greedy_by_full_forwards((config, params), 12, 9)
  assert max(run((config, params), vocab_size=9, temperature=3.0, top_k=4)) < 9


LOGITS = np.random.default_rng(0).standard_normal((3, 11)) * 2


def frequencies(temperature, top_k, top_p, draws=20_000):
  """How often each token is chosen for each row of LOGITS."""
  logits = jnp.asarray(LOGITS, jnp.float32)
  choose = functools.partial(
    generate.choose_token, temperature=temperature, top_k=top_k, top_p=top_p
  )
  keys = jax.random.split(jax.random.key(1), draws)
  chosen = np.asarray(jax.jit(jax.vmap(choose, (None, 0)))(logits, keys))
  assert chosen.dtype == np.int32
  return np.stack([np.bincount(row, minlength=11) for row in chosen.T]) / draws


def distribution(temperature, top_k, top_p):
  """What those frequencies should be, from the definitions."""
  rows = []
  for logits in LOGITS / temperature:
    kept = np.argsort(-logits)[: top_k or None]
    p = np.zeros(11)
    p[kept] = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    nucleus, total = np.zeros(11), 0.0
    for token in kept:  # the likeliest first, until they add up to top_p
      nucleus[token] = p[token]
      total += p[token]
      if total >= top_p:
        break
    rows.append(nucleus / nucleus.sum())
  return np.stack(rows)


@pytest.mark.parametrize(
  "temperature, top_k, top_p",
  [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 5, 0.8), (1.0, 99, 0.35)],
)
def test_filters_are_their_definitions(temperature, top_k, top_p):
  found = frequencies(temperature, top_k, top_p)
  expected = distribution(temperature, top_k, top_p)
  np.testing.assert_array_equal(found[expected == 0], 0)
  # Five standard deviations of a frequency of 20,000 draws.
  np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 20_000**0.5)
  assert (expected == 0).any() == (0 < top_k < 11 or top_p < 1)


def test_text_is_decoded_across_tokens_and_ends_at_the_boundary():
  tokenizer = ByteTokenizer()
  tokens = [*"naïve – 日本".encode(), tokenizer.boundary, *b"never"]
  pieces = list(generate.text(iter(tokens), tokenizer))
  assert "".join(pieces) == "naïve – 日本"
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
  # A character comes with its last byte, not before.
  assert pieces[:4] == ["n", "a", "", "ï"]


def test_text_that_stops_within_a_character():
  tokens = [*b"a", *"é".encode()[:1]]
  assert "".join(generate.text(iter(tokens), ByteTokenizer())) == "a\N{REPLACEMENT CHARACTER}"


def test_nothing_is_generated_after_the_boundary():
  def tokens():
    yield 256
    raise AssertionError("asked for a token after the end")

  assert "".join(generate.text(tokens(), ByteTokenizer())) == ""


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"tokens": -1}, "sample.tokens is -1, must be at least 0"),
    ({"temperature": -0.5}, "sample.temperature is -0.5, must be at least 0"),
    ({"temperature": float("nan")}, "sample.temperature is nan, must be at least 0"),
    ({"top_k": -3}, "sample.top_k is -3, must be at least 0"),
    ({"top_p": 0.0}, "sample.top_p is 0.0, must be above 0 and at most 1"),
    ({"top_p": 1.5}, "sample.top_p is 1.5, must be above 0 and at most 1"),
  ],
)
def test_fields_out_of_range(fields, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    generate.check(make_sample(**fields))


def test_fields_in_range():
  generate.check(make_sample(tokens=0, temperature=0.0, top_k=0, top_p=1.0))
