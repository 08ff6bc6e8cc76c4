"""What `--mode=aot` has found, as facts for a file and as lines for a person.

The estimate of time is a roofline: the operations of the model at the chip's peak, the bytes of
main memory at its bandwidth, and the bytes between chips at that of all links together take so long
at least. If all overlap the step takes as long as the longest; if none do, their sum. What the
vector units compute, latencies, and links that a collective leaves idle are not in it.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from experiments import traffic, workspace
from experiments.chips import CHIPS, Chip
from experiments.collectives import collectives_of, totals
from experiments.tasks import make_task
from experiments.topologies import Topology


def facts(config, topology: Topology, mesh, compiled) -> dict[str, Any]:
  """All that is known of a compiled step, in JSON's types; the unit of a number is in its name.

  Args:
    config: the experiment.
    topology: of the devices.
    mesh: of these devices.
    compiled: an `aot.Compiled`.
  """
  task, chip = make_task(config), CHIPS.get(topology.kind)
  targets = config.train.batch_size * task.targets_per_row
  flops = 3 * task.flops_per_target() * targets
  memory = compiled.memory
  found = {
    "topology": str(topology),
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "parameters": task.parameter_count(),
    "batch_size": config.train.batch_size,
    "targets_per_step": targets,
    "unit": task.unit,
    "fits": compiled.fits,
    "needed_bytes_per_device": _finite(compiled.needed_bytes),
    "available_bytes_per_device": chip and chip.hbm_bytes,
    "parts_bytes_per_device": _parts(compiled),
    "largest_arrays": [dataclasses.asdict(buffer) for buffer in memory.largest] if memory else [],
    "flops_per_step": flops,
    "compile_seconds": round(compiled.seconds, 1),
    "versions": workspace.versions(),
  }
  if compiled.fits:
    found |= _communication(compiled.program)
    found["hbm_traffic_bytes_per_device"] = traffic.hbm_bytes(compiled.program)
  if compiled.fits and chip:
    found["estimate"] = estimate(found, chip, mesh.size)
  return found


def _parts(compiled) -> dict[str, int]:
  parts = dict(compiled.memory.parts) if compiled.memory else {}
  return {**parts, "program": compiled.program_bytes} if compiled.program_bytes else parts


def _communication(program) -> dict[str, Any]:
  records = collectives_of(program)
  return {
    "collectives": [
      {"kind": kind, "link": link, "count": total.count, "bytes_per_device": total.bytes}
      for link in ("ici", "dcn")
      for kind, total in totals(records, link).items()
    ],
    "loops_of_unknown_length": any(record.endless for record in records),
  }


def estimate(found: dict[str, Any], chip: Chip, devices: int) -> dict[str, Any]:
  """The roofline: seconds of each kind of work, of a step and its share of the peak.

  Args:
    found: as `facts` makes them, of a step that fits.
    chip: whose figures are taken.
    devices: how many of them.
  """
  sent = {"ici": 0.0, "dcn": 0.0}
  for row in found["collectives"]:
    # A permutation goes over one link to a neighbour.
    alone = row["kind"] == "collective-permute" and row["link"] == "ici"
    sent[row["link"]] += row["bytes_per_device"] * (chip.ici_links if alone else 1)
  seconds = {
    "operations": found["flops_per_step"] / devices / chip.flops,
    "memory": found["hbm_traffic_bytes_per_device"] / chip.hbm_bandwidth,
    "links": sent["ici"] / chip.ici_bandwidth,
    "network": sent["dcn"] / chip.dcn_bandwidth,
  }
  least, most = max(seconds.values()), sum(seconds.values())
  return {
    "assumed": {
      "flops_per_second": chip.flops,
      "memory_bytes_per_second": chip.hbm_bandwidth,
      "links_bytes_per_second": chip.ici_bandwidth,
      "network_bytes_per_second": chip.dcn_bandwidth,
    },
    "seconds": seconds,
    "bound_by": max(seconds, key=seconds.get),
    "step_seconds_overlapped": least,
    "step_seconds_in_turn": most,
    "mfu_overlapped": seconds["operations"] / least,
    "mfu_in_turn": seconds["operations"] / most,
  }


def lines(found: dict[str, Any]) -> list[str]:
  """The report as a person reads it."""
  sizes = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
  flops = found["flops_per_step"]
  return [
    f"{found['topology']}: {_counted(found['devices'], 'device')}, mesh {sizes}",
    f"{found['parameters'] / 1e6:,.1f}M parameters, {found['batch_size']} rows a step,"
    f" {found['targets_per_step']:,} {found['unit']}; compiled in {found['compile_seconds']:.0f} s",
    *_memory_lines(found),
    f"operations  {flops:.3g} FLOP a step, {flops / found['devices']:.3g} a device",
    *(_communication_lines(found) if found["fits"] else []),
    *(_estimate_lines(found) if "estimate" in found else []),
  ]


def _memory_lines(found) -> list[str]:
  needed, available = found["needed_bytes_per_device"], found["available_bytes_per_device"]
  verdict = "fits" if found["fits"] else "DOES NOT FIT"
  of = f" of {_size(available)}" if available else ""
  said = [f"memory      {verdict}: {_size(needed)}{of} on each device"]
  said += [f"  {name:<20}{_size(n):>12}" for name, n in found["parts_bytes_per_device"].items()]
  if found["largest_arrays"]:
    said.append("  largest arrays on each device")
    said += [f"  {_size(a['bytes']):>12}  {array_text(a)}" for a in found["largest_arrays"][:6]]
  return said


def _communication_lines(found) -> list[str]:
  rows = found["collectives"]
  said = [
    f"  {row['kind']:<20}{_size(row['bytes_per_device']):>12}  in {_counted(row['count'], 'call')}"
    + (" between slices" if row["link"] == "dcn" else "")
    for row in rows
  ]
  note = "; loops whose length is not known count once" if found["loops_of_unknown_length"] else ""
  head = f"sent        by each device in a step{note}" if rows else "sent        nothing"
  moved = _size(found["hbm_traffic_bytes_per_device"])
  return [head, *said, f"moved       about {moved} to and from memory on each device in a step"]


def _estimate_lines(found) -> list[str]:
  e = found["estimate"]
  times = ", ".join(f"{name} {_time(s)}" for name, s in e["seconds"].items() if s)
  least, most = e["step_seconds_overlapped"], e["step_seconds_in_turn"]
  speed = found["targets_per_step"] / least
  peak, memory, links, _ = e["assumed"].values()
  return [
    f"estimate    {times}",
    f"  a step takes {_time(least)} where all overlap, bound by {e['bound_by']};"
    f" {_time(most)} where none do",
    f"  at most {speed:,.0f} {found['unit']}/s and MFU {e['mfu_overlapped']:.1%};"
    f" MFU {e['mfu_in_turn']:.1%} where nothing overlaps",
    f"  by the data sheet: {peak / 1e12:,.0f} TFLOP/s, {memory / 1e9:,.0f} GB/s of memory,"
    f" {links / 1e9:,.0f} GB/s to neighbours; vector units and latencies are not counted",
  ]


def largest_batch_line(found: dict[str, Any]) -> str:
  """What `aot.find_largest_batch` has found."""
  largest, runs = found["largest_batch"], found["largest_batch"]["compilations"]
  if not largest["rows"]:
    return f"batch       no batch fits, down to {largest['too_many']} rows ({runs} compilations)"
  beyond = f", {largest['too_many']} do not" if largest["too_many"] else ""
  return f"batch       {largest['rows']} rows fit{beyond} ({runs} compilations)"


def at_fault(found: dict[str, Any]) -> str:
  """Why a step does not fit, in one line: by how much, and for which array."""
  needed, available = found["needed_bytes_per_device"], found["available_bytes_per_device"]
  message = f"the step needs {_size(needed)} on each device of {found['topology']}"
  message += f", which has {_size(available)}"
  arrays = found["largest_arrays"]
  if not arrays:
    return message
  parts = found["parts_bytes_per_device"]
  kept = sum(size for name, size in parts.items() if name != "temporaries")
  message += f": what a run keeps takes {_size(kept)}, temporaries {_size(needed - kept)}"
  array = next(
    (a for a in arrays if (a["part"] == "temporaries") == (kept <= available)), arrays[0]
  )
  # What has the shape of parameters is their gradient, or a copy of them.
  if array["shape"] in {a["shape"] for a in arrays if a["part"] != "temporaries"}:
    remedy = "spread parameters over devices with --config.mesh.fsdp"
  else:
    remedy = "lower --config.train.batch_size or raise --config.train.accumulate"
  return f"{message}; the largest array is {array_text(array)}, {_size(array['bytes'])}; {remedy}"


def array_text(array: dict[str, Any]) -> str:
  """An array's part, shape and name in one line."""
  return f"{array['shape']} {array['name']} ({array['part']})"


def memory_limit(topology: Topology) -> float:
  """Bytes of main memory that a program may use on each device of a TPU."""
  return CHIPS[topology.kind].hbm_bytes


def write(found: dict[str, Any], path: pathlib.Path) -> None:
  """Writes the facts as JSON."""
  path.write_text(json.dumps(found, indent=2) + "\n")


def _counted(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _finite(number: float) -> float | None:
  return number if math.isfinite(number) else None


def _size(number: float | None) -> str:
  if number is None:
    return "more"
  for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if number >= size:
      return f"{number / size:,.2f} {unit}"
  return f"{number:.0f} bytes"


def _time(seconds: float) -> str:
  return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
