"""Training speed of a small Mamba, here and in Hugging Face transformers, side by side.

python -m experiments.benchmark --training     needs torch and transformers
"""

import contextlib
import functools
import io
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import workspace
from experiments.errors import UserError
from lm_models import lm

B, T, D, L, N, VOCAB = 4, 128, 256, 4, 16, 264
ROUNDS = 15
LEARNING_RATE = 1e-3


def compare_training() -> list[dict]:
  """Times whole training steps (forward, backward, AdamW) of models of one size, in turn.

  Returns:
    One row for each model: name, parameters, median ms a step, tokens per second.

  Raises:
    UserError: torch or transformers is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(f"--training needs {error.name}: pip install torch transformers") from None
  transformers.logging.set_verbosity_error()
  sizes = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": L, "state_size": N}
  heads = {"num_heads": 2 * D // 64, "head_dim": 64, "n_groups": 1, "chunk_size": 64}
  models = {
    "recurrax mamba": _ours(),
    "transformers MambaForCausalLM": _theirs(
      torch, transformers.MambaForCausalLM, transformers.MambaConfig(**sizes)
    ),
    f"transformers Mamba2ForCausalLM N={N}": _theirs(
      torch, transformers.Mamba2ForCausalLM, transformers.Mamba2Config(**sizes, **heads)
    ),
    "transformers Mamba2ForCausalLM N=128": _theirs(
      torch,
      transformers.Mamba2ForCausalLM,
      # The state size that Mamba-2 was published with.
      transformers.Mamba2Config(**{**sizes, **heads, "state_size": 128}),
    ),
  }
  times: dict[str, list[float]] = {name: [] for name in models}
  for round_ in range(ROUNDS + 2):
    for name, (_, step) in models.items():
      began = time.perf_counter()
      step()
      # The first two rounds compile and warm up.
      if round_ >= 2:
        times[name].append(time.perf_counter() - began)
  versions = {
    **workspace.versions(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  return [
    {
      "model": name,
      "parameters": models[name][0],
      "ms": 1e3 * float(np.median(seconds)),
      "tokens_per_second": B * T / float(np.median(seconds)),
      "B": B,
      "T": T,
      "versions": versions,
    }
    for name, seconds in times.items()
  ]


def table(rows: Sequence[dict]) -> str:
  """The rows as a person reads them, with the first model's advantage over each."""
  lines = [f"{'model':<42}{'parameters':>12}{'ms a step':>12}{'tokens/s':>12}{'ours is':>10}"]
  for row in rows:
    ratio = rows[0]["tokens_per_second"] / row["tokens_per_second"]
    lines.append(
      f"{row['model']:<42}{row['parameters']:>12,}{row['ms']:>12.1f}"
      f"{row['tokens_per_second']:>12,.0f}{ratio:>9.2f}x"
    )
  return "\n".join(lines)


def _ours() -> tuple[int, Callable[[], None]]:
  model = lm.make_config(vocab_size=VOCAB, D=D, L=L, unroll=L, mamba={"N": N})
  optimizer = optax.adamw(LEARNING_RATE)
  tokens = jnp.asarray(_tokens())

  @jax.jit
  def init(key):
    params = lm.init(model, key)
    return params, optimizer.init(params)

  def loss(params):
    return jnp.mean(lm.token_nats(model, params, tokens[:, :-1], tokens[:, 1:])[0])

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  carried = [*init(jax.random.key(0)), None]

  def step():
    carried[:] = train(*carried[:2])
    jax.block_until_ready(carried)

  return lm.parameter_count(model), step


def _theirs(torch, model_class, config) -> tuple[int, Callable[[], None]]:
  # Both models announce at length that their CUDA kernels are missing.
  with contextlib.redirect_stderr(io.StringIO()):
    model = model_class(config)
  optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
  tokens = torch.tensor(_tokens(), dtype=torch.long)

  def step():
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    value = torch.nn.functional.cross_entropy(
      logits.reshape(-1, VOCAB).float(), tokens[:, 1:].reshape(-1)
    )
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

  return sum(p.numel() for p in model.parameters()), step


def _tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 257, (B, T + 1)).astype(np.int32)
