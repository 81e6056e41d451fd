"""`evaluate`: the protocol, the reference beside the model, refusals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import CalibrationError, ModelError, NonFiniteError
from jq.evaluate import evaluate, forward
from jq.qtensor import from_codes
from jq.spec import QuantSpec
from tests.jq.evaluate.tiny import (
    VOCAB,
    WIDTH,
    Tiny,
    compiled_programs,
    make_params,
    numpy_logits,
)
from tests.oracles import evaluation as oracle

TINY = Tiny()
T = 16


@pytest.fixture(scope="module")
def stream():
    return np.random.default_rng(3).integers(0, VOCAB, 7 * T + 5).astype(np.int32)


@pytest.fixture(scope="module")
def result(stream):
    """A model with perturbed kernels against the unperturbed one."""
    return evaluate(TINY, make_params(noise=0.1), stream, reference_params=make_params(), seq_len=T)


@pytest.fixture(scope="module")
def want(stream):
    """Per window, the oracle's (nll, kl, same) and the reference's nll."""
    scores = []
    for start in range(0, 7 * T, T):
        window = stream[start : start + T]
        reference = numpy_logits(TINY, make_params(), window)
        logits = numpy_logits(TINY, make_params(noise=0.1), window)
        scores.append(
            (
                *oracle.window_scores(window, logits, reference),
                oracle.window_scores(window, reference)[0],
            )
        )
    return [list(column) for column in zip(*scores, strict=True)]


def test_counts(result):
    assert (result.num_windows, result.num_tokens, result.seq_len) == (7, 7 * (T - 1), T)


def test_perplexity(result, want):
    assert result.perplexity == pytest.approx(oracle.perplexity(want[0]), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(oracle.perplexity(want[3]), rel=1e-5)


def test_kl(result, want):
    means = [oracle.mean(w) for w in want[1]]
    np.testing.assert_allclose(result.window_kl, means, rtol=1e-4)
    assert result.kl == pytest.approx((oracle.mean(means), oracle.standard_error(means)), rel=1e-4)
    assert result.kl.value > 1e-3


def test_top1(result, want):
    means = [oracle.mean(w) for w in want[2]]
    np.testing.assert_allclose(result.window_top1, means, rtol=1e-12)
    assert 0.5 < result.top1_agreement.value < 1


def test_increase_over_the_reference(result, want):
    a, b = (np.array([oracle.mean(w) for w in column]) for column in (want[0], want[3]))
    assert result.perplexity_increase.value == pytest.approx(
        math.exp(a.mean()) - math.exp(b.mean()), rel=1e-3
    )
    jackknife = oracle.jackknife_error(lambda x, y: math.exp(x.mean()) - math.exp(y.mean()), a, b)
    assert result.perplexity_increase.stderr == pytest.approx(jackknife, rel=0.2)


def test_a_model_is_its_own_reference(stream):
    got = evaluate(TINY, make_params(), stream, reference_params=make_params(), seq_len=T)
    assert (got.window_kl == 0).all()
    assert (got.window_top1 == 1).all()
    assert got.perplexity_increase == (0, 0)


def test_alone_equals_beside(stream, result):
    alone = evaluate(TINY, make_params(noise=0.1), stream, seq_len=T)
    np.testing.assert_allclose(alone.window_nll, result.window_nll, rtol=1e-6)
    assert alone.kl is alone.reference_perplexity is alone.perplexity_increase is None
    assert alone.tokens_sha256 == result.tokens_sha256


def test_another_reference_model(stream):
    deep = Tiny(blocks=4)
    got = evaluate(
        TINY,
        make_params(),
        stream,
        reference_model=deep,
        reference_params=make_params(model=deep),
        seq_len=T,
    )
    first = stream[:T]
    kl = oracle.window_scores(
        first,
        numpy_logits(TINY, make_params(), first),
        numpy_logits(deep, make_params(model=deep), first),
    )[1]
    assert np.asarray(got.window_kl)[0] == pytest.approx(oracle.mean(kl), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_batch_size_does_not_matter(stream, result, batch_size):
    got = evaluate(
        TINY,
        make_params(noise=0.1),
        stream,
        reference_params=make_params(),
        seq_len=T,
        batch_size=batch_size,
    )
    np.testing.assert_allclose(got.window_nll, result.window_nll, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(got.window_kl), result.window_kl, rtol=1e-4)
    assert got.tokens_sha256 == result.tokens_sha256


def test_the_last_batch_compiles_nothing(stream):
    def run():
        evaluate(TINY, make_params(), stream, seq_len=T, batch_size=3)  # 3 + 3 + 1 windows

    assert compiled_programs(forward._block, run) == 2  # the kinds of block


def test_rows_follow_one_another(stream, result):
    rows = stream[: 7 * T].reshape(14, T // 2)
    got = evaluate(TINY, make_params(noise=0.1), rows, seq_len=T)
    np.testing.assert_allclose(got.window_nll, result.window_nll, rtol=1e-6)


def test_max_windows_takes_the_first(stream, result):
    got = evaluate(TINY, make_params(noise=0.1), stream, seq_len=T, max_windows=2)
    np.testing.assert_allclose(got.window_nll, result.window_nll[:2], rtol=1e-6)
    with pytest.raises(CalibrationError, match=r"2 windows of 16 .* 7 of 16"):
        got.perplexity_over(result)


def test_progress(stream):
    calls = []
    evaluate(
        TINY,
        make_params(),
        stream,
        seq_len=T,
        batch_size=3,
        progress=lambda done, of: calls.append((done, of)),
    )
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_quantized_kernels(stream):
    """A QTensor is worth what its dequantized kernel is."""
    codes = np.random.default_rng(5).integers(0, 16, (WIDTH, WIDTH)).astype(np.uint8)
    spec = QuantSpec("int4", group_size=-1)
    scale = jnp.full(spec.scale_shape(WIDTH, WIDTH), 0.1, spec.scale_dtype)
    kernel = from_codes(jnp.asarray(codes), scale, None, spec)
    packed, plain = make_params(), make_params()
    packed["layers_0"]["mix"]["kernel"] = kernel
    plain["layers_0"]["mix"]["kernel"] = kernel.dequantize().astype(jnp.float32)
    got = evaluate(TINY, packed, stream, reference_params=plain, seq_len=T)
    assert np.asarray(got.window_kl).max() < 1e-9
    np.testing.assert_allclose(got.window_nll, np.asarray(got.reference_window_nll), rtol=1e-6)


def test_two_methods_in_pairs(stream, result):
    other = evaluate(TINY, make_params(noise=0.05), stream, seq_len=T)
    difference = result.perplexity_over(other)
    assert difference.value == pytest.approx(result.perplexity.value - other.perplexity.value)
    assert difference.stderr < result.perplexity.stderr


def test_to_dict_is_json(result, stream):
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["level"] == "token"
    assert data["perplexity"] == {
        "value": result.perplexity.value,
        "stderr": result.perplexity.stderr,
    }
    assert data["per_window"]["kl"] == result.window_kl.tolist()
    assert (data["windows"], data["tokens_scored"]) == (7, 7 * (T - 1))
    single = evaluate(TINY, make_params(), stream, seq_len=T, max_windows=1).to_dict()
    assert json.loads(json.dumps(single, allow_nan=False))["perplexity"]["stderr"] is None
    assert single["kl_nats"] is None


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("which", ["model", "reference"])
def test_nan_names_window_and_model(stream, batch_size, which):
    params = {"model": make_params(), "reference": make_params()}
    params[which]["embed"][VOCAB - 1] = np.nan  # only where this token stands
    where = int(np.flatnonzero(stream == VOCAB - 1)[0])
    window, position = divmod(where, T)
    whose = {"model": "the model's", "reference": "the reference model's"}[which]
    message = rf"window {window} \(tokens {window * T} to .*{whose} logits at position {position} "
    with pytest.raises(NonFiniteError, match=message):
        evaluate(
            TINY,
            params["model"],
            stream,
            reference_params=params["reference"],
            seq_len=T,
            batch_size=batch_size,
        )


def test_infinite_logits_are_refused(stream):
    params = make_params()
    params["head"][:, 4] = np.inf
    with pytest.raises(NonFiniteError, match="window 0"):
        evaluate(TINY, params, stream, seq_len=T)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_ids_outside_the_vocabulary_are_refused_before_compute(stream, bad, monkeypatch):
    monkeypatch.setattr(forward, "_block", None)  # a forward pass would fail differently
    tokens = stream.astype(np.int64)
    tokens[T + 3] = bad
    with pytest.raises(CalibrationError, match=rf"token 3 of window 1 .* vocabulary of {VOCAB}"):
        evaluate(TINY, make_params(), tokens, seq_len=T)


def test_another_vocabulary_is_refused(stream):
    wide = Tiny(vocab=VOCAB + 2)
    with pytest.raises(ModelError, match=f"{VOCAB} logits, the reference {VOCAB + 2}"):
        evaluate(
            TINY,
            make_params(),
            stream,
            reference_model=wide,
            reference_params=make_params(model=wide),
            seq_len=T,
        )


def test_a_reference_without_parameters_is_refused(stream):
    with pytest.raises(ModelError, match="reference_params"):
        evaluate(TINY, make_params(), stream, reference_model=Tiny(), seq_len=T)


@pytest.mark.parametrize(
    ("tokens", "knobs", "message"),
    [
        (np.zeros(15, np.int32), {}, "15 evaluation tokens make no window of 16"),
        ([], {}, "0 evaluation tokens"),
        (np.zeros(32, np.float32), {}, "float32"),
        (np.zeros(32, np.int32), {"seq_len": 1}, "seq_len 1"),
        (np.zeros(32, np.int32), {"max_windows": 0}, "max_windows 0"),
        (np.zeros(32, np.int32), {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refusals(tokens, knobs, message):
    with pytest.raises(CalibrationError, match=message):
        evaluate(TINY, make_params(), tokens, **{"seq_len": T, **knobs})


def test_params_may_be_numpy(stream, result):
    params = jax.tree.map(np.asarray, make_params(noise=0.1))
    got = evaluate(TINY, params, stream, seq_len=T)
    np.testing.assert_allclose(got.window_nll, result.window_nll, rtol=1e-6)
