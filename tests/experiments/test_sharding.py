"""Meshes and placement; and that training on any of them is training on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models, sharding, train_step
from experiments.errors import UserError
from lm_models import lm
from tests.experiments.small import Run, make_batch, make_config
from tests.quick_compilation import quick_compilation as quick_compilation

P = jax.P
EVERY_KIND = ("mamba", "sliding_attention", "attention")
MATRIX_STATE = ("mamba2", "gla", "retnet", "deltanet", "gated_deltanet", "kda", "plstm")
FACTORISATIONS = [
  (data, fsdp, 8 // data // fsdp)
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if data * fsdp <= 8
]


def sizes(**axes):
  """Sizes of all axes, 1 where not given."""
  return {**dict.fromkeys(sharding.AXES, 1), **axes}


def make(pattern, optimizer, mesh=(1, 1, 1)):
  """A run of a small model with an untied head on this mesh."""
  axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
  return Run(make_config(pattern, optim__name=optimizer, model__tied=False, **axes))


@functools.cache
def single(pattern, optimizer):
  """The state before, the losses of three steps, and the state after, on one device."""
  run = make(pattern, optimizer)
  state = run.start()
  return state, *train(run, state)


def train(run, before):
  """The losses of three steps and the state after them."""
  state, losses = run.place(before), []
  with run.on_mesh():
    for n in range(3):
      state, metrics = run.donating_step(state, sharding.place_batch(run.mesh, make_batch(n)))
      losses.append(float(metrics["loss"]))
  return losses, state


@pytest.mark.parametrize(
  "pattern, optimizer, mesh",
  [
    *((EVERY_KIND, "adamw", mesh) for mesh in FACTORISATIONS),
    (("mamba",), "adamw", (2, 2, 2)),
    (("attention",), "adamw", (2, 2, 2)),
    (("mamba", "sliding_attention"), "muon", (2, 2, 2)),
    (("mamba2", "kda"), "adamw", (2, 2, 2)),
  ],
)
def test_training_on_any_mesh_is_training_on_one_device(pattern, optimizer, mesh):
  before, expected, last = single(pattern, optimizer)
  assert len(set(expected)) == 3
  run = make(pattern, optimizer, mesh)
  losses, state = train(run, before)
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
  for got, truth in zip(jax.tree.leaves(state.params), jax.tree.leaves(last.params)):
    np.testing.assert_allclose(got, truth, atol=3e-4)  # a tenth of one step
  # It was really spread: each device holds its part of parameters and of both moments.
  _, fsdp, tensor = mesh
  for tree in (state.params, state.optimizer):
    matrices = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      if "in_proj" in jax.tree_util.keystr(path)
    ]
    assert matrices
    for leaf in matrices:
      assert leaf.addressable_shards[0].data.size * fsdp * tensor == leaf.size


def test_recurrent_models_are_split_by_heads():
  mesh = sharding.make_mesh(sizes(fsdp=4, tensor=2))
  config = models.language_model(make_config((*MATRIX_STATE, "paralstm", "gru")))
  params = jax.eval_shape(functools.partial(lm.init, config), jax.random.key(0))
  placed = sharding.parameter_shardings(mesh, params)
  whole = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if placed_at(placed, path).shard_shape(leaf.shape) == leaf.shape
  ]
  for name in whole:
    assert any(part in name for part in ("norm/scale", "bc_conv", "residual_scale")), name


def placed_at(tree, path):
  """The leaf of nested dicts at a key path."""
  for key in path:
    tree = tree[key.key]
  return tree


def test_initial_parameters_do_not_depend_on_the_mesh():
  run = make(EVERY_KIND, "adamw", (2, 2, 2))
  for got, truth in zip(
    jax.tree.leaves(run.start().params), jax.tree.leaves(single(EVERY_KIND, "adamw")[0].params)
  ):
    np.testing.assert_allclose(got, truth, atol=1e-6)


def test_streamed_states_lie_beside_their_rows():
  run = Run(make_config(("mamba", "sliding_attention"), data__mode="streaming", mesh__data=4))
  carry = train_step.abstract_state(run.config, run.mesh).carry
  for leaf in jax.tree.leaves(carry):
    assert leaf.sharding.shard_shape(leaf.shape)[1] == 2


@pytest.mark.parametrize(
  "axes, shape",
  [
    (sizes(data=-1), (8, 1, 1, 1)),
    (sizes(data=-1, fsdp=2, tensor=2), (2, 2, 2, 1)),
    (sizes(data=2, fsdp=-1), (2, 4, 1, 1)),
    (sizes(tensor=-1, data=8), (8, 1, 1, 1)),
    (sizes(data=4), (4, 1, 1, 1)),
    (sizes(data=2, seq=4), (2, 1, 1, 4)),
    (sizes(seq=-1), (1, 1, 1, 8)),
    (sizes(), (1, 1, 1, 1)),
  ],
)
def test_meshes(axes, shape):
  mesh = sharding.make_mesh(axes)
  assert mesh.axis_names == sharding.AXES and mesh.devices.shape == shape
  assert {kind.name for kind in mesh.axis_types} == {"Auto"}
  assert len({device.id for device in mesh.devices.flat}) == mesh.size


@pytest.mark.parametrize(
  "axes, message",
  [
    (sizes(fsdp=0), "mesh.fsdp is 0, must be at least 1, or -1"),
    (sizes(tensor=-2), "mesh.tensor is -2, must be at least 1, or -1"),
    (sizes(data=-1, fsdp=-1), "only one axis may be -1"),
    (sizes(data=16), "which 8 devices cannot fill"),
    (sizes(data=3), "which 8 devices cannot fill"),
    (sizes(data=-1, tensor=3), "which 8 devices cannot fill"),
    (sizes(data=-1, seq=3), "which 8 devices cannot fill"),
  ],
)
def test_impossible_meshes(axes, message):
  with pytest.raises(UserError, match=message) as error:
    sharding.make_mesh(axes)
  assert "\n" not in str(error.value)


def specs(tree, **axes):
  """{name: spec} of a dict of shapes on a mesh."""
  mesh = sharding.make_mesh(sizes(**axes))
  shapes = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree,
    is_leaf=lambda x: isinstance(x, tuple),
  )  # fmt: skip
  found = sharding.parameter_shardings(mesh, shapes)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(found)
  }


def test_rules_of_placement():
  mixer = {"in_proj": {"kernel": (2, 8, 2, 16)}, "out_proj": {"kernel": (2, 16, 8)}}
  attention = {"out_proj": {"kernel": (2, 4, 4, 8)}, "key_proj": {"kernel": (2, 8, 4, 4)}}
  tree = {
    "embedding": (16, 8),
    "head": (8, 16),
    "blocks": {"0_mamba": {"mixer": mixer}, "1_attention": {"mixer": attention, "mlp": mixer}},
  }
  expected = {
    "embedding": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    "blocks/0_mamba/mixer/in_proj/kernel": P(None, "fsdp", None, "tensor"),
    "blocks/0_mamba/mixer/out_proj/kernel": P(None, "tensor", "fsdp"),
    "blocks/1_attention/mixer/out_proj/kernel": P(None, "tensor", None, "fsdp"),
    "blocks/1_attention/mixer/key_proj/kernel": P(None, "fsdp", "tensor", None),
    "blocks/1_attention/mlp/in_proj/kernel": P(None, "fsdp", None, "tensor"),
    "blocks/1_attention/mlp/out_proj/kernel": P(None, "tensor", "fsdp"),
  }
  assert specs(tree, fsdp=2, tensor=4) == expected


def test_a_parameter_without_a_rule_is_named():
  with pytest.raises(UserError, match="has no rule for blocks/0_new/mixer/weird"):
    specs({"blocks": {"0_new": {"mixer": {"weird": (2, 3)}}}}, fsdp=2)


def test_a_dimension_that_does_not_divide_is_named():
  with pytest.raises(UserError) as error:
    specs({"embedding": (13, 8)}, tensor=4)
  assert str(error.value) == "mesh.tensor is 4, which does not divide the 13 of embedding (13, 8)"
  with pytest.raises(UserError, match=r"mesh.tensor is 8, which does not divide the 4 of blocks/"):
    Run(make_config(("attention",), mesh__tensor=8, model__attention__H=4))


def test_batches_are_spread_over_rows():
  mesh = sharding.make_mesh(sizes(data=2, fsdp=2, tensor=2))
  placed = sharding.place_batch(mesh, make_batch())
  for name, rows in make_batch().items():
    np.testing.assert_array_equal(placed[name], rows)
    shards = placed[name].addressable_shards
    assert len(shards) == 8 and {shard.data.shape[0] for shard in shards} == {2}
