"""Parity of 32 bits, evaluated at 256 too, by pLSTM, whose transitions may change a state's sign.

python run.py --config=configs/plstm_parity.py
python run.py --config=configs/plstm_parity.py:sigmoid

A minute or two on a laptop's CPU: one layer and an MLP, every prefix's parity a target. `sigmoid`
makes transitions positive, as those of other gated recurrences are; then the layer may fit the
lengths it sees, and says nothing about longer ones.
"""

from configs import defaults


def get_config(arg=None):
  """A layer of four heads of pLSTM between an embedding and a head."""
  config = defaults.get_config()
  config.data.name = "parity"
  config.data.T = 32
  config.model.vocab_size = 2
  config.model.D = 64
  config.model.L = 1
  config.model.tied = False
  config.model.pattern = ("plstm",)
  config.model.plstm.H = 4
  config.model.plstm.W = 0
  config.model.plstm.transition_bias = 0.0
  config.model.plstm.mlp_width = 64
  # Smaller embeddings would turn too fast at this learning rate: a third of all seeds got stuck.
  config.model.embedding_scale = 1.0
  config.optim.learning_rate = 3e-3
  config.optim.weight_decay = 0.0
  config.train.steps = 1000
  config.train.batch_size = 64
  # The loss falls off a cliff when the rule is found, and gradients are large at its edge.
  config.train.spike_sigma = 0.0
  config.eval.lengths = (32, 256)
  config.eval.every_steps = 250
  config.checkpoint.every_steps = 250
  return defaults.variant(config, arg, sigmoid=_sigmoid)


def _sigmoid(config):
  config.model.plstm.transition_activation = "sigmoid"
