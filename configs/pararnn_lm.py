"""The published ParaRNN language models by size, with ParaGRU or ParaLSTM cells.

python run.py --config=configs/pararnn_lm.py:406m --config.data.name=folder
--config.data.directory=my_texts \
  --config.data.tokenizer=tokenizer.model

Danieli et al., "ParaRNN", 2025, name these sizes and their training; their widths follow from the
sizes. Parameters here, with untied embeddings of 50,432 rows, of ParaGRU and (lstm_...) ParaLSTM:

  406m, lstm_406m   D 1024, 24 blocks, 4 heads     405,619,712     405,668,864
  1b42, lstm_1b42   D 2048, 24 blocks, 4 heads   1,415,219,200   1,415,317,504
  2b90, lstm_2b90   D 2560, 32 blocks, 2 heads   2,901,772,800   2,901,936,640
  6b76, lstm_6b76   D 4096, 32 blocks, 4 heads   6,756,765,696   6,757,027,840

Trained there on 2048 tokens a row, 10.5, 28.8, 57.7 and 138.4 billion in all, with a penalty of the
softmax's normaliser (1e-4) that is left out here.
"""

from configs import defaults

# D, L, H, learning rate, that of ParaLSTM, weight decay, steps, rows a step.
SIZES = {
  "406m": (1024, 24, 4, 5e-3, 3e-3, 1e-3, 20_000, 256),
  "1b42": (2048, 24, 4, 3e-3, 3e-3, 1e-4, 55_000, 256),
  "2b90": (2560, 32, 2, 2e-3, 2e-3, 1e-4, 55_000, 512),
  "6b76": (4096, 32, 4, 3e-3, 3e-3, 1e-4, 33_000, 2048),
}


def get_config(arg=None):
  """ParaGRU, or ParaLSTM for lstm_..., at the size that `arg` names; 406m where it names none."""
  config = defaults.get_config()
  config.data.T = 2048
  config.model.vocab_size = 50432
  config.model.tied = False
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.model.loss_chunk = 256
  config.schedule.final_fraction = 0.0
  config.eval.T = 2048
  config.checkpoint.every_steps = 500
  _size(config, "paragru", "406m")
  sizes = {
    f"{prefix}{size}": _sized(cell, size)
    for prefix, cell in (("", "paragru"), ("lstm_", "paralstm"))
    for size in SIZES
  }
  return defaults.variant(config, arg, **sizes)


def _sized(cell, size):
  return lambda config: _size(config, cell, size)


def _size(config, cell, size):
  D, L, H, gru_rate, lstm_rate, weight_decay, steps, rows = SIZES[size]
  config.model.pattern = (cell,)
  config.model.D = D
  config.model.L = L
  config.model[cell].H = H
  config.optim.learning_rate = gru_rate if cell == "paragru" else lstm_rate
  config.optim.weight_decay = weight_decay
  config.train.steps = steps
  config.train.batch_size = rows
  config.schedule.warmup_steps = steps // 10
