"""How processes that were given --coordinator, --processes and --process find each other.

JAX aborts where one of them is missing, comes twice or was told another number, and does not say
which. So they meet here first: the first process listens where its coordinator will, and each other
one says who it is, as [processes, process] in JSON on a line, and is answered with a line, which is
empty or says what is wrong.
"""

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping

from experiments.errors import UserError

PATIENCE = 10.0  # seconds of waiting before it is said that this waits


def read_flags(flags: Mapping[str, str]) -> tuple[str, int, int]:
  """The coordinator's address, the number of processes, and which one this is.

  Raises:
    UserError: a flag that is missing, or makes no sense.
  """

  def whole(name: str) -> int:
    if not re.fullmatch(r"\d+", flags[name]):
      raise UserError(f"--{name} is {flags[name]!r}, must be a whole number")
    return int(flags[name])

  if dict(flags) == {"processes": "1"}:
    return "", 1, 0
  for name in ("coordinator", "processes", "process"):
    if name not in flags:
      given = " and ".join(f"--{other}" for other in flags)
      raise UserError(f"--{name} is missing beside {given}: several processes need all three")
  count, index = whole("processes"), whole("process")
  if index >= count:
    raise UserError(f"--process is {index}, must be less than --processes, which is {count}")
  address = flags["coordinator"]
  if not re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+):\d{1,5}", address):
    raise UserError(f"--coordinator is {address!r}, must be host:port, such as localhost:8476")
  return address, count, index


def meet(address: str, count: int, index: int, timeout: float) -> None:
  """Returns when all processes have come.

  Args:
    address: host:port of the coordinator.
    count: number of processes.
    index: which one this is.
    timeout: for all to come, seconds.

  Raises:
    UserError: one line, the same for all who have met, on who is missing, or does not fit.
  """
  host, port = address.rsplit(":", 1)
  deadline = time.monotonic() + timeout
  said = f"process {index} waits for the other {count - 1} at {address}, {timeout:g} s at most"
  patience = threading.Timer(PATIENCE, print, [said], {"file": sys.stderr, "flush": True})
  patience.daemon = True
  patience.start()
  try:
    if index == 0:
      _receive(address, int(port), count, timeout, deadline)
    else:
      _attend(address, host.strip("[]"), int(port), (count, index), timeout, deadline)
  finally:
    patience.cancel()


def _receive(address: str, port: int, count: int, timeout: float, deadline: float) -> None:
  """The first process' part in `meet`."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=both)
  except (OSError, OverflowError) as error:
    raise UserError(f"--coordinator={address} cannot be opened: {error}") from None
  come: dict[int, socket.socket] = {}
  problem = ""
  with server:
    while len(come) < count - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection, _ = server.accept()
        connection.settimeout(5)
        theirs, index = json.loads(connection.makefile().readline())
      except TimeoutError:
        if time.monotonic() > deadline:
          missing = ", ".join(str(n) for n in range(1, count) if n not in come)
          problem = f"--processes is {count}, but --process={missing} did not come in {timeout:g} s"
        continue
      except (OSError, TypeError, ValueError):
        continue  # somebody else's connection, such as a probe of a port
      if theirs != count:
        problem = f"--processes is {count} for process 0, {theirs} for process {index}"
      elif index in come:
        problem = f"--process={index} was given to two processes"
      come[index if index not in come else -1] = connection
    for connection in come.values():
      with connection, contextlib.suppress(OSError):
        connection.sendall(f"{problem}\n".encode())
  if problem:
    raise UserError(problem)


def _attend(
  address: str, host: str, port: int, who: tuple[int, int], timeout: float, deadline: float
) -> None:
  """The part of every other process in `meet`."""
  while True:
    left = max(deadline - time.monotonic(), 0.01)
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall((json.dumps(who) + "\n").encode())
        # Longer than the first process waits, which knows better what is wrong.
        connection.settimeout(left + 5)
        answer = connection.makefile().readline()
      if answer.endswith("\n"):
        break
      reason = "connection closed"
    except (OSError, OverflowError) as error:
      reason = getattr(error, "strerror", None) or str(error)
    if time.monotonic() > deadline:
      raise UserError(
        f"--coordinator={address} cannot be reached by process {who[1]} in {timeout:g} s: {reason}"
      )
    time.sleep(0.2)
  if answer.strip():
    raise UserError(answer.strip())
