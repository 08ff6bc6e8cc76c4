"""Gated DeltaNet on the Austen corpus.

python run.py --config=configs/austen_gated_deltanet.py
python run.py --config=configs/austen_gated_deltanet.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """The delta rule with a decay for each head, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("gated_deltanet",)
  config.model.gated_deltanet.H = 5
  config.model.gated_deltanet.K = 32
  config.model.gated_deltanet.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.gated_deltanet.H = 3
  config.model.gated_deltanet.mlp_width = 152
