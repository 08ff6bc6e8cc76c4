"""The published Mamba language models, by size: 130m, 370m, 1b4.

python run.py --config=configs/mamba_lm.py:130m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Gu and Dao, "Mamba", 2023: 129,135,360, 371,516,416 and 1,372,178,432 parameters with tied
embeddings of 50,280 rows. Trained there on 2048 tokens a row, half a million tokens a step.
"""

from configs import defaults


def get_config(arg=None):
  """Mamba at the size that `arg` names; 130m where it names none."""
  config = defaults.get_config()
  config.data.T = 2048
  config.model.vocab_size = 50280
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.model.loss_chunk = 256
  config.model.pattern = ("mamba",)
  config.optim.learning_rate = 3e-3
  config.optim.weight_decay = 0.1
  config.schedule.warmup_steps = 500
  config.schedule.final_fraction = 0.01
  config.train.steps = 4800
  config.train.batch_size = 256
  config.eval.T = 2048
  config.checkpoint.every_steps = 500
  _size(config, 768, 24, 3e-3)
  return defaults.variant(
    config,
    arg,
    **{
      "130m": lambda config: _size(config, 768, 24, 3e-3),
      "370m": lambda config: _size(config, 1024, 48, 1.5e-3),
      "1b4": lambda config: _sharded(_size(config, 2048, 48, 1e-3)),
    },
  )


def _size(config, D, L, learning_rate):
  config.model.D = D
  config.model.L = L
  config.optim.learning_rate = learning_rate
  return config


def _sharded(config):
  # Parameters and moments take 15.3 GiB: more than many a device can keep a copy of.
  config.mesh.data = 1
  config.mesh.fsdp = -1
