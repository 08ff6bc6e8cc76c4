"""The published Mamba-2 language models, by size: 130m, 370m, 780m, 1b3, 2b7.

python run.py --config=configs/mamba2_lm.py:130m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Dao and Gu, "Transformers are SSMs", 2024: 128,989,632, 368,346,624, 780,161,280, 1,343,757,312 and
2,702,599,680 parameters with tied embeddings of 50,288 rows.
"""

from configs import defaults, mamba_lm


def get_config(arg=None):
  """Mamba-2 at the size that `arg` names; 130m where it names none."""
  config = mamba_lm.get_config()
  config.model.pattern = ("mamba2",)
  config.model.vocab_size = 50288
  sizes = {
    "130m": lambda config: _size(config, 768, 24, 3e-3),
    "370m": lambda config: _size(config, 1024, 48, 1.5e-3),
    "780m": lambda config: _size(config, 1536, 48, 1.25e-3),
    "1b3": lambda config: _size(config, 2048, 48, 1e-3),
    "2b7": lambda config: _size(config, 2560, 64, 8e-4),
  }
  sizes["130m"](config)
  return defaults.variant(config, arg, **sizes)


def _size(config, D, L, learning_rate):
  config.model.D = D
  config.model.L = L
  config.optim.learning_rate = learning_rate
