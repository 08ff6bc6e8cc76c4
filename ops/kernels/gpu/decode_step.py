"""One token of `linear_attention` on Hopper GPUs, every kind of it, in one kernel and in place.

  S <- exp(g) S;   S <- S + k (beta (v - k^T S))^T;   o = scale q^T S

The state passes through registers once. A program owns some columns of V of one head, all rows of
them: columns do not mix, so that programs need nothing from each other. Everything is float32, on
the ordinary cores: for one token there is no matrix product.

The kernel is imported when it runs: older versions of jax lack what it uses.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.kernels.gpu import heuristics
from ops.kernels.gpu.scalar_decay import folding_mapped_axes

COLUMNS = 32  # of V per program, or
WIDE = 64  # where that fits in registers
ROWS = 16  # K is a multiple of it: those that the threads of a program hold at a time
LARGEST = 256  # K: more would not fit in registers


def supports(*, q, k, v, log_decay, beta, initial_state=None, **arguments) -> dispatch.Reason:
  """Why the kernel cannot run one token of `linear_attention`; None if it can."""
  reason = heuristics.no_hopper()
  if reason:
    return reason
  if v.shape[1] != 1:
    return f"it takes one token, these are {v.shape[1]}"
  K, V = q.shape[-1], v.shape[-1]
  if K % ROWS or K > LARGEST:
    return f"K is {K}, it takes multiples of {ROWS} up to {LARGEST}"
  if V % COLUMNS:
    return f"V is {V}, it takes multiples of {COLUMNS}"
  if any(x is not None and x.dtype.itemsize > 4 for x in (q, k, v, log_decay, beta, initial_state)):
    return "it works in float32, float64 is given"
  return None


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B 1 Hq M V] and the state [B Hq M K V], float32; T is 1.

  Padding needs no mask: its tokens are zeros without decay, which leave the state as it is.
  """
  B, _, Hq, M, _ = tokens.v.shape
  heads = lambda x: None if x is None else x.reshape(B, Hq * M, *x.shape[4:])
  q, k = tokens.q[:, 0], tokens.k[:, 0]
  if not isinstance(scale, (int, float)):
    q, scale = q * scale, 1.0
  v, log_decay, beta = map(heads, (tokens.v, tokens.log_decay, tokens.beta))
  flat = state.reshape(B, Hq * M, *state.shape[3:])
  o, flat = step(flat, q, k, v, log_decay, beta, scale)
  return o.reshape(tokens.v.shape), flat.reshape(state.shape)


def step(state, q, k, v, log_decay, beta, scale, interpret=None):
  """o [B H V] and the new state, with gradients.

  Args:
    state: float32 [B H K V].
    q, k, v: float32 [B Hq K], [B H V]; H is a multiple of Hq.
    log_decay: float32 [B H], or [B H K], or None.
    beta: float32 [B H], or None.
    scale: multiplies q.
    interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
  """
  return _step(state, q, k, v, log_decay, beta, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _step(state, q, k, v, log_decay, beta, scale, interpret):
  call = functools.partial(launch, scale=scale, interpret=interpret)
  return folding_mapped_axes(call)(state, q, k, v, log_decay, beta)


def _step_forward(*arguments):
  *arrays, _, _ = arguments
  return _step(*arguments), arrays


def _step_backward(scale, interpret, arrays, cotangents):
  return jax.vjp(functools.partial(plain, scale=scale), *arrays)[1](cotangents)


_step.defvjp(_step_forward, _step_backward)


def plain(state, q, k, v, log_decay, beta, *, scale):
  """What `step` computes, for its gradients."""
  contract = functools.partial(jnp.einsum, precision="highest")
  q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
  if log_decay is not None:
    state = jnp.exp(log_decay).reshape(*v.shape[:2], -1, 1) * state
  if beta is not None:
    v = beta[..., None] * (v - contract("bhk,bhkv->bhv", k, state))
  state = state + k[..., None] * v[:, :, None]
  return scale * contract("bhk,bhkv->bhv", q, state), state


def launch(state, q, k, v, log_decay, beta, *, scale, columns=None, interpret=None):
  """One call of the kernel; arguments as of `step`. Where XLA needs the old state no more, the new
  one takes its memory."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  (B, H, V), (Hq, K) = v.shape, k.shape[1:]
  columns = columns or (WIDE if K <= 128 and V % WIDE == 0 else COLUMNS)
  # 4 warps one below the other; a thread has 4 neighbouring columns, of every 16th row of 32, or of
  # every 8th row of 64.
  lanes = columns // 4
  tiles = (4 * 32 // lanes, columns), (32 // lanes, columns), (4,)
  layout = plgpu.Layout.TILED(
    plgpu.Tiling(tiles), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
  )

  def kernel(state_hbm, q_hbm, k_hbm, v_hbm, log_decay_hbm, beta_hbm, o_hbm):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    shared = lax.div(head, jnp.int32(H // Hq))
    here = pl.ds(lax.axis_index("block") * columns, columns)
    read = functools.partial(plgpu.load, optimized=False)
    spread = lambda x, axis: plgpu.layout_cast(
      lax.broadcast_in_dim(x, (K, columns), [axis]), layout
    )
    by_row = lambda ref: spread(read(ref, layout=layout.reduce(1)), 0)
    S = read(state_hbm.at[batch, head, :, here], layout=layout)
    key, query = by_row(k_hbm.at[batch, shared]), by_row(q_hbm.at[batch, shared])
    write = read(v_hbm.at[batch, head, here], layout=layout.reduce(0))
    if log_decay is not None and log_decay.ndim == 3:
      S = S * jnp.exp(by_row(log_decay_hbm.at[batch, head]))
    elif log_decay is not None:
      S = S * jnp.exp(log_decay_hbm[batch, head])
    if beta is not None:
      write = (write - jnp.sum(key * S, axis=0)) * beta_hbm[batch, head]
    S = S + key * spread(write, 1)
    state_hbm[batch, head, :, here] = S
    o_hbm[batch, head, here] = jnp.sum(query * S, axis=0) * scale

  memory = jax.new_ref(state)
  o = pl.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((B, H, V), jnp.float32),
    mesh=plgpu.Mesh(grid=(V // columns, H, B), grid_names=("block", "head", "batch")),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
    name="linear_attention_step",
  )(memory, q, k, v, log_decay, beta)
  return o, jax.freeze(memory)
