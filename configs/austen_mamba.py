"""A Mamba of 4.1M parameters on the Austen corpus, for one GPU or a patient CPU.

python run.py --config=configs/austen_mamba.py
"""

from configs import defaults


def get_config(arg=None):
  """Mamba, with documents streamed through consecutive batches and the state carried along."""
  config = defaults.get_config()
  config.data.mode = "streaming"
  config.data.T = 512
  config.model.D = 320
  config.model.L = 6
  config.train.steps = 3000
  config.train.batch_size = 16
  config.schedule.warmup_steps = 100
  config.optim.learning_rate = 2e-3
  config.eval.T = 1024
  return defaults.variant(config, arg)
