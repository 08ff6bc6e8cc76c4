"""Processes that find each other, or are told in one line why they do not."""

import concurrent.futures
import json
import socket

import pytest

from experiments import configuration, meeting, modes, processes
from experiments.errors import UserError
from tests.processes import free_port


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"process": "0"}, "--coordinator is missing beside --process: several processes need all"),
    ({"coordinator": "a:1", "processes": "2"}, "--process is missing beside --coordinator and"),
    ({"processes": "2"}, "--coordinator is missing beside --processes"),
    ({"coordinator": "a:1", "processes": "2", "process": "2"}, "--process is 2, must be less than"),
    ({"coordinator": "a:1", "processes": "two", "process": "0"}, "--processes is 'two', must be a"),
    ({"coordinator": "a:1", "processes": "2", "process": "-1"}, "--process is '-1', must be a"),
    ({"coordinator": "here", "processes": "2", "process": "0"}, "--coordinator is 'here', must be"),
    ({"coordinator": "no.invalid:1", "processes": "2", "process": "1"}, "cannot be reached by"),
  ],
)
def test_wrong_flags_are_one_line(flags, message):
  with pytest.raises(UserError) as caught:
    processes.initialise(flags, timeout=0.5)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def meet(*who: tuple[int, int], timeout: float = 20) -> list[str]:
  """What each of these (processes, process) hears when they meet; "" where all is well."""
  address = f"localhost:{free_port()}"

  def told(count_and_index):
    try:
      meeting.meet(address, *count_and_index, timeout)
    except UserError as error:
      return str(error)
    return ""

  with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
    return list(pool.map(told, who))


def test_processes_meet_in_any_order():
  assert meet((3, 2), (3, 0), (3, 1)) == ["", "", ""]


def test_processes_that_do_not_fit_are_told():
  assert meet((3, 0), (3, 1), (3, 1)) == ["--process=1 was given to two processes"] * 3
  assert meet((2, 0), (3, 2)) == ["--processes is 2 for process 0, 3 for process 2"] * 2
  (alone,) = meet((3, 0), timeout=0.5)
  assert alone == "--processes is 3, but --process=1, 2 did not come in 0.5 s"


def test_an_occupied_port_is_told():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"--coordinator=localhost:{port} cannot be opened"):
      meeting.meet(f"localhost:{port}", 2, 0, 1)


def test_waiting_is_told(monkeypatch, capsys):
  monkeypatch.setattr(meeting, "PATIENCE", 0.05)
  meet((2, 0), timeout=0.5)
  assert "process 0 waits for the other 1 at localhost:" in capsys.readouterr().err


def test_processes_with_other_configs_are_refused(monkeypatch):
  def started_with(*flags):
    return configuration.parse(["run.py", "--config=configs/quickstart.py:tiny", *flags])

  def check(invocation, change):
    def what_each_says(words):
      theirs = json.loads(words)
      return {"0": json.dumps({**theirs, **change}), "1": words}

    monkeypatch.setattr(processes, "what_each_says", what_each_says)
    modes._check_alike(invocation)

  check(started_with(), {})
  message = r"config.data.T is 32 for process 0, 64 for process 1: start all processes with the"
  with pytest.raises(UserError, match=message):
    check(started_with("--config.data.T=64"), {"config.data.T": "32"})
