"""DeltaNet language models by size: 130m, 340m, 1b3.

python run.py --config=configs/deltanet_lm.py:340m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024: 1b3
(1,365,677,056 parameters) is theirs; 340m (341,594,112, tied) and 130m (109,697,280, tied) are of
the same proportions. The paper's hybrids are these with another pattern:

  --config.model.pattern="('deltanet','sliding_attention')"
"""

from configs import defaults, gla_lm


def get_config(arg=None):
  """DeltaNet at the size that `arg` names; 130m where it names none."""
  config = gla_lm.base("deltanet")
  sizes = {
    "130m": lambda config: _size(config, 768, 12, 6, tied=True),
    "340m": lambda config: _size(config, 1024, 24, 8, tied=True),
    "1b3": lambda config: _size(config, 2048, 24, 16, tied=False),
  }
  sizes["130m"](config)
  return defaults.variant(config, arg, **sizes)


def _size(config, D, L, H, tied):
  config.model.D = D
  config.model.L = L
  config.model.tied = tied
  config.model.deltanet.H = H
