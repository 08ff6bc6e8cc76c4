"""A small Mamba learns English from four of Jane Austen's novels, on a laptop's CPU, in minutes.

python run.py --config=configs/quickstart.py
"""

from configs import defaults


def get_config(arg=None):
  """The quickstart; `tiny` is seconds."""
  config = defaults.get_config()
  return defaults.variant(config, arg)
