"""Does the arrow point at the disc? Trained on 192 x 192 pixels, evaluated on 384 x 384 too.

python run.py --config=configs/plstm_arrow.py:d

For one GPU: the arrow-pointing extrapolation of "pLSTM: parallelizable Linear Source Transition
Mark networks" (arXiv 2506.11997), with its sizes, data and optimizer. Without an argument P and D
blocks alternate; `d` and `p` have one kind, `vit` is a vision transformer of the same size. The
paper trains for 39,050 steps, which is what the schedule is made for. `tokens` is the same question
about 8 x 8 tokens, one of which holds the arrow and one the disc, for a patient CPU; `tokens_vit`
the transformer for it.
"""

from configs import vision_defaults


def get_config(arg=None):
  """pLSTM-Vis of the size T: 12 blocks of width 192, patches of 16 pixels."""
  config = vision_defaults.get_config()
  config.data.name = "arrow"
  config.data.side = 192
  config.data.examples = 100_000
  config.model.grid = (12, 12)
  config.model.outputs = 2
  config.model.dtype = "bfloat16"
  for name in ("plstm_p", "plstm_d", "attention"):
    config.model[name].H = 6
  config.optim.learning_rate = 1e-4
  config.optim.epsilon = 1e-8
  config.schedule.warmup_steps = 781
  config.schedule.final_fraction = 1e-3
  config.train.steps = 39_050
  config.train.batch_size = 128
  config.eval.lengths = (192, 384)
  config.eval.batch_size = 128
  config.eval.examples = 5120
  config.eval.every_steps = 1000
  config.checkpoint.every_steps = 1000
  config.log.every_steps = 50
  return vision_defaults.variant(
    config,
    arg,
    vit=_vit,
    p=_only("p"),
    d=_only("d"),
    tokens=_tokens,
    tokens_vit=_tokens_vit,
    tiny=_tiny,
  )


def _vit(config):
  config.model.pattern = ("attention",)
  config.model.pooling = "mean"
  config.optim.learning_rate = 3e-4


def _tokens(config):
  config.data.name = "arrow_tokens"
  config.data.side, config.data.examples = 8, 0
  config.model.patch, config.model.channels = 1, 7
  config.model.grid = (8, 8)
  config.model.D, config.model.L = 48, 4
  config.model.unroll = 2
  config.model.position_embedding = False
  config.model.dtype = "float32"
  for name in ("plstm_p", "plstm_d", "attention"):
    config.model[name].H = 3
  config.optim.learning_rate = 1e-3
  config.schedule.warmup_steps = 100
  config.train.steps = 5000
  config.train.batch_size = 64
  config.eval.lengths = (8, 16)
  config.eval.examples = 2048
  config.eval.every_steps = 500
  config.checkpoint.every_steps = 500


def _tokens_vit(config):
  _tokens(config)
  config.model.pattern = ("attention",)
  config.model.position_embedding = True
  config.model.pooling = "mean"


def _only(mode):
  def change(config):
    config.model.pattern = (f"plstm_{mode}",)

  return change


def _tiny(config):
  vision_defaults.tiny(config)
  config.model.patch = 32
  config.model.grid = (6, 6)
  config.eval.lengths = (192, 256)
  # Where a gradient is nearly zero, Adam's step has the size of others and the sign of rounding.
  config.optim.epsilon = 1e-3
