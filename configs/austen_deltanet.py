"""DeltaNet on the Austen corpus.

python run.py --config=configs/austen_deltanet.py
python run.py --config=configs/austen_deltanet.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """Linear attention that writes by the delta rule, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("deltanet",)
  config.model.deltanet.H = 5
  config.model.deltanet.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.deltanet.H = 3
  config.model.deltanet.mlp_width = 152
