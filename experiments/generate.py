"""Text from a trained model, token by token, at constant time and memory for each."""

import codecs
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from lm_models import lm


def check(config) -> None:
  """Raises UserError where a field of the group `sample` is out of its range."""
  limits = {
    "tokens": (config.tokens >= 0, "at least 0"),
    "temperature": (config.temperature >= 0, "at least 0"),
    "top_k": (config.top_k >= 0, "at least 0"),
    "top_p": (0 < config.top_p <= 1, "above 0 and at most 1"),
  }
  for field, (holds, allowed) in limits.items():
    if not holds:
      raise UserError(f"sample.{field} is {config[field]}, must be {allowed}")


def choose_token(logits, key, *, temperature: float, top_k: int, top_p: float):
  """One token for each row.

  Args:
    logits: [B vocab], float32.
    key: of the choice.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: only the k likeliest tokens; 0 is all of them.
    top_p: only the likeliest tokens whose probabilities first add up to p; Holtzman et al., "The
      Curious Case of Neural Text Degeneration", 2020.

  Returns:
    int32 [B].
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if 0 < top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
  model: lm.Config, params, prompt: np.ndarray, *, vocab_size: int, sample
) -> Iterator[int]:
  """Yields `sample.tokens` tokens that follow the prompt.

  Args:
    model: the model.
    params: its parameters.
    prompt: int32 token ids, at least one.
    vocab_size: ids at or above it, rows that only pad the embedding, are never chosen.
    sample: the config group with tokens, temperature, top_k, top_p and seed.
  """
  check(sample)
  choose = functools.partial(
    choose_token, temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p
  )

  def next_token(logits, key, i):
    return choose(logits[:, :vocab_size], jax.random.fold_in(key, i))

  @jax.jit
  def first(params, prompt, key):
    logits, state = lm.apply(model, params, prompt, lm.init_state(model, 1))
    return next_token(logits[:, -1], key, 0), state

  @functools.partial(jax.jit, donate_argnums=2)
  def following(params, token, state, key, i):
    logits, state = lm.decode_step(model, params, token, state)
    return next_token(logits, key, i), state

  key = jax.random.key(sample.seed)
  token, state = first(params, jnp.asarray(prompt, jnp.int32)[None], key)
  for i in range(1, sample.tokens + 1):
    # The next token is under way before this one is waited for.
    upcoming, state = following(params, token, state, key, i)
    yield int(token[0])
    token = upcoming


def text(tokens: Iterator[int], tokenizer) -> Iterator[str]:
  """Decodes a stream of tokens; ends at a document's end, holds back incomplete characters."""
  decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
  for token in tokens:
    if token == tokenizer.boundary:
      break
    yield decoder.decode(tokenizer.decode_bytes(token))
  yield decoder.decode(b"", final=True)
