"""ParaGRU, a nonlinear recurrent network trained in parallel over time, on the Austen corpus.

python run.py --config=configs/austen_paragru.py
python run.py --config=configs/austen_paragru.py:small

The same weights token after token: add --config.model.paragru.mode=sequential.
"""

from configs import austen_mamba, defaults


def get_config(arg=None):
  """ParaGRU and gated MLPs, of the size of austen_mamba.py."""
  return base("paragru", arg)


def base(name, arg):
  """A nonlinear recurrent network of that size.

  Args:
    name: of the cell, in a pattern.
    arg: what the experiment was called with.
  """
  config = austen_mamba.get_config()
  config.model.pattern = (name,)
  config.model[name].mlp_width = 296
  return defaults.variant(config, arg, small=lambda config: _small(config, name))


def _small(config, name):
  austen_mamba.small(config)
  config.model[name].mlp_width = 168
