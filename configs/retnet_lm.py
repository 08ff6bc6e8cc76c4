"""A RetNet language model of a published size: 1b3.

python run.py --config=configs/retnet_lm.py:1b3 --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Sun et al., "Retentive Network", 2023: 1,351,727,104 parameters with 24 blocks of width 2048, eight
heads, values twice as wide as keys, and an MLP half as wide as usual.
"""

from configs import defaults, gla_lm


def get_config(arg=None):
  """RetNet, 1b3."""
  config = gla_lm.base("retnet")
  _size_1b3(config)
  return defaults.variant(config, arg, **{"1b3": _size_1b3})


def _size_1b3(config):
  config.model.D = 2048
  config.model.L = 24
  config.model.tied = False
  config.model.retnet.H = 8
