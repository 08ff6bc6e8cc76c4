"""Training: from the first batch, or the last good checkpoint, to the figures at the end."""

import contextlib
import math
import pathlib
import signal

import jax

from experiments import metrics, processes, report, sharding, train_step, workspace
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
from experiments.tasks import make_task


def train(config, workdir: str) -> None:
  """Trains the config's model in `workdir` and goes on where an earlier run stopped, bit for bit.

  SIGTERM and Ctrl-C save a checkpoint and return; the same call goes on from there. Where several
  processes train, a signal to one of them stops all after the same step; once the last step is
  done, they finish together whatever signals come.

  Raises:
    UserError: anything that the person at the keyboard can mend.
  """
  mesh = sharding.make_mesh(config.mesh)
  task = make_task(config)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    step_function = train_step.make_step(config, mesh)
    evaluator = task.evaluator(mesh)
    batches = task.train_batches(sharding.rows_of_process(mesh, config.train.batch_size))
    differences = workspace.open_run(config, workdir)
    progress = metrics.Progress()
    log = metrics.Metrics(workdir, tensorboard=config.log.tensorboard)
    stack.callback(log.close)
    checkpoints = Checkpoints(
      pathlib.Path(workdir) / "checkpoints",
      keep_last=config.checkpoint.keep_last,
      keep_best=config.checkpoint.keep_best,
      keep_every_hours=config.checkpoint.keep_every_hours,
      best_metric=task.best_metric,
    )

    def close(kind, error, trace) -> None:
      # Where one of several processes fails, the end of a save may wait for ever for the others.
      if error is None or not processes.several():
        checkpoints.close()

    stack.push(close)

    stopped = stack.enter_context(stop_signals())
    if processes.several():
      step_function = processes.with_signals(step_function, mesh, stopped)
    report.greet(progress, task, mesh)
    state = start(config, mesh, checkpoints, batches, log, progress, differences)
    workspace.note_run(config, workdir)
    loop = Loop(task, mesh, step_function, evaluator, batches, log, checkpoints, progress, stopped)
    state = loop.run(state)
    checkpoints.wait()
    if not processes.any_says(bool(stopped)):
      with contextlib.nullcontext() if processes.several() else interruptible():
        task.finish(workdir, evaluation_params(state), evaluator, progress)
        return
    step = int(state.step)
    saved = f"stopped and saved at step {step}" if step else "stopped before the first step"
    progress.say(f"{saved}; the same command goes on from there")


def start(config, mesh, checkpoints, batches, log, progress, differences):
  """The newest good checkpoint's state, with data and log set back to it, or a fresh state."""
  restored = checkpoints.restore(train_step.abstract_state(config, mesh))
  if restored is None:
    log.rewind(0)
    return train_step.initialise(config, mesh)
  batches.set_state(restored.data_state)
  log.rewind(restored.step)
  progress.say(f"going on from the checkpoint at step {restored.step}")
  for line in differences:
    progress.say(f"note: {line}")
  return restored.state


def evaluation_params(state: train_step.TrainState):
  """The averaged weights where the run keeps them, else the weights."""
  return state.params if state.average is None else state.average


class Loop:
  """The steps of a run, and what happens between them."""

  def __init__(self, task, mesh, step, evaluator, batches, log, checkpoints, progress, stopped):
    self.task, self.config = task, task.config
    self.mesh, self.step, self.evaluator = mesh, step, evaluator
    self.batches, self.log, self.checkpoints = batches, log, checkpoints
    self.progress, self.stopped = progress, stopped
    self.clock = metrics.Clock()
    self.skipped = 0
    self.heard = False
    peak = metrics.peak_flops(mesh.devices.flat[0])
    self.peak = peak and peak * mesh.size
    self.flops = 3 * task.flops_per_target()

  def run(self, state):
    """Steps until the config's last one, or until asked to stop."""
    config, pending = self.config, None
    first, last = int(state.step) + 1, config.train.steps
    self.skipped = int(state.recent.skipped)
    for number in range(first, last + 1):
      # Asked to while the run was set up: what was restored is saved already.
      if number == first and processes.any_says(bool(self.stopped)):
        break
      batch = sharding.place_batch(self.mesh, next(self.batches))
      state, measured = self.step(state, batch)
      # The device works on this step while the host looks at the one before.
      if pending is not None:
        self.log_row(pending[0], self.look_at(*pending))
      pending = (number, measured)
      ends = number == last or self.must_stop()
      validates = _due(number, config.eval.every_steps) or number == last
      saves = _due(number, config.checkpoint.every_steps) or ends
      if validates or saves:
        row = self.look_at(*pending)
        pending = None
        with self.clock.pause(state):
          validation = self.validate(state, number) if validates else {}
          self.log_row(number, {**row, **validation})
          # While steps are skipped the parameters may be at fault: an older checkpoint is better.
          if saves and (ends or not self.skipped_in_a_row):
            self.checkpoints.save(number, state, self.batches.get_state(), validation or None)
      # Not `if self.must_stop()`: a signal during a validation would end a run that has not saved.
      if ends:
        break
    return state

  def must_stop(self) -> bool:
    """Whether a signal has come: with several processes, one that a step has told to all."""
    return self.heard if processes.several() else bool(self.stopped)

  def look_at(self, number: int, measured) -> dict[str, float]:
    """Reads a step's metrics once it is done: shows them, stops a run that has gone wrong.

    Returns:
      What to log of this step, nothing where no line is due.
    """
    config, values = self.config, jax.device_get(measured)
    self.skipped_in_a_row = int(values["skipped_in_a_row"])
    self.heard |= bool(values.get(processes.SIGNALLED, False))
    self.clock.tick(int(values["targets"]))
    loss, skipped = float(values["loss"]), int(values["skipped"])
    if skipped > self.skipped:
      self.skipped = skipped
      self.progress.say(
        f"step {number} was skipped: loss {loss:.4g}, gradient norm {values['gradient_norm']:.4g}"
      )
    if values["skipped_in_a_row"] >= config.train.max_skipped:
      self.checkpoints.wait()
      saved = max(self.checkpoints.steps(), default=None)
      raise UserError(
        f"stopped at step {number}: the last {values['skipped_in_a_row']} steps were skipped"
        f" (train.max_skipped), loss {loss:.4g};"
        + (
          f" the newest checkpoint is that of step {saved}" if saved else " there is no checkpoint"
        ),
        status=1,
      )
    if not (_due(number, config.log.every_steps) or number in (1, config.train.steps)):
      return {}
    speed = self.clock.lap()
    mfu = speed and self.peak and speed * self.flops / self.peak
    unit, further = self.task.unit, {name: float(x) for name, x in values["further"].items()}
    row = {
      "train/loss": loss,
      **{f"train/{name}": value for name, value in further.items()},
      f"train/{unit}_per_second": speed,
      "train/mfu": mfu,
      "train/gradient_norm": float(values["gradient_norm"]),
      "train/learning_rate": float(values["learning_rate"]),
      "train/skipped_steps": skipped,
      f"train/{unit}": number * config.train.batch_size * self.task.targets_per_row,
      "host/resident_gib": metrics.resident_gib(),
    }
    if self.task.tokens_per_byte:
      bits = loss * self.task.tokens_per_byte / math.log(2)
      row["train/bits_per_byte"], said = bits, f"{bits:.3f} bits/byte"
    else:
      said = "   ".join([f"loss {loss:.4f}", *(f"{name} {x:.4g}" for name, x in further.items())])
    line = metrics.progress_line(
      number,
      config.train.steps,
      said=said,
      speed=speed,
      unit=unit,
      mfu=mfu,
      eta=self.clock.eta(config.train.steps - number),
      learning_rate=row["train/learning_rate"],
    )
    self.progress.show(line, last=number == config.train.steps)
    return {key: value for key, value in row.items() if value is not None}

  def log_row(self, number: int, row: dict[str, float]) -> None:
    """Writes one line of metrics.jsonl, if there is anything to say."""
    if row:
      self.log.write(number, row)

  def validate(self, state, number: int) -> dict[str, float]:
    """What the task measures on the validation split, or on its beginning."""
    result = self.evaluator(evaluation_params(state), "validation", brief=True)
    self.progress.say(f"step {number}: validation {result.summary}")
    return {f"validation/{name}": value for name, value in result.metrics.items()}


def _due(number: int, every: int) -> bool:
  return every > 0 and number % every == 0


@contextlib.contextmanager
def stop_signals():
  """Yields a list that becomes non-empty at SIGTERM or Ctrl-C; a second Ctrl-C ends at once."""
  received = []

  def note(number, _):
    received.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def interruptible():
  """Leaves the body at SIGTERM or Ctrl-C, and goes on behind it."""
  handled = (signal.SIGTERM, signal.SIGINT)
  previous = {number: signal.signal(number, signal.default_int_handler) for number in handled}
  try:
    yield
  except KeyboardInterrupt:
    pass
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
