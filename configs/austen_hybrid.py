"""Mamba with a sliding-window attention layer after every two, on the Austen corpus.

python run.py --config=configs/austen_hybrid.py
python run.py --config=configs/austen_hybrid.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """A hybrid of the size of austen_mamba.py, on the same batches."""
  config = austen_mamba.get_config()
  config.model.pattern = ("mamba", "mamba", "sliding_attention")
  config.model.sliding_attention.H = 5
  config.model.sliding_attention.window = 128
  config.model.sliding_attention.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.L = 3
  config.model.sliding_attention.H = 3
  config.model.sliding_attention.mlp_width = 568
