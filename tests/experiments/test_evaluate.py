"""Evaluation against a direct computation over each document, alone and whole."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models, sharding
from experiments.data import datasets
from experiments.errors import UserError
from experiments.evaluate import Evaluator
from lm_models import lm
from tests.experiments.small import make_config
from tests.lm_models.models import random_params
from tests.quick_compilation import quick_compilation as quick_compilation

BOUNDARY = 256
LONGEST = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder of texts of many lengths (one a single byte), and the documents as they are read."""
  root = tmp_path_factory.mktemp("evaluation")
  folder = root / "texts"
  folder.mkdir()
  generator = np.random.default_rng(0)
  lengths = [LONGEST - 1, 1, 17, 8, 7, 30]
  texts = [bytes(generator.integers(97, 123, n).astype(np.uint8)) for n in lengths]
  for i, text in enumerate(texts):
    (folder / f"{i:02}.txt").write_bytes(text)
  # Two bytes of the longest become the folder's own validation and test splits.
  read = datasets.open_texts(experiment(root).data, "train")[0]
  found = [read[i] for i in range(len(read))]
  assert sorted(len(text) for text in found) == sorted([LONGEST - 3, *lengths[1:]])
  assert all(text.startswith(part) for text, part in zip(texts, found))
  return root, found


def experiment(root, **fields):
  """A hybrid that reads the corpus: a state for each kind of mixer."""
  return make_config(
    ("mamba", "sliding_attention"),
    model__vocab_size=264,
    data__name="folder",
    data__directory=str(root / "texts"),
    data__cache_directory=str(root / "cache"),
    data__validation_split="train",
    **fields,
  )


@pytest.fixture(scope="module")
def params(corpus):
  """Random parameters, with which position and context matter."""
  model = models.language_model(experiment(corpus[0]))
  return random_params(jax.eval_shape(functools.partial(lm.init, model), jax.random.key(0)))


def evaluate(corpus, params, max_tokens=0, **fields):
  """What the Evaluator finds."""
  config = experiment(corpus[0], **fields)
  config.eval.final_max_tokens = max_tokens
  mesh = sharding.make_mesh(config.mesh)
  return Evaluator(config, mesh)(params, "validation")


@pytest.fixture(scope="module")
def nats(corpus, params):
  """Function of the tokens after which the state is dropped -> (position, nats) of every target."""
  model = models.language_model(experiment(corpus[0]))
  # One shape for every piece: padded on the right, which does not change what comes before.
  apply = jax.jit(functools.partial(lm.apply, model))

  def of_piece(stream):
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(stream) - 1] = stream[:-1]
    logits = np.asarray(apply(params, jnp.asarray(row))[0][0], np.float64)[: len(stream) - 1]
    top = logits.max(-1)
    normaliser = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return normaliser - logits[np.arange(len(logits)), stream[1:]]

  def of_corpus(length=LONGEST):
    found = []
    for text in corpus[1]:
      stream = [BOUNDARY, *text, BOUNDARY]
      for begin in range(0, len(stream) - 1, length):
        piece = stream[begin : begin + length + 1]
        found += [(begin + i, value) for i, value in enumerate(of_piece(piece))]
    return np.array(found)

  return of_corpus


def bits_per_byte(corpus, values):
  """Of all targets' nats, every byte and one boundary a document."""
  return values.sum() / math.log(2) / sum(map(len, corpus[1]))


@pytest.fixture(scope="module")
def truth(nats):
  """Positions and nats of all targets, each document whole."""
  positions, values = nats().T
  return positions.astype(int), values


@pytest.mark.parametrize(
  "batch_size, T, mesh", [(2, 7, 1), (3, 64, 1), (1, 16, 1), (4, 5, 4), (8, 3, 1)]
)
def test_equals_the_documents_computed_whole(corpus, params, truth, batch_size, T, mesh):
  positions, values = truth
  found = evaluate(corpus, params, eval__batch_size=batch_size, eval__T=T, mesh__data=mesh)
  assert found.tokens == len(values) == sum(len(text) + 1 for text in corpus[1])
  assert found.bits_per_byte == pytest.approx(bits_per_byte(corpus, values), rel=1e-5)
  # By position: each power of two, and nothing left over.
  per_token = len(values) / sum(map(len, corpus[1])) / math.log(2)
  for (first, last, tokens, bits), i in zip(found.by_position, range(99)):
    assert (first, last) == (2**i - 1, 2 ** (i + 1) - 2)
    inside = (positions >= first) & (positions <= last)
    assert tokens == inside.sum()
    assert bits == pytest.approx(values[inside].mean() * per_token, rel=1e-5)
  assert found.by_position[-1][1] >= positions.max()
  assert sum(tokens for _, _, tokens, _ in found.by_position) == found.tokens


def test_without_carried_state_every_piece_stands_alone(corpus, params, truth, nats):
  # One document a row, so that a row is cut every T tokens of its document.
  found = evaluate(
    corpus, params, eval__batch_size=6, eval__T=8, eval__carry_state=False, mesh__data=1
  )
  _, alone = nats(8).T
  assert found.bits_per_byte == pytest.approx(bits_per_byte(corpus, alone), rel=1e-5)
  assert abs(found.bits_per_byte / bits_per_byte(corpus, truth[1]) - 1) > 1e-3
  assert found.tokens == len(alone)


def test_max_tokens_reads_the_beginning(corpus, params, truth):
  found = evaluate(corpus, params, max_tokens=20, eval__batch_size=2, eval__T=7)
  assert found.tokens == 20
  per_token = len(truth[1]) / sum(map(len, corpus[1])) / math.log(2)
  # The stream begins with the first document, longer than that.
  assert found.bits_per_byte == pytest.approx(truth[1][:20].mean() * per_token, rel=1e-5)


def test_rows_that_devices_do_not_divide(corpus):
  with pytest.raises(UserError, match=r"eval.batch_size is 6, must be a multiple of .* = 4$"):
    evaluate(corpus, None, eval__batch_size=6, mesh__data=4)
