"""`linear_attention` on Hopper GPUs: which kernels serve which recurrence."""

from ops import dispatch
from ops.kernels.gpu import delta_rule, scalar_decay


def supports(*, beta, **arguments) -> dispatch.Reason:
  """Why no kernel can run `linear_attention` on these arguments; None if one can."""
  return _kernels(beta).supports(beta=beta, **arguments)


def run(tokens, state, scale, chunk_size, precision):
  """Outputs [B T H M V] in bfloat16 and the final state [B H M K V]."""
  return _kernels(tokens.beta).run(tokens, state, scale, chunk_size, precision)


def _kernels(beta):
  return scalar_decay if beta is None else delta_rule
