"""Several processes that run one program: how they meet, agree, and end together.

They are those of a SLURM step, of Open MPI, of a Cloud TPU or of GKE, as JAX itself finds them, or
those that the flags --coordinator, --processes and --process speak of.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

# JAX shows the coordination service, through which a process tells why it ends, nowhere else.
from jax._src import distributed
from jax.sharding import NamedSharding

from experiments import meeting
from experiments.errors import UserError

MEETING_SECONDS = 300  # for all to come: a cluster may start them minutes apart
HEARTBEAT_SECONDS = 60  # without a sign of life, after which a process counts as dead
SIGNALLED = "signalled"
_DAY = 24 * 3600  # seconds
_FAILURE = "recurrax/failure"
_WORDS = "recurrax/words"
_HEARING_SECONDS = 1  # until a failure has been heard of
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
# How XLA and its communication libraries say that another process has gone.
_LOST = re.compile(r"gloo|nccl|coordination|barrier timed out|heartbeat|connection (closed|reset)")


@contextlib.contextmanager
def together(flags: Mapping[str, str]) -> Iterator[None]:
  """Joins the other processes, if there are any; to be entered before a device is touched.

  When the body ends, waits for the others. When it fails, they end within seconds, each with one
  line that says so; where a process is killed, they end when JAX notices.

  Args:
    flags: of `coordinator`, `processes` and `process` those given on the command line.

  Raises:
    UserError: flags that contradict each other, processes that do not come, or one that was lost.
  """
  initialise(flags)
  if not jax.distributed.is_initialized():
    yield
    return
  ending = threading.Lock()  # whoever holds it decides how this process ends
  watch = threading.Thread(target=_watch, args=(ending,), daemon=True)
  watch.start()
  try:
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      said = " ".join(str(error).split())
      if not _LOST.search(said.lower()):
        raise
      raise UserError(
        f"another process was lost ({said[:120]}): start all of them again to go on", status=1
      ) from None
  except BaseException as error:
    if not ending.acquire(blocking=False):
      time.sleep(_DAY)  # another process failed first, and ends this one
    _tell(error)
    # At exit JAX would wait for the others, who have gone.
    atexit.register(os._exit, 1)
    raise
  jax.distributed.shutdown()
  # It wakes now; a thread that came back from JAX to a Python that has ended would abort it.
  watch.join()


def initialise(flags: Mapping[str, str], timeout: float = MEETING_SECONDS) -> None:
  """Sets `jax.distributed` up where there are several processes; nothing where there is one.

  Args:
    flags: as in `together`; `processes` of 1 alone means one process whatever the environment says.
    timeout: for all processes to come, seconds.

  Raises:
    UserError: flags that contradict each other, or processes that do not come.
  """
  settings = {
    "initialization_timeout": int(timeout),
    "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
  }
  if flags:
    address, count, index = meeting.read_flags(flags)
    if count == 1:
      return
    meeting.meet(address, count, index, timeout)
    jax.distributed.initialize(
      address, count, index, cluster_detection_method="deactivate", **settings
    )
  else:
    environment, certain = _environment()
    if environment is None:
      return
    try:
      jax.distributed.initialize(**settings)
    except (OSError, RuntimeError, ValueError) as error:
      if not certain:
        return
      raise UserError(
        f"{environment} speaks of several processes, which cannot be joined"
        f" ({' '.join(str(error).split())[:120]}): give --coordinator, --processes and --process,"
        " or --processes=1 to run alone"
      ) from None
  # JAX takes SIGTERM for itself, and does nothing with it.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def several() -> bool:
  """Whether there is more than one process."""
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this process is the one that prints, logs and draws."""
  return jax.process_index() == 0


def all_agree(mine: bool) -> bool:
  """Whether it is so for every process; all must ask."""
  return mine if not several() else set(what_each_says(repr(mine)).values()) == {"True"}


def any_says(mine: bool) -> bool:
  """Whether it is so for at least one process; all must ask."""
  return not all_agree(not mine)


def that_of_first(number: float) -> float:
  """The number that the first process has; all must ask."""
  return number if not several() else float(what_each_says(repr(number))["0"])


def what_each_says(words: str) -> dict[str, str]:
  """What each process says, by its number; all must say something.

  Told on the host: devices would have to compile for it.
  """
  client = distributed.global_state.client
  client.key_value_set(f"{_WORDS}/{distributed.global_state.process_id}", words, True)
  _wait_for_all("said")
  said = {name.rsplit("/", 1)[1]: value for name, value in client.key_value_dir_get(_WORDS)}
  _wait_for_all("heard")
  return said


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
  """Lets the first process through the body, then all others: for what is made once and kept."""
  if not several():
    yield
  elif is_first():
    yield
    _wait_for_all("first")
  else:
    _wait_for_all("first")
    yield


def with_signals(step: Callable, mesh: jax.sharding.Mesh, signals: Sequence[int]) -> Callable:
  """A step that also spreads the news of a signal, so that all processes stop after the same step.

  Args:
    step: (state, batch) -> (state, metrics), of which the state is donated.
    mesh: of all devices.
    signals: those that this process has received; it is looked at before every step.

  Returns:
    `step`, with metrics[SIGNALLED]: int32, 1 where any process had received a signal.
  """
  spread = NamedSharding(mesh, jax.P(mesh.axis_names))

  @lined_up
  @functools.partial(jax.jit, donate_argnums=0)
  def spreading(state, batch, flags):
    state, metrics = step(state, batch)
    return state, {**metrics, SIGNALLED: flags.max()}

  def call(state, batch):
    mine = np.full(1, bool(signals), np.int32)
    return spreading(
      state, batch, jax.make_array_from_callback((mesh.size,), spread, lambda _: mine)
    )

  return call


def lined_up(function: Callable) -> Callable:
  """A jitted function that all processes begin together once each has compiled it.

  Of itself the first to have compiled would wait within the program, and libraries of communication
  lose patience sooner than a slow or busy machine compiles.

  Args:
    function: jitted; to be called with positional arguments, of a few different shapes.

  Returns:
    The same function where there is one process.
  """
  if not several():
    return function
  compiled: dict[tuple, Callable] = {}

  def call(*arguments):
    key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
    if key not in compiled:
      compiled[key] = function.lower(*arguments).compile()
      _wait_for_all("compiled")
    return compiled[key](*arguments)

  return call


def _wait_for_all(where: str) -> None:
  """Waits on the host, as long as it takes, until all processes have come here."""
  distributed.global_state.client.wait_at_barrier(f"recurrax/{where}", _DAY * 1000)


def _environment() -> tuple[str | None, bool]:
  """What starts several processes here, and whether it is certain that it does."""
  number = lambda name: int(value) if (value := os.environ.get(name, "")).isdecimal() else 1
  if all(name in os.environ for name in _SLURM) and number("SLURM_NTASKS") > 1:
    return "SLURM", True
  if number("OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI", True
  # JAX sets this when it finds TPU chips of this machine, and a library to use them with.
  if os.environ.get("TPU_ML_PLATFORM") != "JAX" or "tpu" not in (jax.config.jax_platforms or ""):
    return None, False
  workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
  # Outside GKE only Google's metadata server knows, which JAX asks; elsewhere none may be there.
  return "the TPU", "," in workers or number("MEGASCALE_NUM_SLICES") > 1


def _watch(ending: threading.Lock) -> None:
  """Ends this process when another one has told of its failure."""
  try:
    told = distributed.global_state.client.blocking_key_value_get(_FAILURE, 365 * _DAY * 1000)
  except jax.errors.JaxRuntimeError:
    return  # all have ended well, or JAX says what has happened
  if not ending.acquire(blocking=False):
    return
  print(f"error: {told}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  if distributed.global_state.process_id == 0:
    time.sleep(3 * _HEARING_SECONDS)  # JAX aborts those that are left when its service goes
  os._exit(1)


def _tell(error: BaseException) -> None:
  """Tells the other processes that this one ends, and gives them the time to hear it."""
  words = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
  said = " ".join(words.split()) or type(error).__name__
  # Where it fails, another process was first, or the one that would pass it on has gone.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.global_state.client.key_value_set(
      _FAILURE, f"process {distributed.global_state.process_id} has failed: {said}"
    )
  time.sleep(_HEARING_SECONDS)
