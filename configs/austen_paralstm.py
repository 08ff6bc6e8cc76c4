"""ParaLSTM, a nonlinear recurrent network trained in parallel over time, on the Austen corpus.

python run.py --config=configs/austen_paralstm.py
python run.py --config=configs/austen_paralstm.py:small
"""

from configs import austen_paragru


def get_config(arg=None):
  """ParaLSTM and gated MLPs, of the size of austen_mamba.py."""
  return austen_paragru.base("paralstm", arg)
