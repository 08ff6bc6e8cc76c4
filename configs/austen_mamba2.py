"""Mamba-2 on the Austen corpus.

python run.py --config=configs/austen_mamba2.py
python run.py --config=configs/austen_mamba2.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """State-space duality with heads of 64 channels, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("mamba2",)
  config.model.mamba2.N = 80
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.mamba2.N = 32
