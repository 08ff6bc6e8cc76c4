"""Running an op with all its gradients, and comparing with the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Largest error allowed, in units of the reference's root mean square: for outputs and states, and
# for gradients. In bfloat16 the root mean square of the error is limited too.
LARGEST = {"float64": (1e-10, 1e-10), "float32": (2e-5, 1e-4), "bfloat16": (5e-2, 8e-2)}
TYPICAL = {"bfloat16": (5e-3, 8e-3)}


def cast(inputs: dict, dtype: str) -> dict:
  """float64 inputs rounded to `dtype` (complex to its partner); the state to float32 at least."""
  wide = "float64" if dtype == "float64" else "float32"

  def one(name, x):
    if np.iscomplexobj(x):
      return np.asarray(x, {"float64": np.complex128, "float32": np.complex64}[dtype])
    return np.asarray(x, jnp.dtype(wide if name == "initial_state" else dtype))

  return {name: one(name, x) for name, x in inputs.items()}


def widen(inputs: dict) -> dict:
  return {
    name: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    for name, x in inputs.items()
  }


def weights(shape, seed: int = 0) -> np.ndarray:
  """Cotangents, as eighths, which are exact in bfloat16."""
  rng = np.random.default_rng([seed, *shape])
  return rng.integers(-12, 13, size=shape) / 8


def objective(o, state, seed: int = 0):
  """A scalar that weighs every number of the output and of the final state differently."""
  total = 0.0
  for i, x in enumerate((o, state)):
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    for j, part in enumerate(parts):
      total += jnp.sum(part * jnp.asarray(weights(part.shape, seed + 2 * i + j), part.dtype))
  return total


def run(function, inputs: dict, segment_ids=None, **options) -> dict[str, np.ndarray]:
  """Output, final state and the gradients ("d" + name) of `objective`, compiled together."""
  segments = {} if segment_ids is None else {"segment_ids": segment_ids}
  arrays = jax.tree.map(jnp.asarray, (inputs, segments))
  return jax.tree.map(np.asarray, compiled(function, **options)(*arrays))


@functools.cache
def compiled(function, **options):
  """The program behind `run`, kept so that laws on equal shapes share one compilation."""

  @jax.jit
  def everything(inputs, segments):
    def loss(inputs):
      o, state = function(**inputs, **segments, **options)
      return objective(o, state), (o, state)

    (_, (o, state)), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return {"o": o, "state": state, **{"d" + name: g for name, g in gradients.items()}}

  return everything


def truth(oracle, inputs: dict, **options) -> dict[str, np.ndarray]:
  """`run` of the oracle on the same inputs, in float64."""
  with jax.enable_x64(True):
    return run(oracle, widen(inputs), **options)


def check(actual: dict, expected: dict, dtype: str = "float32", where: str = ""):
  """Every tensor within the limits of `dtype`."""
  assert actual.keys() == expected.keys()
  for name, reference in expected.items():
    gradient = name.startswith("d")
    x = actual[name].astype(reference.dtype)
    assert x.shape == reference.shape, name
    assert np.isfinite(x).all(), f"{where} {name} is not finite"
    rms = np.sqrt(np.mean(np.abs(reference) ** 2)) if reference.size else 1.0
    error = np.abs(x - reference) / (rms or 1.0)
    largest = error.max(initial=0.0)
    assert largest <= LARGEST[dtype][gradient], f"{where} {name}: largest error {largest:.2e}"
    if dtype in TYPICAL:
      typical = np.sqrt(np.mean(error**2)) if error.size else 0.0
      assert typical <= TYPICAL[dtype][gradient], f"{where} {name}: typical error {typical:.2e}"


@functools.cache
def segment_ids(T: int) -> np.ndarray:
  """int32 [4 T]: padding at the left, between (also inside a document), at the right, only."""
  rng = np.random.default_rng(T)
  lengths = rng.integers(1, max(2, T // 3) + 1, size=(4, T))
  ids = np.stack([np.repeat(rng.integers(0, 3, T), lengths[i])[:T] for i in range(4)])
  ids[0, : T // 4] = -1
  ids[1, rng.random(T) < 0.3] = -2
  ids[2, T - T // 3 :] = -1
  ids[3] = -1
  return ids.astype(np.int32)
