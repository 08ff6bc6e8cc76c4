"""The Hopper kernels of nonlinear recurrences, in the interpreter on a CPU, and lowered for a GPU
that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import newton, reference
from ops.kernels.gpu import newton as kernels
from ops.kernels.gpu import newton_cell
from tests.ops import cells
from tests.ops.compare import objective
from tests.ops.kernels.hopper import lowered, needs_mosaic, on_hopper


def _by_kernel(monkeypatch, segments=1):
  """`newton_scan` with the kernel in the interpreter, whatever the device."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from ops.kernels.gpu import newton_loop

  options = dict(segments=segments, interpret=plgpu.InterpretGPUParams())
  monkeypatch.setattr(kernels, "scan", functools.partial(kernels.scan, **options))
  monkeypatch.setattr(newton_loop, "TILE", 2)  # a short program

  def scan(cell, params, x, state, segment_ids=None):
    options = newton.Options(4, None, "newton", 0.0, 1.0, None, "ignore", 1e-3)
    problem = newton.pose(cell, params, x, state, segment_ids, False, options)
    h, _ = kernels.run(cell, options, problem.params, problem.tokens, problem.state)
    return problem.answer(h, h[:, -1], None)

  return scan


def _with_gradients(function, *arguments):
  """h, the final state and the gradients of all arguments."""

  def loss(*arguments):
    h, state = function(*arguments)
    return objective(h, state), (h, state)

  places = tuple(range(len(arguments)))
  gradients, values = jax.jit(jax.grad(loss, argnums=places, has_aux=True))(*arguments)
  return jax.tree.map(np.asarray, (values, gradients))


def _close(actual, expected, limit=1e-5):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit * max(np.sqrt(np.mean(b**2)), 1e-3))


def glu(params, h, x):
  """Several arrays of tokens, a parameter that all channels share, and functions of no gate."""
  mixed = jnp.moveaxis(x["u"], -2, 0)[1] * params["rate"][1] + jnp.exp(-h * h) * x["v"]
  return jnp.where(h > x["v"], jnp.sin(mixed), jax.nn.gelu(h)) * params["size"]


def _draw(name, B, T):
  if name != "glu":
    return cells.CELLS[name], *cells.draw(name, B, T)
  rng = np.random.default_rng(0)
  params = {"rate": rng.normal(size=2), "size": np.float64(0.9)}
  x = {"u": rng.normal(size=(B, T, 2, 3)), "v": rng.normal(size=(B, T, 3))}
  return ops.Cell(glu, "diagonal"), params, x, rng.normal(size=(B, 3))


@needs_mosaic
@pytest.mark.parametrize(
  ("name", "B", "T", "starts", "segments"),
  [
    ("diagonal", 2, 12, True, 1),
    ("block", 1, 7, True, 1),
    ("glu", 1, 1, False, 1),
    ("diagonal", 2, 12, True, 3),
    ("block", 1, 4, False, 2),
  ],
)
def test_values_and_gradients(monkeypatch, name, B, T, starts, segments):
  cell, params, x, state = _draw(name, B, T)
  ids = np.random.default_rng(1).integers(-1, 2, (B, T)).astype(np.int32)
  ids = jnp.asarray(ids) if starts else None
  scan = _by_kernel(monkeypatch, segments)
  run = lambda params, x, state: scan(cell, params, x, state, ids)
  actual = _with_gradients(run, *cells.narrow((params, x, state)))
  with jax.enable_x64(True):
    oracle = lambda params, x, state: reference.nonlinear_scan(
      cell.step, params, x, state, segment_ids=ids
    )
    expected = _with_gradients(oracle, params, x, state)
  _close(actual, expected)


@needs_mosaic
def test_what_is_no_number_stays_in_its_document(monkeypatch):
  x, state, ids = cells.spoilt("input", [8, 4, 8])
  x = x.at[0, 12, 1].set(0).at[0, 3, 1].set(jnp.nan)
  scan = _by_kernel(monkeypatch, segments=5)
  run = jax.jit(lambda x: scan(cells.TOGGLE, jnp.float32(0.9), x, state, ids)[0])
  expected = np.zeros((2, 20, 3), bool)
  expected[0, 3:8, 1] = True
  np.testing.assert_array_equal(np.isnan(run(x)), expected)


@needs_mosaic
def test_vmap_over_parameters(monkeypatch):
  cell, params, x, state = _draw("diagonal", 1, 2)
  scan = _by_kernel(monkeypatch)
  several = np.stack([params, -params])
  run = jax.vmap(lambda params, x, state: scan(cell, params, x, state), in_axes=(0, None, None))
  actual = _with_gradients(run, *cells.narrow((several, x, state)))
  oracle = lambda params, x, state: reference.nonlinear_scan(cell.step, params, x, state)
  with jax.enable_x64(True):
    oracle = jax.vmap(oracle, in_axes=(0, None, None))
    _close(actual, _with_gradients(oracle, several, x, state))


@pytest.mark.parametrize(
  ("step", "reason"),
  [
    (lambda a, h, x: h * jnp.mean(a) + x, "reduce_sum takes channels together"),
    (lambda a, h, x: jax.nn.relu(h) + x, "has custom_jvp_call"),
    (lambda a, h, x: h[..., ::-1] + x, "no word for it"),
    (lambda a, h, x: h * a[:2].reshape(3, 2)[0] + x, "other than channels"),
    (lambda a, h, x: h * np.arange(3.0, dtype=np.float32) + x, "other than channels"),
  ],
)
def test_cells_that_are_refused(step, reason):
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  with pytest.raises(newton_cell.Refusal, match=reason):
    newton_cell.trace(step, struct(4, 3), struct(1, 3), struct(1, 3))


@needs_mosaic
@pytest.mark.parametrize("name", ["diagonal", "block"])
def test_lowers_for_a_hopper_gpu(name):
  cell, *arrays = _draw(name, 2, 50)
  ids = jnp.zeros((2, 50), jnp.int32)

  def loss(params, x, state):
    h, state = ops.newton_scan(
      cell, params, x, initial_state=state, segment_ids=ids, implementation="pallas"
    )
    return jnp.sum(h) + jnp.sum(state)

  text = lowered(jax.grad(loss, argnums=(0, 1, 2)), *cells.narrow(arrays))
  assert text.count("custom_call @mosaic_gpu_v2") == 2


@needs_mosaic
def test_devices_share_rows_and_channels():
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  arrays = struct(3, 256), struct(2, 64, 3, 256), struct(2, 256)
  scan = lambda a, x, h: ops.newton_scan(cells.GRU, a, x, initial_state=h)
  text = lowered(scan, *arrays, data=2, tensor=2)
  (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line)
  assert "tensor<1x64x3x128xf32>" in call


@needs_mosaic
def test_explain_tells_why_a_cell_cannot_run():
  cell, params, x, state = _draw("dense", 1, 4)
  params, x, state = cells.narrow((params, x, state))
  with on_hopper():
    text = ops.explain(ops.newton_scan, cell, params, x, initial_state=state)
  assert "the cell is dense: channels mix" in text
