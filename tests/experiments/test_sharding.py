"""Meshes and placement; that parameters are the same on all of them, and what is sent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import collectives, limits, models, sharding, train_step
from experiments.errors import UserError
from experiments.tasks import make_task
from lm_models import layers, lm
from tests.experiments.small import Run, make_batch, make_config
from tests.quick_compilation import quick_compilation as quick_compilation

P = jax.P
EVERY_KIND = ("mamba", "sliding_attention", "attention")
MATRIX_STATE = ("mamba2", "gla", "retnet", "deltanet", "gated_deltanet", "kda", "plstm")


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
    (EVERY_KIND, "adamw", (2, 2, 2)),
    (("mamba", "sliding_attention"), "muon", (2, 2, 2)),
  ],
)
def test_parameters_after_training_on_a_mesh_are_those_of_one_device(pattern, optimizer, mesh):
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


@dataclasses.dataclass(frozen=True)
class Device:
  """What `make_mesh` asks of a device."""

  id: int
  process_index: int
  slice_index: int | None = None
  platform: str = "gpu"
  device_kind: str = "a GPU"


def devices_of(slices, each, per_process=2, **fields):
  """So many slices of so many devices."""
  return [
    Device(i, i // per_process, slice_index=i // each, **fields) for i in range(slices * each)
  ]


@pytest.mark.parametrize(
  "axes, crossing",
  [
    (sizes(data=-1, fsdp=4), ("data", "fsdp")),
    (sizes(data=4, fsdp=2), ("data",)),
    (sizes(data=2, fsdp=2, tensor=2), ("data", "fsdp")),
    (sizes(fsdp=8), ("fsdp",)),
    (sizes(fsdp=2, tensor=2, seq=2), ("fsdp", "seq")),
    (sizes(tensor=2, seq=4), ("seq",)),
    (sizes(tensor=8), ("tensor",)),
  ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_slices_are_crossed_by_the_axes_that_say_least(axes, crossing, shuffle):
  devices = devices_of(slices=4, each=2)
  if shuffle:
    devices = [devices[i] for i in np.random.default_rng(0).permutation(8)]
  grid = sharding.make_mesh(axes, devices).devices
  assert {device.id for device in grid.flat} == set(range(8))
  slices = np.vectorize(lambda device: device.slice_index)(grid)
  found = [
    axis
    for place, axis in enumerate(sharding.AXES)
    if (slices != np.take(slices, [0], axis=place)).any()
  ]
  assert tuple(found) == crossing


def test_slices_lie_in_blocks_within_an_axis():
  grid = sharding.make_mesh(sizes(data=4, tensor=4), devices_of(slices=2, each=8)).devices
  assert [[device.slice_index for device in row] for row in grid[:, 0, :, 0]] == [
    [0] * 4, [0] * 4, [1] * 4, [1] * 4,
  ]  # fmt: skip


def test_three_slices():
  grid = sharding.make_mesh(sizes(data=3, fsdp=2), devices_of(slices=3, each=2)).devices
  assert [device.slice_index for device in grid[:, 0, 0, 0]] == [0, 1, 2]


def test_hosts_count_where_there_are_no_slices():
  devices = [Device(i, process_index=i // 4) for i in range(8)]
  grid = sharding.make_mesh(sizes(tensor=2, seq=4), devices).devices[0, 0]
  assert [device.process_index for device in grid[0]] == [0, 0, 1, 1]
  assert [device.process_index for device in grid[1]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
  "axes, devices, message",
  [
    (sizes(data=8), devices_of(4, 4, per_process=4), "8 of 16 devices and none of process 2: "),
    (sizes(data=6), devices_of(3, 4, per_process=12), "6 of 12 devices, 4, 2 of each slice or "),
  ],
)
def test_meshes_that_leave_too_many_devices_out(axes, devices, message):
  with pytest.raises(UserError, match=message) as error:
    sharding.make_mesh(axes, devices)
  assert "\n" not in str(error.value)


def test_a_mesh_may_leave_a_whole_slice_out():
  mesh = sharding.make_mesh(sizes(data=6), devices_of(2, 6, per_process=12))
  assert {device.slice_index for device in mesh.devices.flat} == {0}


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


def test_images_are_spread_over_all_axes_but_tensor():
  mesh = sharding.make_mesh(sizes(data=2, tensor=2, seq=2))
  arrays = {"images": 4, "targets": 1}
  batch = {"images": np.arange(8 * 12.0).reshape(8, 2, 2, 3), "targets": np.arange(8)}
  placed = sharding.place_batch(mesh, batch)
  for name, rows in batch.items():
    np.testing.assert_array_equal(placed[name], rows)
  assert {shard.data.shape for shard in placed["images"].addressable_shards} == {(2, 2, 2, 3)}
  sharding.check_rows(mesh, arrays, "train.batch_size", 8)
  with pytest.raises(UserError) as error:
    sharding.check_rows(mesh, arrays, "train.batch_size", 6)
  assert str(error.value) == (
    "train.batch_size is 6, must be a multiple of mesh.data * mesh.fsdp * mesh.seq = 4"
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"data__T": 6}, r"^data.T is 6, must be a multiple of mesh.seq = 4$"),
    ({"data__T": 8, "eval__T": 10}, r"^eval.T is 10, must be a multiple of mesh.seq = 4$"),
    (
      {"data__name": "parity", "data__T": 8, "eval__lengths": (8, 9)},
      r"^eval.lengths is 9, must be a multiple of mesh.seq = 4$",
    ),
    (
      {"data__T": 8, "train__batch_size": 3, "mesh__data": 2},
      r"^train.batch_size is 3, must be a multiple of mesh.data \* mesh.fsdp = 2$",
    ),
    (
      {"data__T": 8, "mesh__exchange": "ring"},
      r"^mesh.exchange is ring, must be one of all_gather, all_scan, doubling, auto$",
    ),
  ],
)
def test_what_devices_do_not_divide_is_named(fields, message):
  config = make_config(("gla",), **{"mesh__seq": 4, **fields})
  with pytest.raises(UserError, match=message):
    limits.check(config)
    mesh = sharding.make_mesh(config.mesh)
    train_step.make_step(config, mesh)
    make_task(config).evaluator(mesh)


def model_on(pattern, mesh, vocab_size=24, **fields):
  """A small language model, and a mesh to run it on."""
  config = make_config(pattern, model__vocab_size=vocab_size, **fields)
  return models.language_model(config), sharding.make_mesh(dict(zip(sharding.AXES, mesh)))


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_models_are_partitioned_without_a_copy_of_everything(mesh, tied, capfd):
  model, mesh = model_on(("retnet",), mesh, model__tied=tied)
  params = jax.eval_shape(functools.partial(lm.init, model), jax.random.key(0))
  shardings = sharding.parameter_shardings(mesh, params)
  tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
  rows = sharding.batch_sharding(mesh, 2)

  def loss(params, tokens):
    return jnp.mean(lm.token_nats(model, params, tokens, tokens)[0])

  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss), in_shardings=(shardings, rows), out_shardings=shardings)
    capfd.readouterr()
    gradient.lower(params, tokens).compile()
  assert "Involuntary full rematerialization" not in capfd.readouterr().err


# Fewer vectors are looked up than there are rows, and more: the table stays split, or it does not.
@pytest.mark.parametrize("B, kinds", [(4, {"all-gather", "all-reduce"}), (64, {"all-gather"})])
def test_a_look_up_on_a_mesh_is_a_look_up(B, kinds):
  mesh = sharding.make_mesh(sizes(fsdp=2, tensor=2, seq=2))
  table = jax.random.normal(jax.random.key(0), (24, 4))
  tokens = jax.random.randint(jax.random.key(1), (B, 8), 0, 24)
  place = (jax.NamedSharding(mesh, P("tensor", "fsdp")), sharding.batch_sharding(mesh, 2))
  cubes = lambda look_up: lambda table, tokens: jnp.sum(look_up(table, tokens) ** 3)
  with jax.set_mesh(mesh):
    placed = jax.device_put((table, tokens), place)
    forward = jax.jit(layers.look_up, in_shardings=place).lower(*placed).compile()
    gradient = jax.jit(jax.grad(cubes(layers.look_up)), in_shardings=place)(*placed)
  assert set(collectives.totals(collectives.collectives(forward.as_text()))) == kinds
  np.testing.assert_array_equal(forward(*placed), table[tokens])
  truth = jax.grad(cubes(lambda table, tokens: table[tokens]))(table, tokens)
  np.testing.assert_allclose(gradient, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_loss_of_a_split_sequence_sends_nothing_that_grows_with_it(chunk):
  model, mesh = model_on(("retnet",), (1, 1, 2, 4), model__loss_chunk=chunk)
  params = lm.init(model, jax.random.key(0))
  nats = lambda params, tokens: jnp.mean(lm.token_nats(model, params, tokens, tokens)[0])
  gradient = jax.value_and_grad(nats)
  sent = {}
  for T in (32, 64):
    tokens = jax.random.randint(jax.random.key(T), (2, T), 0, 24)
    expected = jax.jit(gradient)(params, tokens)
    with jax.set_mesh(mesh):
      place = (sharding.parameter_shardings(mesh, params), sharding.batch_sharding(mesh, 2))
      compiled = jax.jit(gradient, in_shardings=place).lower(params, tokens).compile()
      got = compiled(*jax.device_put((params, tokens), place))
    for x, truth in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
      np.testing.assert_allclose(x, truth, atol=1e-5)
    records = collectives.collectives(compiled.as_text())
    sent[T] = [r for r in records if r.group_size == 4]
  # Along time. Sums over the width that `tensor` splits are of activations, hence grow.
  count = lambda records: sorted((r.kind, r.count, r.bytes) for r in records)
  assert sent[32] and count(sent[32]) == count(sent[64])


def test_running_counts_start_anew_in_no_part():
  mask = jax.random.bernoulli(jax.random.key(0), 0.5, (4, 24))
  with jax.set_mesh(sharding.make_mesh(sizes(data=2, seq=4))):
    got = jax.jit(layers.running_count)(mask)
  np.testing.assert_array_equal(got, np.cumsum(mask, axis=1))
  assert got.dtype == jnp.int32


def test_prompts_and_tokens_on_a_mesh_that_splits_time():
  model, mesh = model_on(("retnet", "sliding_attention"), (1, 2, 2, 2))
  params = lm.init(model, jax.random.key(0))
  prompt = jax.random.randint(jax.random.key(1), (1, 7), 0, 24)

  def sample(params):
    logits, state = lm.apply(model, params, prompt, lm.init_state(model, 1))
    return logits, lm.decode_step(model, params, jnp.argmax(logits[:, -1], axis=-1), state)

  expected = jax.jit(sample)(params)
  with jax.set_mesh(mesh):
    got = jax.jit(sample)(jax.device_put(params, sharding.parameter_shardings(mesh, params)))
  for x, truth in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(x, truth, atol=1e-5)
