"""A small Mamba learns English from four of Jane Austen's novels, on a laptop's CPU, in minutes.

python run.py --config=configs/quickstart.py
"""

from configs import defaults


def get_config(arg=None):
  """The quickstart; `tiny` is seconds."""
  config = defaults.get_config()
  config.model.D = 128
  config.model.L = 6
  config.model.unroll = 6  # compiles for longer, and runs a third faster on a CPU
  config.model.mamba.N = 4
  config.optim.name = "muon"
  config.optim.learning_rate = 1e-2
  config.train.steps = 540
  config.eval.every_steps = 180
  config.checkpoint.every_steps = 60
  return defaults.variant(config, arg)
