"""The oracles: one obvious loop over tokens per op, in the dtype of the inputs (give them
float64), no cleverness.

Documents are handled the plain way: reset where the id differs from the last real one, skip what
is padding.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _loop(update, state, inputs, segment_ids, reverse):
  """Scans `update(state, token) -> (state, output)` over time, with resets and padding."""
  rows, length = jax.tree.leaves(inputs)[0].shape[:2]
  ids = jnp.zeros((rows, length), jnp.int32) if segment_ids is None else segment_ids

  def step(carry, token):
    state, last_id = carry
    inputs, id = token
    real = id >= 0
    start = real & (last_id >= 0) & (id != last_id)
    pick = lambda mask, x, y: jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), x, y)
    inputs = jax.tree.map(lambda x: pick(real, x, jnp.zeros_like(x)), inputs)
    new_state, output = update(pick(start, jnp.zeros_like(state), state), inputs)
    carry = pick(real, new_state, state), jnp.where(real, id, last_id)
    return carry, pick(real, output, jnp.zeros_like(output))

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, ids))
  nobody = jnp.full((rows,), -1, jnp.int32)
  (state, _), outputs = jax.lax.scan(step, (state, nobody), tokens, reverse=reverse)
  return jnp.moveaxis(outputs, 0, 1), state


def linear_scan(a, b, *, initial_state=None, segment_ids=None, reverse=False):
  """h_t = a_t h_{t-1} + b_t;  a, b [B T D], state [B D]."""

  def update(h, token):
    a, b = token
    h = a * h + b
    return h, h

  if initial_state is None:
    initial_state = jnp.zeros_like(a[:, 0] * b[:, 0])
  return _loop(update, initial_state, (a, b), segment_ids, reverse)


def nonlinear_scan(step, params, x, initial_state, *, segment_ids=None, reverse=False):
  """h_t = step(params, h_{t-1}, x_t);  x any pytree of [B T ...] arrays, state [B ...]."""

  def update(h, x):
    h = step(params, h, x)
    return h, h

  return _loop(update, initial_state, x, segment_ids, reverse)


def selective_scan(x, dt, A, B, C, D=None, *, initial_state=None, segment_ids=None, reverse=False):
  """h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t, y_t = h_t C_t + D x_t;  state [B D N]."""

  def update(h, token):
    x, dt, B, C = token
    h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
    y = jnp.sum(h * C[:, None, :], axis=-1)
    return h, y if D is None else y + D * x

  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], *A.shape), x.dtype)
  return _loop(update, initial_state, (x, dt, B, C), segment_ids, reverse)


def causal_conv(x, weight, bias=None, *, initial_state=None, segment_ids=None, reverse=False):
  """y_t = bias + sum_w weight[w] x_{t-(W-1)+w};  weight [W D], state [B W-1 D]."""

  def update(state, x):
    window = jnp.concatenate([state, x[:, None]], axis=1)
    y = jnp.sum(window * weight, axis=1)
    return window[:, 1:], y if bias is None else y + bias

  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
  return _loop(update, initial_state, x, segment_ids, reverse)


def linear_attention(
  q, k, v, *, log_decay=None, beta=None, scale=None,
  initial_state=None, segment_ids=None, reverse=False,
):  # fmt: skip
  """S <- exp(log_decay) S, S <- S + k (beta (v - k^T S))^T, o = scale q^T S;  state [B H K V].

  Without beta the residual is v itself. q, k [B T Hq K]: each head of theirs serves H / Hq others.
  """
  heads, K = v.shape[2], k.shape[3]
  q, k = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (q, k))
  scale = K**-0.5 if scale is None else scale
  if log_decay is None:
    log_decay = jnp.zeros(v.shape[:3], v.dtype)
  if log_decay.ndim == 3:
    log_decay = log_decay[..., None]

  def update(S, token):
    q, k, v, log_decay, beta = token
    S = jnp.exp(log_decay)[..., None] * S
    if beta is not None:
      v = beta[..., None] * (v - jnp.sum(k[..., None] * S, axis=2))
    S = S + k[..., None] * v[:, :, None, :]
    return S, scale * jnp.sum(q[..., None] * S, axis=2)

  if initial_state is None:
    initial_state = jnp.zeros((v.shape[0], heads, K, v.shape[3]), v.dtype)
  return _loop(update, initial_state, (q, k, v, log_decay, beta), segment_ids, reverse)


def plstm_1d(
  q, k, v, source, transition, mark, direct, *, scale=None,
  initial_state=None, segment_ids=None, reverse=False,
):  # fmt: skip
  """o = scale q^T (mark C + direct k v^T), then C <- transition C + source k v^T;  state [B H K V].

  With state tracking all arrays have more axes, see `ops.plstm_1d`; state [B H K V J].
  """
  scale = q.shape[3] ** -0.5 if scale is None else scale
  tracking = transition.ndim == 5

  def update(C, token):
    q, k, v, source, transition, mark, direct = token
    if tracking:
      kv = k[:, :, :, None, :, None] * v[:, :, None, :, None, :]
      seen = jnp.einsum("bhoqi,bhdvi->bhdvoq", mark, C)
      seen += jnp.einsum("bhoqkl,bhdvkl->bhdvoq", direct, kv)
      o = scale * jnp.sum(q[:, :, :, None, None, :] * seen, axis=(2, 5))
      kept = jnp.einsum("bhij,bhdvj->bhdvi", transition, C)
      return kept + jnp.einsum("bhikl,bhdvkl->bhdvi", source, kv), o
    kv = k[..., None] * v[:, :, None]
    source, transition, mark, direct = (x[..., None, None] for x in token[3:])
    o = scale * jnp.sum(q[..., None] * (mark * C + direct * kv), axis=2)
    return transition * C + source * kv, o

  if initial_state is None:
    B, _, H, K = k.shape[:4]
    initial_state = jnp.zeros((B, H, K, v.shape[3], *transition.shape[4:]), v.dtype)
  tokens = (q, k, v, source, transition, mark, direct)
  return _loop(update, initial_state, tokens, segment_ids, reverse)


def ssd(x, dt, A, B, C, D=None, *, segment_ids=None, **options):
  """S <- exp(dt A) S + B (dt x)^T, y = C^T S + D x, which is `linear_attention` plus the skip."""
  y, state = linear_attention(
    C, B, dt[..., None] * x, log_decay=dt * A, scale=1.0, segment_ids=segment_ids, **options
  )
  if D is None:
    return y, state
  real = True if segment_ids is None else (segment_ids >= 0)[..., None, None]
  return y + jnp.where(real, D[:, None] * x, 0), state


def plstm_2d(
  q, k, v, source, transition, mark, direct, *, scale=None, initial_state=None, structure="general"
):
  """Node after node, row after row: o = scale q^T (mark_l l + mark_u u + direct k v^T), then
  right = T_rl l + T_ru u + source_r k v^T, below = T_dl l + T_du u + source_d k v^T;  states
  [B (4) Y H K V] and [B (4) X H K V]."""
  if structure == "separable":
    transition = transition.at[..., 1, 0].set(0)
  elif structure == "merged":
    transition = jnp.stack([transition[..., 0]] * 2, axis=-1)
    mark = jnp.stack([mark[..., 0]] * 2, axis=-1)
  if source.ndim == 5:
    arguments = (q, k, v, source, transition, mark, direct, scale, initial_state)
    return _plstm_2d_one_run(*arguments)
  total, states = 0, []
  for o, axes in enumerate([(), (2,), (1,), (1, 2)]):
    flip = lambda x, axes=axes: jnp.flip(x, axes)
    gates = [flip(x[:, :, :, o]) for x in (source, transition, mark)]
    self_read = direct if o == 0 else jnp.zeros_like(direct)
    state = None if initial_state is None else [x[:, o] for x in initial_state]
    arguments = (flip(q), flip(k), flip(v), *gates, flip(self_read), scale, state)
    output, final_state = _plstm_2d_one_run(*arguments)
    total = total + flip(output)
    states.append(final_state)
  return total, tuple(jnp.stack(x, axis=1) for x in zip(*states, strict=True))


def _plstm_2d_one_run(q, k, v, source, transition, mark, direct, scale, initial_state):
  (B, Y, X, H, K), V = q.shape, v.shape[-1]
  scale = K**-0.5 if scale is None else scale
  if initial_state is None:
    initial_state = (jnp.zeros((B, n, H, K, V), v.dtype) for n in (Y, X))
  first_left, first_above = initial_state

  def update(carry, n):
    left, above = carry  # what leaves the node before; what leaves the lowest node of each column
    y, x = n // X, n % X
    read = lambda array: array[:, y, x]
    t, s, m = (read(array)[..., None, None] for array in (transition, source, mark))
    l = jnp.where(x == 0, first_left[:, y], left)
    u = above[:, x]
    write = read(k)[..., None] * read(v)[..., None, :]
    seen = m[:, :, 0] * l + m[:, :, 1] * u + read(direct)[..., None, None] * write
    right = t[:, :, 0, 0] * l + t[:, :, 0, 1] * u + s[:, :, 0] * write
    below = t[:, :, 1, 0] * l + t[:, :, 1, 1] * u + s[:, :, 1] * write
    o = scale * jnp.sum(read(q)[..., None] * seen, axis=2)
    return (right, above.at[:, x].set(below)), (o, right)

  carry = (jnp.zeros_like(first_left[:, 0]), first_above)
  (_, final_below), (o, right) = jax.lax.scan(update, carry, jnp.arange(Y * X))
  on_grid = lambda array: jnp.moveaxis(array, 0, 1).reshape(B, Y, X, *array.shape[2:])
  return on_grid(o), (on_grid(right)[:, :, -1], final_below)


def plstm_dag(
  q, k, v, source, transition, mark, direct, graph, *, scale=None, initial_state=None
):  # fmt: skip
  """C_e = sum T_ee' C_e' + S_e k v^T, o_n = scale (sum M_e C_e^T q_n + D_n (q_n . k_n) v_n), one
  edge after the other, each once all that lead to it are done; `graph` holds numpy arrays."""
  N, E = q.shape[0], source.shape[0]
  scale = q.shape[2] ** -0.5 if scale is None else scale
  lines = [m for m in range(transition.shape[0]) if graph.line_in[m] < E]
  line_in, line_out = graph.line_in[lines], graph.line_out[lines]
  order, waiting = [], [e for e in range(E) if graph.tail[e] < N]
  while waiting:
    e = waiting.pop(0)
    ready = all(a in order for a, b in zip(line_in, line_out) if b == e)
    (order if ready else waiting).append(e)
  T = jnp.zeros((E, E, q.shape[1]), q.dtype)
  T = T.at[line_out, line_in].set(transition[np.array(lines, int)])
  write = k[..., None] * v[..., None, :]  # [N H K V]
  nodes = (graph.node_graph < len(graph.node_count))[:, None, None, None]
  o = jnp.sum(q[..., None] * jnp.where(nodes, direct[..., None, None] * write, 0), axis=2)
  states = jnp.zeros((E, *write.shape[1:]), v.dtype)

  def update(carry, edge):
    states, o = carry
    e, tail, head = edge
    C = source[e, :, None, None] * write[tail] + jnp.sum(T[e, ..., None, None] * states, axis=0)
    C = C if initial_state is None else C + initial_state[e]
    read = mark[e, :, None] * jnp.sum(q[head, :, :, None] * C, axis=1)
    return (states.at[e].set(C), o.at[head].add(read)), None

  edges = np.array([(e, graph.tail[e], graph.head[e]) for e in order], int).reshape(-1, 3)
  (states, o), _ = jax.lax.scan(update, (states, o), tuple(edges.T))
  return scale * o, states
