"""What is timed: whole prefills, whole steps, and no compilation."""

import itertools
import statistics

import numpy as np
import pytest

from jq.bench import decode
from jq.bench.decode import measure_decode
from jq.bench.result import Latency
from jq.errors import ModelError


@pytest.mark.parametrize("count", [1, 2, 19, 100, 200, 333])
def test_percentiles_are_nearest_ranks(count):
    seconds = np.random.default_rng(count).permutation(count) + 1.0
    latency = Latency(tuple(seconds.tolist()))
    for percent in (50, 95, 99):
        want = next(s for s in sorted(seconds) if np.mean(seconds <= s) >= percent / 100)
        assert latency.percentile(percent) == want
    assert (latency.p50, latency.p95, latency.p99) == tuple(map(latency.percentile, (50, 95, 99)))
    assert latency.to_dict()["max"] == count
    assert latency.mean == statistics.fmean(seconds)


def test_a_latency_of_nothing_is_refused():
    with pytest.raises(ModelError, match="at least one"):
        Latency(())


class Fake:
    """A model of 40 positions whose stream takes 100 s for the first prefill, then 10 s each, and
    2 s a step; `started` counts the streams, `made` the tokens."""

    dtype = np.float32

    class config:
        vocab_size = 7
        max_position_embeddings = 40

    def __init__(self):
        self.now, self.started, self.made, self.shapes = 0.0, 0, 0, set()

    def clock(self):
        return self.now

    def stream(self, model, params, prompts, max_new_tokens, eos_token_ids):
        assert eos_token_ids == ()
        assert {0 <= token < 7 for prompt in prompts for token in prompt} == {True}
        self.shapes.add((len(prompts), *{len(prompt) for prompt in prompts}, max_new_tokens))
        self.started += 1
        self.now += 10.0 if self.started > 1 else 100.0
        for index in itertools.count():
            if index == max_new_tokens:
                return
            self.now += 2.0 if index else 0.0
            self.made += 1
            yield np.zeros(len(prompts), np.int32)


@pytest.fixture
def fake(monkeypatch):
    model = Fake()
    monkeypatch.setattr(decode, "stream", model.stream)
    return model


def test_each_time_is_what_it_says(fake):
    result = measure_decode(
        fake, {}, batch_sizes=(3,), prompt_tokens=8, steps=20, prefills=4, clock=fake.clock
    )
    (batch,) = result.batches
    assert fake.shapes == {(3, 8, 21)}
    assert batch.first_call_seconds == 102.0
    assert batch.prefill.seconds == (10.0,) * 4
    assert batch.decode.seconds == (2.0,) * 20
    assert batch.prefill_tokens_per_second == 3 * 8 / 10
    assert batch.decode_tokens_per_second == 3 / 2
    assert (batch.padded_tokens, batch.cache_tokens) == (32, 64)
    assert fake.started == 6  # one warm-up, four prefills, one sequence for the steps
    told = result.to_dict()["batches"][0]
    assert told["decode_seconds"]["count"] == 20
    assert told["decode_tokens_per_second"] == 1.5


def test_steps_beyond_the_context_come_from_several_sequences(fake):
    result = measure_decode(fake, {}, prompt_tokens=30, steps=25, prefills=1, clock=fake.clock)
    assert fake.shapes == {(1, 30, 10)}
    assert result.batches[0].decode.seconds == (2.0,) * 25
    assert fake.started == 2 + 3  # nine steps each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "batch size 0"),
        ({"batch_sizes": (2, 0)}, "batch size 0"),
        ({"prompt_tokens": 0}, "prompt_tokens 0"),
        ({"prompt_tokens": 39}, "leaves 1 of the model's 40 positions"),
        ({"prompt_tokens": 50}, "leaves 0 of the model's 40 positions"),
        ({"steps": 0}, "steps 0"),
        ({"prefills": 0}, "prefills 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(fake, options, message):
    with pytest.raises(ModelError, match=message):
        measure_decode(fake, {}, **({"prompt_tokens": 8} | options))
    assert fake.started == 0


def test_progress_names_the_batch_size(fake):
    told = []
    measure_decode(
        fake,
        {},
        batch_sizes=(1, 4),
        prompt_tokens=8,
        steps=1,
        progress=lambda *args: told.append(args),
        clock=fake.clock,
    )
    assert told == [(0, 2, "batch size 1"), (1, 2, "batch size 4"), (2, 2, "")]
