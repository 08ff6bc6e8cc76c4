"""Which cells does the arrow point at? Trained on 8 x 8 cells, evaluated on 16 x 16 too.

python run.py --config=configs/plstm_rays.py
python run.py --config=configs/plstm_rays.py:vit

Minutes on a laptop's CPU. `vit` is a vision transformer of the same size; `p` and `d` are pLSTMs
with one kind of block. The metric is F1 over cells: validation/f1/8 and validation/f1/16.
"""

from configs import vision_defaults


def get_config(arg=None):
  """A P block and a D block of pLSTM, without a position embedding."""
  config = vision_defaults.get_config()
  config.data.name = "rays"
  config.data.side = 8
  config.model.patch = 1
  config.model.channels = 5
  config.model.outputs = 2
  config.model.pooling = "none"
  config.model.D = 48
  config.model.L = 2
  config.model.unroll = 2
  config.model.position_embedding = False
  config.model.init_variance = 1.0
  config.model.plstm_p.transition_activation = "squared_tanh"
  config.model.plstm_p.gate_inputs = config.model.plstm_d.gate_inputs = "all"
  config.optim.learning_rate = 3e-3
  config.schedule.warmup_steps = 200
  config.train.steps = 1200
  config.train.batch_size = 32
  config.eval.lengths = (8, 16)
  config.eval.batch_size = 64
  config.eval.every_steps = 300
  config.checkpoint.every_steps = 300
  return vision_defaults.variant(config, arg, vit=_vit, p=_only("p"), d=_only("d"))


def _vit(config):
  config.model.pattern = ("attention",)
  config.model.position_embedding = True
  config.model.grid = (8, 8)
  config.model.position_scale = 0.3


def _only(mode):
  def change(config):
    config.model.pattern = (f"plstm_{mode}",)

  return change
