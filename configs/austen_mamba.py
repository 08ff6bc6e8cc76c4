"""A Mamba of 4.1M parameters on the Austen corpus, for one GPU or a patient CPU.

python run.py --config=configs/austen_mamba.py
python run.py --config=configs/austen_mamba.py:small

Each austen_<model>.py has the same number of parameters, data, steps, batch and optimizer as this
one. `small` is a model of a million parameters and a run of minutes on a laptop's CPU, likewise the
same for each.
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
  return defaults.variant(config, arg, small=small)


def small(config):
  """What `small` means for every model: a width that suits about a million parameters, and the
  run."""
  config.data.T = 256
  config.model.D = 192
  config.model.L = 4
  config.model.unroll = 4  # compiles for longer, and runs faster on a CPU
  config.model.mamba.N = 4
  config.optim.name = "muon"
  config.optim.learning_rate = 1e-2
  config.schedule.warmup_steps = 20
  config.train.steps = 300
  config.train.batch_size = 8
  config.eval.every_steps = 150
  config.eval.T = 512
  config.eval.max_tokens = 32768
  config.checkpoint.every_steps = 100
