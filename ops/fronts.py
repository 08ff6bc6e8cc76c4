"""`linear_attention` under the names of its models, with their own arguments.

Every front takes the keyword arguments of `ops.linear_attention` as `**options` (initial_state,
segment_ids, reverse, implementation, chunk_size, emit_states, tree_mask, accepted) and returns what
it returns. Each has a `_step` for one token, `o_t, state = front_step(state, inputs_t...)`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import dispatch
from ops.linear_attention import linear_attention, linear_attention_step
from ops.precision import state_dtype
from ops.segments import where_mask


def ssd(
  x: Float[Array, "B T H V"],
  dt: Float[Array, "B T H"],
  A: Float[Array, " H"],
  B: Float[Array, "B T G N"],
  C: Float[Array, "B T G N"],
  D: Float[Array, " H"] | None = None,
  **options,
) -> tuple[Array, ...]:
  """S <- exp(dt_t A) S + B_t (dt_t x_t)^T,   y_t = C_t^T S + D x_t:  Mamba-2's state-space duality.

  Dao and Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).

  Args:
    x: [B T H V], the heads' inputs.
    dt: [B T H], step sizes, used as given: apply softplus and the bias before.
    A: [H], real and negative.
    B, C: [B T G N], what the state takes in and what is read; each of the G groups serves H/G
      heads.
    D: [H], the skip connection; None is zero.
    **options: of `ops.linear_attention`; `scale` is 1, and the state [B H N V].
  """
  _check_ssd(x, dt, A, B, C, D, "B T")
  if (segment_ids := options.get("segment_ids")) is not None:
    # What padding holds must not reach the gradients of A and D.
    dispatch.check_segment_ids(segment_ids)
    dispatch.check_shapes(x=(x, "B T H V"), segment_ids=(segment_ids, "B T"))
    x, dt = where_mask(segment_ids >= 0, x), where_mask(segment_ids >= 0, dt)
  log_decay, values = _discretise(x, dt, A)
  scale = options.pop("scale", None)
  scale = 1.0 if scale is None else scale
  y, *rest = linear_attention(C, B, values, log_decay=log_decay, beta=None, scale=scale, **options)
  return _skip(y, x, D), *rest


def ssd_step(
  state: Float[Array, "B H N V"],
  x: Float[Array, "B H V"],
  dt: Float[Array, "B H"],
  A: Float[Array, " H"],
  B: Float[Array, "B G N"],
  C: Float[Array, "B G N"],
  D: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H N V"]]:
  """One token of `ssd`."""
  _check_ssd(x, dt, A, B, C, D, "B")
  log_decay, values = _discretise(x, dt, A)
  y, state = linear_attention_step(state, C, B, values, log_decay=log_decay, scale=1.0)
  return _skip(y, x, D), state


def _check_ssd(x, dt, A, B, C, D, leading):
  dispatch.check_shapes(
    x=(x, f"{leading} H V"), dt=(dt, f"{leading} H"), A=(A, "H"), B=(B, f"{leading} G N"),
    C=(C, f"{leading} G N"), D=(D, "H"),
  )  # fmt: skip
  dispatch.check_dtypes(x=x, dt=dt, A=A, B=B, C=C, D=D)


def _discretise(x, dt, A):
  dtype = state_dtype(x, dt, A)
  dt = dt.astype(dtype)
  return dt * A.astype(dtype), (dt[..., None] * x.astype(dtype)).astype(x.dtype)


def _skip(y, x, D):
  if D is None:
    return y
  dtype = state_dtype(x, D)
  skip = D.astype(dtype)[:, None] * x.astype(dtype)
  return (y.astype(dtype) + skip).astype(y.dtype)


def gla(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  **options,
) -> tuple[Array, ...]:
  """S <- diag(exp(g_t)) S + k_t v_t^T,   o_t = scale q_t^T S:  gated linear attention.

  Yang et al., "Gated Linear Attention Transformers", 2023 (arXiv:2312.06635). `g` is the logarithm
  of the decay, <= 0; the rest is as in `ops.linear_attention`.
  """
  dispatch.check_shapes(v=(v, "B T H V"), k=(k, "B T Hq K"), g=(g, "B T H K"))
  return linear_attention(q, k, v, log_decay=g, beta=None, **options)


def gla_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `gla`."""
  dispatch.check_shapes(v=(v, "B H V"), k=(k, "B Hq K"), g=(g, "B H K"))
  return linear_attention_step(state, q, k, v, log_decay=g, scale=scale)


def delta_rule(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  beta: Float[Array, "B T H"],
  **options,
) -> tuple[Array, ...]:
  """S <- S + k_t (beta_t (v_t - k_t^T S))^T,   o_t = scale q_t^T S:  DeltaNet.

  Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021
  (arXiv:2102.11174); Yang et al., 2024 (arXiv:2406.06484). Keys should have norm 1
  (`ops.l2_normalize`) and beta lie in [0, 2]; the rest is as in `ops.linear_attention`.
  """
  return linear_attention(q, k, v, log_decay=None, beta=beta, **options)


def delta_rule_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  beta: Float[Array, "B H"],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `delta_rule`."""
  return linear_attention_step(state, q, k, v, beta=beta, scale=scale)


def gated_delta_rule(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H"],
  beta: Float[Array, "B T H"],
  **options,
) -> tuple[Array, ...]:
  """S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - k_t^T S))^T;  o_t = scale q_t^T S.

  Gated DeltaNet: Yang et al., 2024 (arXiv:2412.06464). Arguments as in `delta_rule` and `gla`.
  """
  dispatch.check_shapes(v=(v, "B T H V"), g=(g, "B T H"))
  return linear_attention(q, k, v, log_decay=g, beta=beta, **options)


def gated_delta_rule_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H"],
  beta: Float[Array, "B H"],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `gated_delta_rule`."""
  dispatch.check_shapes(v=(v, "B H V"), g=(g, "B H"))
  return linear_attention_step(state, q, k, v, log_decay=g, beta=beta, scale=scale)


def kda(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  beta: Float[Array, "B T H"],
  **options,
) -> tuple[Array, ...]:
  """S <- diag(exp(g_t)) S;  S <- S + k_t (beta_t (v_t - k_t^T S))^T;  o_t = scale q_t^T S.

  Kimi Delta Attention: Kimi Team, "Kimi Linear", 2025 (arXiv:2510.26692). The gated delta rule with
  a decay for each row of the state.
  """
  dispatch.check_shapes(v=(v, "B T H V"), k=(k, "B T Hq K"), g=(g, "B T H K"))
  return linear_attention(q, k, v, log_decay=g, beta=beta, **options)


def kda_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  beta: Float[Array, "B H"],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `kda`."""
  dispatch.check_shapes(v=(v, "B H V"), k=(k, "B Hq K"), g=(g, "B H K"))
  return linear_attention_step(state, q, k, v, log_decay=g, beta=beta, scale=scale)


def retention(
  q: Float[Array, "B T Hq K"],
  k: Float[Array, "B T Hq K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, " H"] | None = None,
  **options,
) -> tuple[Array, ...]:
  """S <- exp(g) S + k_t v_t^T,   o_t = scale q_t^T S:  RetNet, one constant decay for each head.

  Sun et al., "Retentive Network", 2023 (arXiv:2307.08621). `g` [H] is the logarithm of the decay;
  None is log(1 - 2^(-5-h)) for head h. Rotary positions belong to q and k, applied before.
  """
  g = retention_decay(v.shape[-2]) if g is None else g
  dispatch.check_shapes(v=(v, "B T H V"), g=(g, "H"))
  # Wide before it is repeated, for its gradient is a sum over all tokens.
  g = jnp.broadcast_to(g.astype(state_dtype(g)), v.shape[:3])
  return linear_attention(q, k, v, log_decay=g, beta=None, **options)


def retention_step(
  state: Float[Array, "B H K V"],
  q: Float[Array, "B Hq K"],
  k: Float[Array, "B Hq K"],
  v: Float[Array, "B H V"],
  g: Float[Array, " H"] | None = None,
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of `retention`."""
  g = retention_decay(v.shape[-2]) if g is None else g
  dispatch.check_shapes(v=(v, "B H V"), g=(g, "H"))
  return linear_attention_step(
    state, q, k, v, log_decay=jnp.broadcast_to(g, v.shape[:2]), scale=scale
  )


def retention_decay(H: int) -> Float[Array, " H"]:
  """log(1 - 2^(-5-h)) for heads h = 0 .. H-1, float32: RetNet's decays."""
  return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(H, dtype=jnp.float32))))
