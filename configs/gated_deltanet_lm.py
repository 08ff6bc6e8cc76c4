"""Gated DeltaNet language models by size: 130m, 340m, 340m_k128, 1b3; and Kimi's kda_1b3.

python run.py --config=configs/gated_deltanet_lm.py:340m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Yang et al., "Gated Delta Networks", 2024: 1b3 (1,387,348,732 parameters) is theirs; 340m
(347,036,712, tied) and 130m (107,309,628, tied) are of the same proportions. 340m_k128
(347,120,124, tied) has as many channels in narrower heads, which GPUs have kernels for. kda_1b3
(1,390,941,568) has the layers of Kimi Team, "Kimi Linear", 2025, without its attention layers.
"""

from configs import defaults, gla_lm


def get_config(arg=None):
  """Gated DeltaNet, or KDA, at the size that `arg` names; 130m where it names none."""
  config = gla_lm.base("gated_deltanet")
  config.optim.learning_rate = 4e-4
  config.optim.weight_decay = 0.1
  sizes = {
    "130m": lambda config: _size(config, 768, 10, 3, 192, tied=True),
    "340m": lambda config: _size(config, 1024, 21, 4, 192, tied=True),
    "340m_k128": lambda config: _size(config, 1024, 21, 6, 128, tied=True),
    "1b3": lambda config: _size(config, 2048, 21, 6, 256, tied=False),
    "kda_1b3": _kda,
  }
  sizes["130m"](config)
  return defaults.variant(config, arg, **sizes)


def _size(config, D, L, H, K, tied):
  config.model.D = D
  config.model.L = L
  config.model.tied = tied
  config.model.gated_deltanet.H = H
  config.model.gated_deltanet.K = K


def _kda(config):
  config.model.pattern = ("kda",)
  config.model.D = 2048
  config.model.L = 24
  config.model.tied = False
