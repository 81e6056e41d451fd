"""Estimates against float64 oracles, and the delta method against the jackknife."""

import math

import numpy as np
import pytest

from jq.errors import CalibrationError
from jq.evaluate import mean_estimate, paired_difference, perplexity, perplexity_difference
from tests.oracles import evaluation as oracle


@pytest.fixture
def nll():
    """Mean NLLs of 40 windows for two models that share easy and hard windows."""
    rng = np.random.default_rng(0)
    a = 3.0 + 0.3 * rng.normal(size=40)
    return a, a - 0.05 + 0.01 * rng.normal(size=40)


def test_mean(nll):
    assert mean_estimate(nll[0]) == pytest.approx(
        (oracle.mean(nll[0]), oracle.standard_error(nll[0])), rel=1e-12
    )


def test_perplexity(nll):
    assert perplexity(nll[0]) == pytest.approx(oracle.perplexity([[x] for x in nll[0]]), rel=1e-12)


def test_perplexity_error_is_the_jackknifes(nll):
    jackknife = oracle.jackknife_error(lambda a: math.exp(a.mean()), nll[0])
    assert perplexity(nll[0]).stderr == pytest.approx(jackknife, rel=5e-3)


def test_paired_difference(nll):
    a, b = nll
    got = paired_difference(a, b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert got == pytest.approx(
        (oracle.mean(differences), oracle.standard_error(differences)), rel=1e-9
    )
    assert got.stderr < 0.1 * mean_estimate(a).stderr  # what the windows share cancels


def test_perplexity_difference(nll):
    a, b = nll
    got = perplexity_difference(a, b)
    assert got.value == pytest.approx(math.exp(a.mean()) - math.exp(b.mean()), rel=1e-12)
    jackknife = oracle.jackknife_error(lambda x, y: math.exp(x.mean()) - math.exp(y.mean()), a, b)
    assert got.stderr == pytest.approx(jackknife, rel=5e-3)


def test_errors_cover_the_truth():
    """Of 95 % intervals over repeated draws, about 95 % hold the true perplexity."""
    rng = np.random.default_rng(1)
    draws = [perplexity(3.0 + 0.5 * rng.normal(size=60)) for _ in range(2000)]
    inside = np.mean([abs(p.value - math.exp(3.0)) < 1.96 * p.stderr for p in draws])
    assert 0.93 < inside < 0.965


def test_one_window_has_no_error():
    value, stderr = perplexity(np.array([2.0]))
    assert value == pytest.approx(math.exp(2.0))
    assert math.isnan(stderr)


def test_a_broken_model_has_infinite_perplexity():
    broken, fine = np.array([800.0, 900.0]), np.array([2.0, 2.1])
    assert perplexity(broken).value == math.inf
    assert perplexity_difference(broken, fine).value == math.inf
    assert perplexity_difference(fine, broken).value == -math.inf
    assert math.isnan(perplexity_difference(broken, fine).stderr)


@pytest.mark.parametrize("difference", [paired_difference, perplexity_difference])
def test_other_windows_make_no_pairs(difference):
    with pytest.raises(CalibrationError, match="3 and 2 windows"):
        difference(np.zeros(3), np.zeros(2))
