"""A transformer with rotary positions on the Austen corpus: the baseline.

python run.py --config=configs/austen_transformer.py
python run.py --config=configs/austen_transformer.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """Causal softmax attention and gated MLPs, of the size of austen_mamba.py, on the same
  batches."""
  config = austen_mamba.get_config()
  config.model.pattern = ("attention",)
  config.model.attention.H = 5
  config.model.attention.context = 512
  config.model.attention.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.attention.H = 3
  config.model.attention.context = 256
  config.model.attention.mlp_width = 160
