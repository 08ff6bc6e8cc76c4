"""What sequence-parallel ops send: the kinds, the numbers and the bytes, whatever the length."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import ops
from experiments.collectives import collectives
from ops import sharded
from tests.ops.test_sharded import make_mesh

P, B, H, K, V, D, N = 8, 2, 2, 8, 16, 4, 4
BYTES = 4  # of the float32 that states are

# Shapes of the arguments, numbers in the state and in what is sent of a transition.
HEADS = {"q": (H, K), "k": (H, K), "v": (H, V)}
CASES = {
  "linear_scan": (ops.linear_scan, {"a": (D,), "b": (D,)}, D, D),
  "selective_scan": (
    functools.partial(ops.selective_scan, A=-jnp.ones((D, N))),
    {"x": (D,), "dt": (D,), "B": (N,), "C": (N,)},
    D * N,
    D,
  ),
  "no decay": (ops.linear_attention, HEADS, H * K * V, 0),
  "scalar decay": (ops.linear_attention, {**HEADS, "log_decay": (H,)}, H * K * V, H),
  "vector decay": (ops.linear_attention, {**HEADS, "log_decay": (H, K)}, H * K * V, H * K),
  "delta rule": (ops.linear_attention, {**HEADS, "beta": (H,)}, H * K * V, H * K * K),
  "plstm_1d": (
    ops.plstm_1d,
    {**HEADS, **dict.fromkeys(("source", "transition", "mark", "direct"), (H,))},
    H * K * V,
    H,
  ),
}


def sent(case, T, method, blocks=None, documents=False):
  """(kind, bytes a device sends) -> how often, in a forward and a backward pass."""
  op, shapes, _, _ = CASES[case]
  mesh = make_mesh()
  placed = NamedSharding(mesh, jax.P(None, "seq"))
  shape = lambda tail, dtype: jax.ShapeDtypeStruct((B, T, *tail), dtype, sharding=placed)
  arrays = {name: shape(tail, jnp.float32) for name, tail in shapes.items()}
  ids = {"segment_ids": shape((), jnp.int32)} if documents else {}

  def step(arrays, ids):
    o, pull = jax.vjp(lambda arrays: op(**arrays, **ids)[0], arrays)
    return pull(o)

  with jax.set_mesh(mesh), sharded.exchange(method, blocks):
    text = jax.jit(step).lower(arrays, ids).compile().as_text()
  count = Counter()
  for one in collectives(text):
    count[one.kind, one.bytes] += one.count
  return count


def expected(case, method, blocks):
  """Sun et al. 2025 gather states, and transitions once; a chain sends states alone."""
  _, _, state, transition = CASES[case]
  s, m = B * state * BYTES, B * transition * BYTES
  count = Counter()
  if method == "all_gather":
    count["all-gather", (P - 1) * s] += 2  # forward, backward
    count["all-gather", (P - 1) * m] += 1
  elif method == "doubling":
    count["collective-permute", s] += 2 * 4  # 1 + log2 P
    count["collective-permute", m] += 2 * 3
  else:
    count["collective-permute", s / blocks] += 2 * (P + blocks - 2)
  return Counter({(kind, size): n for (kind, size), n in count.items() if size})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["all_gather", "all_scan", "doubling"])
def test_what_is_sent(case, method):
  blocks = 4 if method == "all_scan" else None
  assert sent(case, 64, method, blocks) == expected(case, method, blocks)


@pytest.mark.parametrize("case", ["selective_scan", "scalar decay", "delta rule"])
def test_length_does_not_matter(case):
  assert sent(case, 512, "all_gather") == expected(case, "all_gather", None)


def test_documents_cost_an_id_a_row():
  extra = sent("scalar decay", 64, "all_gather", documents=True) - expected(
    "scalar decay", "all_gather", None
  )
  # The id of each part's last token, and whether a document begins in the part.
  assert extra == {("all-gather", (P - 1) * B * 4): 1, ("all-gather", (P - 1) * B * 1): 1}


def test_a_final_state_comes_from_the_last_device():
  mesh = make_mesh()
  arrays = {
    name: jax.ShapeDtypeStruct(
      (B, 64, D), jnp.float32, sharding=NamedSharding(mesh, jax.P(None, "seq"))
    )
    for name in ("a", "b")
  }
  with jax.set_mesh(mesh):
    text = jax.jit(lambda a, b: ops.linear_scan(a, b)[1]).lower(**arrays).compile().as_text()
  reduced = [one for one in collectives(text) if one.kind == "all-reduce"]
  assert [one.bytes for one in reduced] == [2 * (P - 1) / P * B * D * BYTES]
