"""GPTQ where statistics are poor, broken or missing, and its options."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import SpecError
from jq.methods.gptq import GPTQ, _broken, factor_hessian
from jq.methods.rtn import rtn_quantize
from jq.spec import QuantSpec
from tests.jq import problems
from tests.jq.methods.test_gptq import check, quantize

SPEC = QuantSpec("int4", 16)


def indefinite(k: int, by: float) -> np.ndarray:
    """A Gram matrix whose lowest eigenvalue is -`by` times its mean diagonal."""
    values, vectors = np.linalg.eigh(problems.gram(k).astype(np.float64))
    values[0] = 0
    h = (vectors * values) @ vectors.T
    mean = np.mean(np.diag(h))
    h -= by * mean * np.outer(vectors[:, 0], vectors[:, 0]) / (1 + by / k)
    return h.astype(np.float32)


def test_fewer_tokens_than_inputs():
    w, gram = problems.weights(64, 12, 1), problems.gram(64, tokens=20)
    assert np.linalg.matrix_rank(gram) < 64
    _, info = check(w, gram, SPEC, GPTQ())
    assert info.damp == pytest.approx(0.01)


def test_damping_is_raised_until_the_factorisation_works():
    w, gram = problems.weights(64, 12, 2), indefinite(64, 0.05)
    _, info = check(w, gram, SPEC, GPTQ())  # judges the codes at the damping that was reported
    assert info.damp == pytest.approx(0.1)


def test_no_damping_is_raised_from_zero():
    w, gram = problems.weights(64, 12, 3), indefinite(64, 0.0005)
    _, info = check(w, gram, SPEC, GPTQ(damp_percent=0.0))
    assert info.damp == pytest.approx(1e-3)


@pytest.mark.parametrize("where", [(3, 7), (3, 3)], ids=["off the diagonal", "on it"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_statistics_are_reported_and_rounded_to_nearest(bad, where):
    w, gram = problems.weights(64, 12, 4), problems.gram(64)
    gram[where] = gram[where[::-1]] = bad
    solution, info = quantize(w, gram, SPEC, GPTQ())
    assert info.failed
    plain = rtn_quantize(w, SPEC)
    np.testing.assert_array_equal(solution.codes, plain.codes)
    np.testing.assert_array_equal(solution.scale, plain.scale)


@pytest.mark.parametrize("size", [64, 4096, 5000])
def test_a_factorisation_that_failed_is_seen_at_any_size(size):
    """XLA's minimum on CPUs skips NaN from 4096 numbers on."""
    assert not _broken(jnp.ones(size))
    assert _broken(jnp.full(size, jnp.nan))
    assert _broken(jnp.ones(size).at[size // 2].set(jnp.nan))
    assert _broken(jnp.ones(size).at[-1].set(0))


@pytest.mark.slow
def test_a_hessian_of_many_inputs_is_factored():
    x = np.random.default_rng(6).standard_normal((512, 4096)).astype(np.float32)
    gram = x.T @ x
    factor = factor_hessian(gram, QuantSpec("int4", 128), GPTQ())
    damped = gram + 0.01 * np.trace(gram) / 4096 * np.eye(4096)
    root = np.asarray(factor.unit) * np.asarray(factor.diagonal)
    assert problems.relative_error(root @ root.T, damped) < 1e-5
    assert not factor.failed


def test_a_fallback_with_act_order_has_rows_where_its_order_says():
    w, gram = problems.weights(64, 12, 5), np.full((64, 64), np.nan, np.float32)
    solution, info = quantize(w, gram, SPEC, GPTQ(desc_act=True))
    assert info.failed
    expected = rtn_quantize(w, SPEC).dequantize(SPEC)
    np.testing.assert_array_equal(solution.dequantize(SPEC), expected)


@pytest.mark.parametrize("dead", [[0], [63], [5, 6, 40], list(range(16, 32))], ids=str)
def test_dead_inputs(dead):
    """Inputs that were never on: finite, and as the oracle has it."""
    x = problems.inputs(64, 256).astype(np.float64)
    x[:, dead] = 0
    w, gram = problems.weights(64, 12, 6), (x.T @ x).astype(np.float32)
    solution, info = check(w, gram, SPEC, GPTQ())
    assert np.isfinite(solution.dequantize(SPEC)).all()
    assert np.isfinite(info.loss)


def test_no_input_was_ever_on():
    w = problems.weights(64, 12, 7)
    solution, info = quantize(w, np.zeros((64, 64), np.float32), SPEC, GPTQ())
    assert not info.failed
    np.testing.assert_array_equal(solution.codes, rtn_quantize(w, SPEC).codes)


def test_groups_of_zeros_stay_zero():
    w, gram = problems.weights(64, 12, 8), problems.gram(64)
    w[:16] = 0  # nothing before them has left an error behind
    w[:, 3] = 0
    solution, _ = check(w, gram, SPEC, GPTQ())
    back = np.asarray(solution.dequantize(SPEC))
    np.testing.assert_array_equal(back[:16], 0)
    np.testing.assert_array_equal(back[:, 3], 0)


def test_equal_diagonals_keep_the_inputs_order():
    """Ties in act order are broken by position, not by chance."""
    w, gram = problems.weights(64, 12, 9), problems.gram(64)
    correlation = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    np.fill_diagonal(correlation, 1)
    solution, _ = check(w, correlation, SPEC, GPTQ(desc_act=True))
    np.testing.assert_array_equal(solution.order, np.arange(64))


def test_large_and_small_statistics():
    w, gram = problems.weights(64, 12, 10), problems.gram(64)
    solution, _ = quantize(w, gram, SPEC, GPTQ())
    for power in (-40, 60):
        other, _ = quantize(w, gram * np.float32(2.0**power), SPEC, GPTQ())
        np.testing.assert_array_equal(other.codes, solution.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp_percent": -0.1}, "damp_percent -0.1"),
        ({"damp_percent": 1.0}, "damp_percent 1.0"),
        ({"block_size": 0}, "block_size 0"),
        ({"desc_act": True, "act_group_aware": True}, "choose one"),
        ({"static_groups": True}, "without desc_act"),
    ],
)
def test_contradictory_options(options, message):
    with pytest.raises(SpecError, match=message):
        GPTQ(**options)


def test_group_size_that_does_not_divide():
    with pytest.raises(SpecError, match=r"group_size 48 .*64 inputs.*16, 32, 64"):
        quantize(problems.weights(64, 12), problems.gram(64), QuantSpec("int4", 48), GPTQ())


def test_solutions_become_qtensors():
    """Codes, grids and order survive packing."""
    spec = QuantSpec("int3", 16, symmetric=False)
    w, gram = problems.weights(64, 12, 11), problems.gram(64)
    solution, _ = quantize(w, gram, spec, GPTQ(desc_act=True))
    packed = solution.to_qtensor(spec)
    np.testing.assert_array_equal(packed.dequantize(), solution.dequantize(spec))
    np.testing.assert_array_equal(packed.order, solution.order)
    assert packed.scale.dtype == jnp.bfloat16
