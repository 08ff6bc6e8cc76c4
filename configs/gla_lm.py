"""Gated linear attention language models by size: 130m, 340m, 1b3.

python run.py --config=configs/gla_lm.py:340m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Yang et al., "Gated Linear Attention Transformers", 2023: 340m (341,707,776 parameters, tied) and
1b3 (1,365,514,240) are theirs; 130m (109,757,952, tied) is of the same proportions. Trained there
on 2048 tokens a row, half a million tokens a step, 15 billion in all; 1b3 on 100 billion.
"""

from configs import defaults, mamba_lm


def get_config(arg=None):
  """GLA at the size that `arg` names; 130m where it names none."""
  config = base("gla")
  sizes = {
    "130m": lambda config: _size(config, 768, 12, tied=True),
    "340m": lambda config: _size(config, 1024, 24, tied=True),
    "1b3": lambda config: _size(config, 2048, 24, tied=False),
  }
  sizes["130m"](config)
  return defaults.variant(config, arg, **sizes)


def base(name):
  """What the published models with a matrix state and an MLP have in common.

  Args:
    name: of the architecture, in a pattern.
  """
  config = mamba_lm.get_config()
  config.model.pattern = (name,)
  config.model.vocab_size = 32000
  config.model.norm_epsilon = 1e-6
  config.optim.learning_rate = 3e-4
  config.optim.weight_decay = 0.01
  config.schedule.warmup_steps = 1000
  config.schedule.final_fraction = 0.1
  config.train.steps = 28600
  return config


def _size(config, D, L, tied):
  config.model.D = D
  config.model.L = L
  config.model.tied = tied
  config.model.gla.H = 4
