"""Softmax attention with time split over devices: the same numbers, and what is sent for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from experiments.collectives import collectives
from ops.softmax_attention import softmax_attention
from tests.quick_compilation import quick_compilation as quick_compilation

B, T, H, HQ, K, CONTEXT = 4, 32, 4, 2, 4, 10


def make_mesh(seq, tensor=1, data=1):
  devices = np.array(jax.devices()[: data * tensor * seq]).reshape(data, 1, tensor, seq)
  return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)


def inputs(window, carried, heads=HQ, seed=0):
  """Arrays whose softmaxes are far from flat; states that hold all they can, some, and nothing."""
  draw = np.random.default_rng(seed).normal
  kept = CONTEXT if window is None else window - 1
  shapes = {"q": (B, T, H, K), "k": (B, T, heads, K), "v": (B, T, heads, K)}
  arrays = {name: jnp.asarray(1.5 * draw(size=shape)) for name, shape in shapes.items()}
  if not carried:
    return arrays, None
  valid = jnp.arange(kept) >= kept - jnp.asarray([kept, kept // 2, 0, 1])[:, None]
  past = lambda: jnp.where(valid[..., None, None], draw(size=(B, kept, heads, K)), 0)
  return {**arrays, "past_k": past(), "past_v": past()}, valid


def documents():
  """Documents over many parts and within one, new ones at borders, parts of padding alone."""
  ids = np.zeros((B, T), np.int32)
  ids[0] = np.repeat([7, 1, 1, 2, 0, 2], [4, 5, 1, 2, 17, 3])
  ids[1, 3:19] = -1
  ids[2, :9] = -5
  ids[2, 20:] = np.where(np.arange(12) % 5 < 3, 0, -2)
  ids[3] = -1
  return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnames=("window", "sequence"))
def run(arrays, valid, ids, window, sequence="all_gather"):
  """Outputs, state and all gradients."""

  def loss(arrays):
    arrays = dict(arrays)
    state = None
    if valid is not None:
      state = {"k": arrays.pop("past_k"), "v": arrays.pop("past_v"), "valid": valid}
    o, state = softmax_attention(
      **arrays, initial_state=state, segment_ids=ids, window=window, context=CONTEXT,
      rotary_base=50.0, sequence=sequence,
    )  # fmt: skip
    weigh = lambda x: jnp.sum(x * jnp.sin(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
    return weigh(o) + weigh(state["k"]) + weigh(state["v"]), (o, state)

  return jax.value_and_grad(loss, has_aux=True)(arrays)


# Devices along (data, tensor, seq), how keys come, the window (within a part of T / seq and beyond
# it), whether there are documents and a state before.
CASES = [
  ((2, 2, 2), "ring", None, True, True),
  ((2, 2, 2), "all_gather", None, False, False),
  ((1, 2, 4), "all_gather", None, True, False),
  ((1, 1, 4), "ring", None, False, True),
  ((1, 1, 8), "ring", None, False, False),
  ((1, 1, 8), "all_gather", None, True, True),
  ((1, 1, 8), "all_gather", 9, True, True),
  ((1, 1, 8), "ring", 9, False, True),
  ((1, 1, 8), "all_gather", 5, False, True),
  ((1, 1, 8), "ring", 5, True, True),
  ((1, 2, 4), "ring", 4, True, False),
  ((1, 2, 4), "all_gather", 1, True, True),
]


@pytest.mark.parametrize(("layout", "sequence", "window", "packed", "carried"), CASES)
def test_equals_one_device(layout, sequence, window, packed, carried):
  data, tensor, seq = layout
  heads = 1 if seq == 4 else HQ  # one for all cannot be split over devices as queries are
  with jax.enable_x64(True):
    arrays, valid = inputs(window, carried, heads)
    ids = documents() if packed else None
    expected = run(arrays, valid, ids, window)
    with jax.set_mesh(make_mesh(seq, tensor, data)):
      actual = run(arrays, valid, ids, window, sequence)
  assert actual[0][1][0].dtype == np.float64
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9),
    jax.device_get(actual), jax.device_get(expected),
  )  # fmt: skip


@pytest.mark.parametrize(
  ("sequence", "window"), [("all_gather", None), ("ring", None), ("ring", 4)]
)
def test_padding_may_hold_anything(sequence, window):
  """Not-a-numbers in padding reach no token, and no gradient."""
  (arrays, _), ids = inputs(window, False), documents()
  bad = jax.tree.map(lambda x: jnp.where((ids < 0)[..., None, None], jnp.nan, x), arrays)
  with jax.set_mesh(make_mesh(8)):
    clean, spoilt = (run(given, None, ids, window, sequence) for given in (arrays, bad))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spoilt), jax.device_get(clean))


def sent(length, sequence, window, packed, differentiate):
  """Of every collective of a program that reads the outputs alone, (kind, count, arrays), with T
  for the tokens of a device."""
  mesh, P = make_mesh(8), 8
  split = jax.NamedSharding(mesh, jax.P(None, "seq"))
  array = lambda dtype, *axes: jax.ShapeDtypeStruct((B, length, *axes), dtype, sharding=split)
  q, k, v = (array(jnp.float32, heads, K) for heads in (H, HQ, HQ))
  ids = array(jnp.int32) if packed else None

  def loss(arrays, ids):
    o, _ = softmax_attention(
      *arrays, window=window, context=CONTEXT, segment_ids=ids, sequence=sequence
    )
    return jnp.sum(o**2) if differentiate else o

  function = jax.grad(loss) if differentiate else loss
  with jax.set_mesh(mesh):
    text = jax.jit(function).lower((q, k, v), ids).compile().as_text()
  name = lambda arrays: arrays.split("{")[0].replace(f",{length // P}", ",T")
  found = [(record.kind, record.count, name(record.arrays)) for record in collectives(text)]
  return sorted(record for record in found if record[2] != "f32[]")  # not the loss


KV = f"{HQ},{2 * K}]"
NUMBERS = [("all-gather", 1, f"s32[1,2,{B}]"), ("all-gather", 1, f"s32[1,{B}]")]
HOP = "collective-permute"


@pytest.mark.slow
def test_what_is_sent():
  """Keys and values once; of a window, what is not at hand, whatever T is."""
  length = 128
  tail, part = f"f32[{B},4,{KV}", f"f32[{B},T,{KV}"
  # Forward and backward in one program share what was gathered.
  back = lambda array: ("reduce-scatter", 1, array.replace("[", "[8,"))
  gathered = lambda array: ("all-gather", 1, array.replace("[", "[1,"))
  expected = {
    ("ring", 5, False): [(HOP, 1, tail)] * 2,
    ("ring", 5, True): [gathered(tail), *NUMBERS, back(tail)],
    ("all_gather", None, False): [gathered(part), back(part)],
    ("all_gather", None, True): [
      gathered(part), ("all-gather", 1, f"s32[1,2,{B},T]"), *NUMBERS, back(part)
    ],
    # Keys and values move 7 times forward and 7 times backward, their gradients 7 times and home.
    ("ring", None, False): [(HOP, 1, part), (HOP, 7, part), (HOP, 14, part)],
    ("ring", None, True): [
      *NUMBERS, (HOP, 1, part), (HOP, 7, part), (HOP, 7, f"s32[2,{B},T]"),
      (HOP, 7, f"s32[2,{B},T]"), (HOP, 14, part),
    ],
    # Two parts back suffice.
    ("ring", length // 8 + 2, False): [(HOP, 1, part), (HOP, 2, part), (HOP, 4, part)],
  }  # fmt: skip
  for case, collectives_of_case in expected.items():
    assert sent(length, *case, True) == sorted(collectives_of_case), case
    if case[1] == 5:
      assert sent(4 * length, *case, True) == sorted(collectives_of_case), case


def test_forward_passes_send_once():
  part = f"f32[{B},T,{KV}"
  assert sent(128, "ring", None, False, False) == [(HOP, 7, part)]
  assert sent(128, "ring", 5, False, False) == [(HOP, 1, f"f32[{B},4,{KV}")]
  assert sent(128, "all_gather", None, False, False) == [
    ("all-gather", 1, part.replace("[", "[1,"))
  ]
