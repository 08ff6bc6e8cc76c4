"""pLSTM on the Austen corpus.

python run.py --config=configs/austen_plstm.py
python run.py --config=configs/austen_plstm.py:small

Four copies of the state, which transitions mix: add --config.model.plstm.J=4.
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """Source, transition and mark gates for each head, of the size of austen_mamba.py."""
  config = austen_mamba.get_config()
  config.model.pattern = ("plstm",)
  config.model.plstm.H = 5
  config.model.plstm.mlp_width = 272
  return defaults.variant(config, arg, small=_small)


def _small(config):
  austen_mamba.small(config)
  config.model.plstm.H = 3
  config.model.plstm.mlp_width = 152
