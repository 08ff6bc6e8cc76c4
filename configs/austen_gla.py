"""Gated linear attention on the Austen corpus.

python run.py --config=configs/austen_gla.py
python run.py --config=configs/austen_gla.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """Linear attention with a decay for each key channel, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("gla",)
  config.model.gla.H = 5
  config.model.gla.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.gla.H = 3
  config.model.gla.mlp_width = 152
