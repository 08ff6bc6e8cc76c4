"""Choosing an implementation, explaining the choice, and what a wrong argument says."""

import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import ops


def scan_inputs(B=2, T=5, D=3):
  return jnp.ones((B, T, D)) / 2, jnp.ones((B, T, D))


def unchecked(op):
  """`op` as it is in production, without the checks that the tests' import hook adds."""
  return inspect.unwrap(op)


def test_explain_names_what_runs_and_why_the_others_do_not(capsys):
  text = ops.explain(ops.linear_scan, *scan_inputs())
  assert capsys.readouterr().out.strip() == text
  lines = {line.split()[0]: line for line in text.splitlines()}
  assert "runs" in lines["recurrent"]
  assert "recurrent is preferred" in lines["parallel"]
  assert "it is for Hopper GPUs, this is a cpu" in lines["pallas"]


def test_explain_needs_shapes_only_and_follows_the_platform():
  a = jax.ShapeDtypeStruct((2, 2048, 8), jnp.bfloat16)
  assert "  recurrent  runs" in ops.explain(ops.linear_scan, a, a)
  with ops.for_platform("tpu"):
    text = ops.explain(ops.linear_scan, a, a)
  assert "on tpu" in text and "  chunked    runs" in text
  assert "parallel   runs, as ordered" in ops.explain(
    ops.linear_scan, a, a, implementation="parallel"
  )


def test_an_order_that_cannot_be_followed_says_why():
  with pytest.raises(ValueError, match="'pallas' cannot run: it is for Hopper GPUs"):
    ops.linear_scan(*scan_inputs(), implementation="pallas")
  with pytest.raises(
    ValueError, match="'magic' is not one of recurrent, parallel, chunked, pallas"
  ):
    ops.linear_scan(*scan_inputs(), implementation="magic")


def test_a_wrong_shape_names_the_argument_and_both_shapes():
  a, b = scan_inputs()
  with pytest.raises(
    ValueError, match=r"b has shape \(2, 4, 3\), expected \[B T D\] with B=2, T=5"
  ):
    unchecked(ops.linear_scan)(a, b[:, :4])
  with pytest.raises(
    ValueError, match=r"initial_state has shape \(2, 4, 3\), expected \[B W-1 D\]"
  ):
    unchecked(ops.causal_conv)(a, jnp.ones((4, 3)), initial_state=b[:, :4])
  with pytest.raises(ValueError, match=r"a has shape \(2, 0, 3\), expected \[B T D\]"):
    unchecked(ops.linear_scan)(a[:, :0], b[:, :0])
  with pytest.raises(ValueError, match="segment_ids has dtype float32, expected int32"):
    unchecked(ops.linear_scan)(a, b, segment_ids=a[:, :, 0])
  with pytest.raises(ValueError, match="chunk_size is 0, expected an int of at least 1"):
    ops.linear_scan(a, b, chunk_size=0)


def test_the_import_hook_checks_shapes():
  a, b = scan_inputs()
  with pytest.raises(jaxtyping.TypeCheckError):
    ops.linear_scan(a, b[:, :4])


def test_an_integer_is_refused_not_truncated():
  a, b = scan_inputs()
  with pytest.raises(ValueError, match="b has dtype int32, expected a floating or complex dtype"):
    unchecked(ops.linear_scan)(a, b.astype(jnp.int32))
  with pytest.raises(ValueError, match="initial_state has dtype complex64, expected a floating"):
    unchecked(ops.linear_scan)(a, b, initial_state=1j * b[:, 0])
  with pytest.raises(ValueError, match="x has dtype bool, expected a floating dtype"):
    unchecked(ops.causal_conv)(b.astype(bool), jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="dt has dtype complex64, expected a floating dtype"):
    ones = jnp.ones((2, 5, 4))
    unchecked(ops.selective_scan)(b, 1j * b, -jnp.ones((3, 4)), ones, ones)
