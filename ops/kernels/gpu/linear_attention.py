"""`linear_attention` on Hopper GPUs: which kernels serve which recurrence."""

from ops import dispatch
from ops.kernels import shards
from ops.kernels.gpu import delta_rule, scalar_decay


def supports(*, q, v, beta, **arguments) -> dispatch.Reason:
  """Why no kernel can run `linear_attention` on these arguments; None if one can."""
  shared = shards.refusal(B=q.shape[0], H=q.shape[2] if q.shape[2] > 1 else v.shape[2])
  return _kernels(beta).supports(q=q, v=v, beta=beta, **arguments) or shared


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T Hq M V] in bfloat16 and the final state [B Hq M K V]."""

  def kernel(tokens, state):
    return _kernels(tokens.beta).run(tokens, state, scale, chunk_size, precision)

  B, _, Hq, M, _ = tokens.v.shape
  # Where one key head serves all heads, those are shared, and every device has the key head.
  keys, values, states = ("B T H", "B T H", "B H") if Hq > 1 else ("B T", "B T Hq H", "B Hq H")
  letters = tokens._replace(q=keys, k=keys, v=values, log_decay=values, beta=values, segments="B T")
  return shards.on_shards(
    kernel, (letters, states), (values, states), (tokens, state), B=B, H=Hq if Hq > 1 else M
  )


def _kernels(beta):
  return scalar_decay if beta is None else delta_rule
