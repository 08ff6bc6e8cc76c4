"""Every field of an experiment on images: those of defaults.py, with a vision model in `model`."""

from ml_collections import ConfigDict, config_dict

from configs import defaults


def get_config(arg=None):
  """The fields and their defaults. `tiny` shrinks the model and the run to seconds on a laptop."""
  config = defaults.get_config()

  config.model = model = ConfigDict()
  model.patch = 16  # side of a patch, pixels; 1 takes each pixel as a token
  model.channels = 3  # of a pixel; the tasks' images have 3 (arrow) or 5 (rays)
  model.outputs = 1000  # logits of an image, or of a token where pooling is none
  model.D = 192  # model width
  model.L = 12  # blocks
  model.pattern = ("plstm_p", "plstm_d")  # kinds of block, repeated until there are L
  model.position_embedding = True  # adds a learnt vector to each token, resized to any grid
  model.grid = (14, 14)  # rows and columns of the position embedding, tokens
  model.position_scale = 0.02  # standard deviation of the initial position embedding
  model.pooling = (
    "corners"  # corners (four tokens side by side), mean, or none: logits of each token
  )
  model.mlp_ratio = 4.0  # width of the MLP in multiples of D, rounded up to 64; 0 leaves it out
  model.init_variance = 0.4  # of initial weights, in multiples of 1 / inputs; 1 for few blocks
  model.drop_path = 0.0  # probability that training leaves out a branch of an image
  model.norm_epsilon = 1e-5  # of the norms before mixers, MLPs and head
  model.remat = (
    "none"  # what the forward pass keeps: none (everything), dots (matrix products), full (nothing)
  )
  model.unroll = 1  # repeats of the pattern unrolled in one step of the scan over layers
  model.dtype = "float32"  # of matrix products and activations: float32 or bfloat16

  model.plstm_p = _plstm()
  model.plstm_d = _plstm()
  model.attention = attention = ConfigDict()
  attention.H = 3  # heads

  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.05
  # Kernels decay; biases, scales, gates' biases and the position embedding do not.
  config.optim.weight_decay_rules = ((r"kernel$", 1.0), (r".*", 0.0))
  return variant(config, arg)


def _plstm():
  group = ConfigDict()
  group.H = 3  # heads
  group.pmode = "paper"  # of plstm_p: paper (bounded), or published (as the authors' code)
  group.unsafe = (
    False  # leaves the published form's transitions below 0 as they are: it may explode
  )
  group.block_diagonal = False  # q, k and v of a head see only the D / H channels of that head
  group.gate_inputs = "slice"  # what S, T, M and a see: slice (D / 4H channels each), all or none
  group.direct_inputs = "none"  # what D sees: slice (D / H channels), all or none
  group.gate_activation = "sigmoid"  # of S, M and D: sigmoid, tanh or identity
  group.transition_activation = "tanh"  # of g: tanh, squared_tanh or sigmoid
  group.source_bias = -1.0  # initial bias of S
  group.mark_bias = -1.0  # initial bias of M
  group.direct_bias = -1.0  # initial bias of D
  group.transition_bias = 1.0  # initial bias of g, mean over heads
  group.transition_spread = 0.0  # g's biases of heads lie this far about their mean
  group.transition_scale = 2.0  # multiplies g before its activation
  group.angle_spread = 1.5  # a's biases of heads lie this far about 0
  group.gate_scale = 0.1  # initial weights of gates, in multiples of those of q, k and v
  group.W = 0  # side of a depthwise convolution before q, k and gates, tokens, odd; 0 is none
  group.passthrough = False  # adds what q, k and gates see to the normed output, by learnt scales
  group.norm_epsilon = 1e-5  # of the norm of the output
  group.implementation = config_dict.placeholder(str)  # of the op; None chooses
  group.chunk_size = config_dict.placeholder(int)  # side of a block of the op, tokens; None chooses
  return group


def variant(config, arg, **others):
  """`config` for an argument, as `defaults.variant`, with a `tiny` of its own."""
  return defaults.variant(config, arg, **{"tiny": tiny, **others})


def tiny(config):
  """A run of seconds, whatever the experiment."""
  config.model.D = 32
  config.model.L = len(config.model.pattern)
  # Eight of everything that devices may share, so that any mesh of eight can be tried.
  for name in ("plstm_p", "plstm_d", "attention"):
    config.model[name].H = 8
  config.model.remat = "none"
  config.model.dtype = "float32"
  # Small steps: large ones make of a last bit, in ten of them, the fourth digit of the loss.
  config.optim.learning_rate = min(config.optim.learning_rate, 3e-4)
  config.train.steps = 20
  config.train.batch_size = 8
  config.train.accumulate = 1
  config.schedule.warmup_steps = 2
  config.eval.every_steps = 10
  config.eval.batch_size = 8
  config.eval.examples = 16
  config.checkpoint.every_steps = 10
  config.log.every_steps = 1
