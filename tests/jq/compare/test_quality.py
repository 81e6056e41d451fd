"""Scores by position: against plain loops, and against evaluations of shorter windows."""

import numpy as np
import pytest

from jq.compare.quality import Quality, Stretches, position_edges
from jq.errors import OutputError
from jq.evaluate import evaluate
from tests.jq.evaluate.tiny import Tiny, make_params


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [(2, (1, 2)), (15, (1, 15)), (32, (1, 8, 16, 32)), (100, (1, 12, 25, 50, 100))],
)
def test_stretches_double(seq_len, edges):
    assert position_edges(seq_len) == edges


def test_there_are_never_many():
    assert len(position_edges(131072)) == 9


def collected(scores, edges, batches=(1, 3)):
    stretches, start = Stretches(edges), 0
    for size in batches:
        stretches.observe({k: v[start : start + size] for k, v in scores.items()})
        start += size
    return stretches.quality("ab")


def test_means_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    edges = (1, 3, 4, 10)
    scores = {"nll": rng.normal(size=(4, 9)).astype(np.float32), "top1": rng.random((4, 9)) < 0.5}
    quality = collected(scores, edges)
    assert (quality.seq_len, quality.num_windows) == (10, 4)
    for name, values in scores.items():
        for window in range(4):
            row = [float(x) for x in values[window]]
            for i, (low, high) in enumerate([(1, 3), (3, 4), (4, 10)]):
                # Position p is the p-th score, counted from 1.
                expected = [row[p - 1] for p in range(low, high)]
                got = quality.scores[name][window, i]
                assert got == pytest.approx(sum(expected) / len(expected), rel=1e-12)
                first = row[: high - 1]
                prefix = quality.prefix(name)
                assert prefix is not None
                assert prefix[window, i] == pytest.approx(sum(first) / len(first), rel=1e-12)
            mean = quality.window(name)
            assert mean is not None
            assert mean[window] == pytest.approx(sum(row) / 9, rel=1e-12)
    assert quality.window("kl") is None
    assert quality.prefix("kl") is None


def test_first_tokens_score_as_shorter_windows_do():
    model, params, reference = Tiny(), make_params(noise=0.1), make_params()
    tokens = np.random.default_rng(1).integers(0, model.vocab, (3, 32))
    stretches = Stretches(position_edges(32))
    whole = evaluate(
        model, params, tokens, reference_params=reference, seq_len=32, batch_size=2,
        observe=stretches.observe,
    )  # fmt: skip
    quality = stretches.quality(whole.tokens_sha256)
    assert quality.window("nll") == pytest.approx(whole.window_nll, rel=1e-12)
    assert quality.window("top1") == pytest.approx(whole.window_top1, rel=1e-12)
    for i, length in enumerate((8, 16, 32)):
        short = evaluate(
            model, params, tokens[:, :length].copy(), reference_params=reference, seq_len=length
        )
        for name, expected in (("nll", short.window_nll), ("kl", short.window_kl)):
            prefix = quality.prefix(name)
            assert prefix is not None
            assert prefix[:, i] == pytest.approx(expected, rel=2e-5)


def test_quality_survives_json():
    quality = collected({"nll": np.ones((4, 9), np.float32) / 3}, (1, 3, 4, 10))
    again = Quality.from_dict(quality.to_dict())
    assert (again.edges, again.tokens_sha256) == (quality.edges, "ab")
    np.testing.assert_array_equal(again.scores["nll"], quality.scores["nll"])
    again.check_pairs(quality)


def test_other_windows_make_no_pairs():
    quality = collected({"nll": np.ones((4, 9), np.float32)}, (1, 3, 4, 10))
    other = Quality("cd", quality.edges, quality.scores)
    with pytest.raises(OutputError, match="different windows make no pairs"):
        quality.check_pairs(other)
