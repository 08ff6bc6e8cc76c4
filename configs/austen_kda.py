"""Kimi Delta Attention on the Austen corpus.

python run.py --config=configs/austen_kda.py
python run.py --config=configs/austen_kda.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """The delta rule with a decay for each key channel, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("kda",)
  config.model.kda.H = 5
  config.model.kda.K = 64
  config.model.kda.mlp_width = 184
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.kda.H = 3
  config.model.kda.mlp_width = 64
