"""The entry of the GPU at hand in the table that the kernels cut their work by.

python -m experiments.tune_kernels            (a Hopper GPU; about two minutes)

A sequence cut in segments fills the GPU, and costs a pass for the states between them. For each
field of `ops/kernels/gpu/heuristics.py` this times longer and longer segments, cut and uncut,
prints the times, and last the entry, to be copied into that table by hand.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_timing as timing
from ops.kernels.gpu import heuristics, scalar_decay, vector_decay

B, H, K = 2, 16, 128  # rows, heads, width of keys and values
CHUNKS = (8, 16, 32, 64)  # of a segment
# The programs that an uncut sequence gives, by field; in narrow blocks a head has two.
PROGRAMS = {
  "scalar_wide": B * H,
  "scalar_narrow": 2 * B * H,
  "scalar_backward": B * H,
  "vector": B * H,
}


def tune(
  measure: Callable[[str, int, int, bool], float],
  multiprocessors: int,
  say: Callable[[str], None] = print,
) -> dict[str, int]:
  """The fewest chunks of a segment from which on a cut pays, by field.

  Args:
    measure: a function of a field, pieces, chunks of each, and whether they are cut, to ms.
    multiprocessors: of the GPU.
    say: is told each pair of times.
  """
  found = {}
  for field, programs in PROGRAMS.items():
    pieces, pays = max(2, multiprocessors // programs), []
    for chunks in CHUNKS:
      cut, uncut = (measure(field, pieces, chunks, yes) for yes in (True, False))
      say(f"{field}: {pieces} segments of {chunks} chunks {cut:.4f} ms, uncut {uncut:.4f} ms")
      pays = [*pays, chunks] if cut < uncut else []
    found[field] = pays[0] if pays else 2 * CHUNKS[-1]
  return found


def kernel(field: str, pieces: int, chunks: int, cut: bool) -> tuple[Callable, tuple[Any, ...]]:
  """What a field is about: a function, and its arguments."""
  from ops.kernels.gpu.scalar_decay_forward import Tiling

  draw = functools.partial(_draw, B, 64 * pieces * chunks, H)
  q, k, v, do = (draw(seed, K).astype(jnp.bfloat16) for seed in range(4))
  gates = -jax.nn.softplus(draw(4, K if field == "vector" else 1)) / 16
  state, segments = jnp.zeros((B, H, K, K), jnp.float32), pieces if cut else 1
  if field == "vector":
    run = functools.partial(vector_decay.forward, tiling=Tiling(segments, 2, 128), scale=1.0)
    return run, (q, k, v, gates, state)
  gates = gates[..., 0]
  forward = functools.partial(scalar_decay.forward, scale=1.0)
  if field == "scalar_backward":
    before = jax.eval_shape(functools.partial(forward, save=True), q, k, v, gates, state)[2]
    run = functools.partial(scalar_decay.backward, tiling=Tiling(segments, 2, K), scale=1.0)
    return run, (q, k, v, gates, None, jnp.zeros(before.shape, before.dtype), do, state)
  # Instead of cut wide blocks there are narrow ones, cut half as often.
  uncut = Tiling(max(1, pieces // 2), 3, 64) if field == "scalar_wide" else Tiling(1, 3, 64)
  wide = Tiling(pieces, 2, 128) if field == "scalar_wide" else Tiling(pieces, 3, 64)
  return functools.partial(forward, tiling=wide if cut else uncut), (q, k, v, gates, state)


def _draw(B: int, T: int, H: int, seed: int, width: int) -> jax.Array:
  drawn = np.random.default_rng(seed).standard_normal(2**20, np.float32)
  return jnp.asarray(np.resize(drawn, (B, T, H, width)))


def _milliseconds(*case) -> float:
  run, arguments = kernel(*case)
  program = timing.compile_program(run, *arguments)
  jax.block_until_ready(program.run(*arguments))
  return timing.time_calls([lambda: program.run(*arguments)], seconds=0.2)[0]


def main() -> int:
  """Prints the entry; returns the exit status."""
  kind = jax.devices()[0].device_kind
  known = heuristics.of_kind(kind)
  if known is None:
    print(f"error: {kind} is none of {', '.join(heuristics.KINDS)}", file=sys.stderr)
    return 2
  found = tune(_milliseconds, known.multiprocessors)
  print(f"{kind}, jax {jax.__version__}: {known._replace(**found)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
