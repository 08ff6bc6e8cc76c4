"""RetNet on the Austen corpus.

python run.py --config=configs/austen_retnet.py
python run.py --config=configs/austen_retnet.py:small
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """Linear attention with rotary positions and constant decays, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("retnet",)
  config.model.D = 288
  config.model.L = 4
  config.model.retnet.H = 4
  config.model.retnet.mlp_width = 400
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.D = 160
  config.model.L = 3
  config.model.retnet.H = 5
  config.model.retnet.mlp_width = 240
