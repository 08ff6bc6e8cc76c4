"""Parity of 100 bits by a nonlinear recurrence that is trained in parallel, evaluated at 1600 too.

python run.py --config=configs/pararnn_parity.py
python run.py --config=configs/pararnn_parity.py:linear

Minutes on a laptop's CPU: one layer of ParaGRU cells alone, without convolution, gate or MLP, every
prefix's parity a target. States are solved by Newton's method in four iterations, within the box
that they cannot leave. `linear` is gated linear attention in the place of the cell, a recurrence of
positive decays, which cannot count modulo two.
"""

from configs import defaults


def get_config(arg=None):
  """A layer of 64 ParaGRU cells between an embedding and a head."""
  config = defaults.get_config()
  config.data.name = "parity"
  config.data.T = 100
  config.model.vocab_size = 2
  config.model.D = 64
  config.model.L = 1
  config.model.tied = False
  config.model.pattern = ("paragru",)
  config.model.paragru.H = 1
  config.model.paragru.bare = True
  config.model.paragru.mode = "newton"
  config.model.paragru.recurrent_clip = None
  config.model.paragru.residual_scale = False
  config.model.paragru.mlp_width = 0
  config.optim.learning_rate = 3e-3
  config.schedule.name = "constant"
  config.schedule.warmup_steps = 0
  config.train.steps = 800
  config.train.batch_size = 64
  # The loss falls off a cliff when the rule is found, and gradients are large at its edge.
  config.train.spike_sigma = 0.0
  config.eval.lengths = (100, 1600)
  config.eval.every_steps = 400
  config.checkpoint.every_steps = 400
  return defaults.variant(config, arg, linear=_linear)


def _linear(config):
  config.model.pattern = ("gla",)
  config.model.gla.mlp_width = 0
