"""Linears that share an input, quantized side by side."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq import group, statistics
from jq.group import round_group
from jq.methods.gptq import GPTQ, gptq_quantize
from jq.methods.rtn import RTN, rtn_quantize
from jq.spec import FP8, QuantSpec, w8a8
from tests.jq import problems

SPEC = QuantSpec("int3", 16)


def problem(k=64, sizes=(8, 4)):
    x = problems.inputs(k, 200)
    stats = statistics.finish(statistics.update(statistics.init(k), jnp.asarray(x)))
    return x, stats, [jnp.asarray(problems.weights(k, n, n)) for n in sizes]


def output_error(x, w, q):
    x, w, q = (np.asarray(a, np.float64) for a in (x, w, q))
    return np.linalg.norm(x @ (q - w)) / np.linalg.norm(x @ w)


@pytest.mark.parametrize("rounding", [RTN(), GPTQ(desc_act=True)], ids=["rtn", "gptq"])
def test_each_linear_is_as_if_it_were_alone(rounding):
    x, stats, weights = problem()
    tensors, *_, report = round_group(weights, stats, SPEC, rounding)
    for i, (w, q) in enumerate(zip(weights, tensors, strict=True)):
        if isinstance(rounding, GPTQ):
            alone, _ = gptq_quantize(w, stats.gram, SPEC, rounding)
        else:
            alone = rtn_quantize(w, SPEC)
        np.testing.assert_array_equal(q.dequantize(), alone.dequantize(SPEC))
        error = output_error(x, w, q.dequantize())
        assert report.output_error[i] == pytest.approx(error, rel=1e-4)
        nearest = output_error(x, w, rtn_quantize(w, SPEC).dequantize(SPEC))
        assert report.rtn_output_error[i] == pytest.approx(nearest, rel=1e-4)
        relative = problems.relative_error(q.dequantize(), w)
        assert report.weight_error[i] == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize("spec", [SPEC, QuantSpec("int8", granularity="tensor")])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_report_does_not_depend_on_how_many_outputs_it_sees_at_once(spec, size, monkeypatch):
    _, stats, weights = problem()
    scale = jnp.linspace(0.5, 2.0, 64)
    *_, whole = round_group(weights, stats, spec, RTN(), scale)
    monkeypatch.setattr(group, "OUTPUTS", size)
    group.solve_group.clear_cache()
    *_, parts = round_group(weights, stats, spec, RTN(), scale)
    group.solve_group.clear_cache()
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_statistics_the_output_error_is_unknown():
    _, _, weights = problem()
    *_, report = round_group(weights, None, SPEC, RTN())
    assert np.isnan(report.output_error).all()
    assert np.isfinite(report.weight_error).all()


@pytest.mark.parametrize(
    "spec", [QuantSpec("int8", granularity="tensor"), QuantSpec(FP8, 4, granularity="block")]
)
def test_scales_are_not_shared_across_linears(spec):
    _, stats, weights = problem()
    tensors, _, _ = round_group(weights, stats, spec, RTN())
    for w, q in zip(weights, tensors, strict=True):
        alone = rtn_quantize(w, spec).to_qtensor(spec)
        np.testing.assert_array_equal(q.scale, alone.scale)


@pytest.mark.parametrize("spec", [SPEC, QuantSpec("int8", granularity="tensor")])
def test_failures_are_reported(spec):
    _, stats, weights = problem()
    broken = stats._replace(gram=stats.gram * jnp.nan)
    *_, report = round_group(weights, broken, spec, GPTQ())
    assert report.failed
    *_, report = round_group(weights, stats, spec, GPTQ())
    assert not report.failed
    assert report.damp == pytest.approx(0.01)


@pytest.mark.parametrize(("dtype", "top"), [("int8", 127), (FP8, 448)])
def test_static_scales_come_from_the_largest_activation(dtype, top):
    x, stats, weights = problem()
    spec = w8a8(dtype, activation="tensor", static=True)
    tensors, _, _ = round_group(weights, stats, spec, RTN())
    for q in tensors:
        assert q.input_scale == pytest.approx(np.abs(x).max() / top, rel=1e-6)


def test_the_error_of_rounding_is_that_of_the_unscaled_weights():
    x, stats, weights = problem()
    scale = np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32)
    scaled = [w * scale[:, None] for w in weights]
    rescaled = statistics.rescale(stats, jnp.asarray(scale))
    *_, report = round_group(scaled, rescaled, SPEC, RTN(), jnp.asarray(scale))
    for i, w in enumerate(weights):
        nearest = output_error(x, w, rtn_quantize(w, SPEC).dequantize(SPEC))
        assert report.rtn_output_error[i] == pytest.approx(nearest, rel=1e-4)
