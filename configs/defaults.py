"""Every field that an experiment has, with its default and its unit. An experiment's file changes some."""

from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
  """The fields and their defaults. `tiny` shrinks the model and the run to seconds on a laptop."""
  config = ConfigDict()

  config.data = data = ConfigDict()
  data.name = "austen/chapters"  # austen/chapters, austen/novels, folder, a TFDS data set's name; or a task: parity, rays, arrow, arrow_tokens
  data.directory = (
    ""  # the folder of .txt and .jsonl files, or where TFDS keeps data; empty is the usual place
  )
  data.text_feature = "text"  # feature or JSON key that holds the text
  data.tokenizer = "bytes"  # bytes, or the path of a sentencepiece model
  data.mode = (
    "packed"  # packed: shuffled rows; streaming: documents run on from batch to batch, with state
  )
  data.T = 256  # length of a row, tokens
  data.train_split = "train"  # split to train on, in TFDS notation
  data.validation_split = "validation"  # split to validate on
  data.test_split = "test"  # split to test on
  data.validation_fraction = 0.01  # share of a folder's documents that its validation split gets
  data.test_fraction = 0.01  # share of a folder's documents that its test split gets
  data.cache_directory = "~/.cache/recurrax"  # where prepared data lie
  data.prefetch = 4  # batches made ahead
  data.side = (
    8  # side of the images of a task that are trained on, pixels of arrow, cells of others
  )
  data.scale = 1.0  # of all sizes in the pictures of arrow but their side
  data.examples = 0  # different examples of arrow that are trained on; 0 makes new ones for ever
  data.supervise = "all"  # bits of parity that are learnt from: all, or the last of each row

  config.model = model = ConfigDict()
  model.vocab_size = 264  # rows of the embedding; at least the tokenizer's vocabulary (bytes: 257)
  model.D = 256  # model width
  model.L = 4  # blocks
  model.pattern = ("mamba",)  # kinds of block, repeated until there are L
  model.tied = True  # the head is the embedding, transposed
  model.norm_epsilon = 1e-5  # of every RMSNorm
  model.embedding_scale = 0.02  # standard deviation of the initial embedding
  model.remat = (
    "none"  # what the forward pass keeps: none (everything), dots (matrix products), full (nothing)
  )
  model.loss_chunk = 0  # tokens of a row whose logits exist at a time in training; 0 is all
  model.unroll = 1  # repeats of the pattern unrolled in one step of the scan over layers
  model.dtype = "float32"  # of matrix products and activations: float32 or bfloat16

  model.mamba = mamba = ConfigDict()
  mamba.expand = 2  # inner width, in multiples of D
  mamba.N = 16  # state size of each inner channel
  mamba.W = 4  # width of the convolution, tokens
  mamba.dt_rank = config_dict.placeholder(int)  # rank of the projection to dt; None is ceil(D / 16)
  mamba.dt_min = 1e-3  # smallest initial time step
  mamba.dt_max = 0.1  # largest initial time step
  mamba.dt_floor = 1e-4  # initial time steps are not smaller than this
  mamba.mlp_width = 0  # width of a gated MLP after the mixer; 0 leaves it out
  mamba.implementation = config_dict.placeholder(str)  # recurrent, parallel, chunked; None chooses

  model.mamba2 = _mamba2()
  model.gla = _gla()
  model.retnet = _retnet()
  model.deltanet = _deltanet()
  model.gated_deltanet = _gated_deltanet("scalar", H=6, K=256, expand_v=2.0)
  model.kda = _gated_deltanet("vector", H=16, K=128, expand_v=1.0)
  model.plstm = _plstm()
  model.paragru = _pararnn("paragru")
  model.paralstm = _pararnn("paralstm")
  model.elman = _pararnn("elman")
  model.gru = _pararnn("gru")
  model.lstm = _pararnn("lstm", memory_bias_min=1.0, memory_bias_max=1.0)
  model.slstm = _pararnn("slstm", memory_bias_min=3.0, memory_bias_max=6.0)
  model.attention = _attention(None)
  model.sliding_attention = _attention(256)

  config.optim = optim = ConfigDict()
  optim.name = "adamw"  # adamw, or muon (matrices by Muon, the rest by AdamW)
  optim.learning_rate = 3e-3  # at its peak
  optim.b1 = 0.9  # decay of the first moment
  optim.b2 = 0.95  # decay of the second moment
  optim.epsilon = 1e-8  # added to the root of the second moment
  optim.momentum = 0.95  # of Muon
  optim.weight_decay = 0.1  # per step, in multiples of the learning rate
  optim.clip_norm = 1.0  # largest global norm of a gradient; 0 does not clip
  optim.muon_rules = (
    (r"_proj/kernel$", True),
    (r".*", False),
  )  # parameters that Muon takes: (regex, yes or no)
  # Multipliers of weight decay by parameter: (regex over its path, factor), the first match counts.
  optim.weight_decay_rules = (
    (r"(scale|bias|A_log|skip|conv_weight|recurrent_weight|peephole_weight)$", 0.0),
    (r".*", 1.0),
  )
  optim.learning_rate_rules = ((r".*", 1.0),)  # likewise, of the learning rate; 0 freezes

  config.schedule = schedule = ConfigDict()
  schedule.name = "cosine"  # cosine, wsd (warm up, stay, decay) or constant
  schedule.warmup_steps = 20  # linear rise from 0, steps
  schedule.decay_fraction = 0.2  # of the run, the decay at the end of wsd
  schedule.final_fraction = 0.1  # learning rate at the end, of its peak

  config.mesh = mesh = ConfigDict()
  mesh.data = -1  # devices that share the batch; one of the four may be -1, the rest of the devices
  mesh.fsdp = 1  # devices that share the batch and the parameters
  mesh.tensor = 1  # devices that share the width
  mesh.seq = 1  # devices that share time; a model without time, as of images, shares the batch
  mesh.exchange = (
    "auto"  # how states move between devices along seq: all_gather, all_scan, doubling or auto
  )

  config.train = train = ConfigDict()
  train.steps = 1000  # optimizer steps
  train.batch_size = 16  # rows a step, over all devices
  train.accumulate = 1  # microbatches that a step is computed in, one after the other
  train.seed = 0  # of the initial parameters and the order of the data
  train.ema_decay = 0.0  # of an average of the weights, used to evaluate and sample; 0 keeps none
  train.spike_sigma = 6.0  # a step is skipped whose loss or gradient norm is this far above the recent ones; 0 skips none
  train.spike_window = 128  # recent steps that a spike is measured against
  train.max_skipped = 10  # skipped steps in a row that end the run

  config.eval = evaluation = ConfigDict()
  evaluation.every_steps = 200  # steps between validations; 0 validates at the end only
  evaluation.batch_size = 16  # rows
  evaluation.T = 512  # tokens of a row in one call
  evaluation.max_tokens = 65536  # tokens of a validation during training; 0 is the whole split
  evaluation.final_max_tokens = 0  # likewise, of the splits at the end of a run and in --mode=eval
  evaluation.checkpoint = (
    "newest"  # what eval and sample read: newest, best, or the number of a step
  )
  evaluation.carry_state = (
    True  # documents are read from start to end with state; False starts every T tokens anew
  )

  evaluation.lengths = ()  # lengths (parity: tokens; rays, arrow: side) that a task is evaluated at beside that of training
  evaluation.examples = 1024  # examples of a task at each length; during training a tenth

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 200  # steps between checkpoints; the last step has one always
  checkpoint.keep_last = 2  # newest checkpoints kept
  checkpoint.keep_best = 1  # best checkpoints kept, by validation/bits_per_byte
  checkpoint.keep_every_hours = (
    1.0  # hours between checkpoints that are kept for ever; 0 keeps none so
  )

  config.log = log = ConfigDict()
  log.every_steps = 10  # steps between lines of metrics.jsonl
  log.tensorboard = True  # writes TensorBoard events too, where tensorboardX is installed

  config.sample = sample = ConfigDict()
  sample.prompt = "It is a truth universally acknowledged, that "  # text to go on from
  sample.tokens = 400  # tokens to make
  sample.temperature = 0.8  # 0 takes the likeliest token
  sample.top_k = 0  # only the k likeliest tokens; 0 is all
  sample.top_p = 1.0  # only the likeliest tokens with this much probability together
  sample.seed = 0  # of the choices

  return variant(config, arg)


def _attention(window):
  attention = ConfigDict()
  attention.H = 4  # query heads
  attention.kv_heads = config_dict.placeholder(int)  # key and value heads; None is H
  attention.K = config_dict.placeholder(int)  # width of a head, even; None is D / H
  attention.window = config_dict.placeholder(
    int
  )  # tokens a token sees, itself included; None is all
  attention.window = window
  attention.context = 2048  # keys and values kept in the state where window is None, tokens
  attention.rotary_base = 10000.0  # longest wavelength of the rotary positions / 2 pi, tokens
  attention.sequence = "all_gather"  # how keys reach queries where mesh.seq > 1: all_gather or ring
  attention.mlp_width = config_dict.placeholder(
    int
  )  # of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  return attention


def _recurrent(mlp_width):
  """What every recurrence with a matrix state has."""
  group = ConfigDict()
  group.mlp_width = config_dict.placeholder(
    int
  )  # of the gated MLP; None is 8 D / 3 up to 256 (retnet: half of that); 0 is none
  group.mlp_width = mlp_width
  group.implementation = config_dict.placeholder(str)  # recurrent, parallel, chunked; None chooses
  group.chunk_size = config_dict.placeholder(int)  # tokens per chunk; None chooses
  return group


def _mamba2():
  mamba2 = _recurrent(0)
  mamba2.expand = 2  # inner width, in multiples of D
  mamba2.P = 64  # width of a head, channels
  mamba2.N = 128  # state size of each channel
  mamba2.n_groups = 1  # groups of heads that share B and C
  mamba2.W = 4  # width of the convolutions, tokens
  mamba2.A_min = 1.0  # smallest initial -A
  mamba2.A_max = 16.0  # largest initial -A
  mamba2.dt_min = 1e-3  # smallest initial time step
  mamba2.dt_max = 0.1  # largest initial time step
  mamba2.dt_floor = 1e-4  # initial time steps are not smaller than this
  mamba2.dt_limit_min = 0.0  # time steps are never smaller than this
  mamba2.dt_limit_max = config_dict.placeholder(float)  # nor larger than this; None is no limit
  mamba2.norm_epsilon = 1e-5  # of the norm of the output
  return mamba2


def _gla():
  gla = _recurrent(None)
  gla.H = 4  # heads
  gla.kv_heads = config_dict.placeholder(int)  # heads of k, v and decay; None is H
  gla.expand_k = 0.5  # width of all keys together, in multiples of D
  gla.expand_v = 1.0  # width of all values together, in multiples of D
  gla.feature_map = "identity"  # of q and k: identity or relu
  gla.gate_rank = 16  # rank of the projection to the decay
  gla.gate_normaliser = 16.0  # divides the logarithm of the decay
  gla.gate_min = config_dict.placeholder(float)  # least logarithm of the decay; None is no limit
  gla.output_gate = True  # multiplies the normed output by silu of a projection
  gla.W = 0  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  gla.norm_epsilon = 1e-6  # of the norm of the output
  return gla


def _retnet():
  retnet = _recurrent(None)
  retnet.H = 8  # heads
  retnet.expand_k = 1.0  # width of all keys together, in multiples of D
  retnet.expand_v = 2.0  # width of all values together, in multiples of D
  retnet.rotary_base = 10000.0  # longest wavelength of the rotary positions / 2 pi, tokens
  retnet.norm_epsilon = 1e-6  # of the norm of the output
  retnet.mlp_ratio = 2.0  # MLP's width before its gate takes a third, in multiples of D
  return retnet


def _deltanet():
  deltanet = _recurrent(None)
  deltanet.H = 6  # heads
  deltanet.expand_k = 1.0  # width of all keys together, in multiples of D
  deltanet.expand_v = 1.0  # width of all values together, in multiples of D
  deltanet.allow_neg_eigval = False  # beta lies in (0, 2) rather than (0, 1)
  deltanet.qk_activation = "silu"  # of q and k: silu, relu, elu (elu + 1) or identity
  deltanet.qk_norm = "l2"  # of q and k: l2, or sum (divides by the sum, for elu only)
  deltanet.use_gate = False  # multiplies the normed output by silu of a projection
  deltanet.W = 4  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  deltanet.norm_epsilon = 1e-6  # of the norm of the output
  return deltanet


def _gated_deltanet(decay, H, K, expand_v):
  gated = _recurrent(None)
  gated.H = H  # heads of q and k
  gated.value_heads = config_dict.placeholder(int)  # of v, decay and beta; None is H
  gated.K = K  # width of a head of q and k
  gated.expand_v = expand_v  # width of a head of v, in multiples of K
  gated.decay = decay  # scalar: one for each head; vector: one for each key channel
  gated.rank = config_dict.placeholder(int)  # of the vector form's decay and gate; None is V
  gated.allow_neg_eigval = False  # beta lies in (0, 2) rather than (0, 1)
  gated.dt_min = 1e-3  # smallest initial softplus(dt_bias)
  gated.dt_max = 0.1  # largest initial softplus(dt_bias)
  gated.dt_floor = 1e-4  # it is not smaller than this
  gated.W = 4  # width of the convolutions of q, k and v, tokens; 0 leaves them out
  gated.norm_epsilon = 1e-6  # of the norm of the output
  return gated


def _pararnn(cell, memory_bias_min=0.0, memory_bias_max=0.0):
  pararnn = ConfigDict()
  pararnn.cell = cell  # paragru, paralstm, elman, gru, lstm or slstm
  pararnn.H = 4  # heads: blocks of the cell's input projection, and of full recurrent matrices
  pararnn.W = 4  # width of the convolution, tokens; 0 leaves it out
  pararnn.mode = config_dict.placeholder(
    str
  )  # newton, sequential (one token after the other); None chooses
  pararnn.iterations = 4  # of Newton's method
  pararnn.window = config_dict.placeholder(
    int
  )  # tokens solved at a time, the windows in order; None is all
  pararnn.policy = (
    "ignore"  # of a solution that is none: ignore, warn, fallback (sequential) or nan
  )
  pararnn.recurrent_clip = config_dict.placeholder(float)
  pararnn.recurrent_clip = 0.5  # largest magnitude of a and w; None is no limit
  pararnn.recurrent_std = config_dict.placeholder(
    float
  )  # of initial a and w, cut at 0.9; None is D^-1/2
  pararnn.input_init = "kaiming"  # of B, uniform: kaiming, xavier
  pararnn.memory_bias_min = (
    memory_bias_min  # initial bias of the gate that keeps the state, first channel;
  )
  pararnn.memory_bias_max = (
    memory_bias_max  # last channel, linear between; positive keeps longer in every cell
  )
  pararnn.norm_before_gate = True  # norm(h) * silu(z) rather than norm(h * silu(z))
  pararnn.norm_epsilon = 1e-5  # of the norm of the output
  pararnn.bare = False  # the cell alone: no projections around it, convolution, gate and norm
  pararnn.residual_scale = True  # learnt scale of the block's input where the output is added to it
  pararnn.mlp_width = config_dict.placeholder(
    int
  )  # of the gated MLP; None is 8 D / 3 up to 256; 0 is none
  return pararnn


def _plstm():
  plstm = _recurrent(None)
  plstm.H = 4  # heads
  plstm.K = config_dict.placeholder(int)  # width of a head of q and k; None is D / H
  plstm.J = 1  # copies of the state that transitions mix; 1 is a number for each head
  plstm.W = 4  # width of the convolution before gates, q and k, tokens; 0 leaves it out
  plstm.gate_activation = "sigmoid"  # of source, mark and direct: sigmoid, tanh or identity
  plstm.transition_activation = "tanh"  # of transitions: tanh (of any sign) or sigmoid (decays)
  plstm.transition_scale = 5.0  # multiplies transitions before their activation
  plstm.source_bias = -1.0  # initial bias of sources
  plstm.mark_bias = -1.0  # initial bias of marks
  plstm.direct_bias = -1.0  # initial bias of direct gates
  plstm.transition_bias = 0.4  # initial bias of transitions, mean over heads
  plstm.transition_spread = 0.0  # transitions' biases of heads lie this far about their mean
  plstm.gate_std = 0.02  # of the initial weights of gates
  plstm.passthrough = True  # adds what gates see to the normed output, by a learnt scale
  plstm.norm_epsilon = 1e-5  # of the norm of the output
  return plstm


def variant(config, arg, **others):
  """`config` as it is for no argument, shrunk for `tiny`, or changed by `others[arg]`.

  Args:
    config: the experiment's full-size config; changed in place.
    arg: what stands behind the colon of --config=file.py:arg, or None.
    **others: functions of the config by argument; one for `tiny` replaces the usual one.

  Returns:
    The config.

  Raises:
    ValueError: an argument that the experiment does not have.
  """
  others = {"tiny": _tiny, **others}
  if arg and arg not in others:
    raise ValueError(f"unknown argument {arg!r}, there are {sorted(others)}")
  if arg:
    others[arg](config)
  return config


def _tiny(config):
  config.data.T = 32
  config.model.D = 32
  config.model.L = len(config.model.pattern)
  config.model.vocab_size = 264
  config.model.tied = True
  config.model.remat = "none"
  config.model.unroll = 1
  config.model.dtype = "float32"
  config.model.mamba.N = 4
  config.model.mamba2.P = config.model.mamba2.N = 8
  # Eight of everything that devices may share, so that any mesh of eight can be tried.
  for name in ("gla", "retnet", "deltanet", "gated_deltanet", "kda", "plstm"):
    config.model[name].H = 8
    config.model[name].mlp_width = 64
  for name in ("paragru", "paralstm", "elman", "gru", "lstm", "slstm"):
    config.model[name].H = 8
    config.model[name].mlp_width = 64
  config.model.gla.kv_heads = None
  config.model.gla.gate_rank = 4
  for gated in (config.model.gated_deltanet, config.model.kda):
    gated.K = 8
    gated.value_heads = gated.rank = None
  for attention in (config.model.attention, config.model.sliding_attention):
    attention.H = 8
    attention.kv_heads = None
    attention.K = None
    attention.mlp_width = 64
    attention.context = 64
  config.model.sliding_attention.window = 16
  config.data.tokenizer = "bytes"
  config.train.steps = 20
  config.train.batch_size = 8
  config.train.accumulate = 1
  config.schedule.warmup_steps = 2
  config.eval.every_steps = 10
  config.eval.batch_size = 8
  config.eval.T = 64
  config.eval.lengths = (32, 64) if config.eval.lengths else ()
  config.eval.examples = 16
  config.eval.max_tokens = 2048
  config.eval.final_max_tokens = 8192
  config.checkpoint.every_steps = 10
  config.log.every_steps = 1
  config.sample.tokens = 40
