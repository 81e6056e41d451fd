"""Intervals of differences in pairs."""

import math

import numpy as np
import pytest

from jq.compare.bootstrap import LEVEL, RESAMPLES, mean_interval, perplexity_interval
from jq.errors import CalibrationError
from tests.oracles import bootstrap


def pairs(n=30, rise=0.02, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(2.0, 0.5, n)
    return base + rise + noise * rng.normal(size=n), base


def test_intervals_are_those_of_drawing_windows_one_by_one():
    nll, base = pairs()
    found = perplexity_interval(nll, base)
    low, high = bootstrap.perplexity_interval(nll, base, LEVEL, 4000, seed=1)
    # Ends of 10,000 and of 4,000 draws differ by chance, by some hundredths of the width.
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))
    assert found.value == pytest.approx(math.exp(nll.mean()) - math.exp(base.mean()), rel=1e-12)


def test_the_interval_of_a_mean_is_the_normal_one_where_that_holds():
    a, b = pairs(n=400, noise=0.3)
    found = mean_interval(a, b)
    stderr = np.std(a - b, ddof=1) / 20
    assert found.value == pytest.approx(np.mean(a - b), rel=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * stderr, rel=0.05)


def test_what_windows_have_in_common_cancels():
    nll, base = pairs(noise=0.001)
    paired = perplexity_interval(nll, base)
    apart = perplexity_interval(nll, base[::-1].copy())
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)
    assert not paired.noise
    assert apart.noise


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth, hits, trials = 0.05, 0, 150
    for seed in range(trials):
        a, b = pairs(n=60, rise=truth, noise=0.2, seed=seed)
        low, high = mean_interval(a, b, seed=seed)[1:]
        hits += low <= truth <= high
    # 95 % of 150, less what percentile intervals of 60 windows lack, within three deviations.
    assert 0.87 <= hits / trials <= 0.995


def test_equal_models_differ_by_nothing():
    nll, _ = pairs()
    assert perplexity_interval(nll, nll) == (0.0, 0.0, 0.0)
    assert perplexity_interval(nll, nll).noise


def test_one_window_has_no_interval():
    found = perplexity_interval(np.array([2.0]), np.array([1.0]))
    assert found.value == pytest.approx(math.e**2 - math.e)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.noise


def test_many_windows_are_drawn_in_parts_with_the_same_result(monkeypatch):
    nll, base = pairs()
    whole = perplexity_interval(nll, base, seed=3)
    monkeypatch.setattr("jq.compare.bootstrap._AT_ONCE", 30 * RESAMPLES // 7)
    assert perplexity_interval(nll, base, seed=3) == pytest.approx(whole, rel=1e-12)
    assert perplexity_interval(nll, base, seed=4) != whole


def test_unequal_numbers_make_no_pairs():
    with pytest.raises(CalibrationError, match="3 and 2 measurements make no pairs"):
        mean_interval(np.zeros(3), np.zeros(2))
