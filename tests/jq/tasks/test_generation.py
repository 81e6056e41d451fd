"""Texts that end at strings, against plain generation that is cut afterwards."""

import jax
import pytest

from jq.errors import SpecError
from jq.models import generate
from jq.models.sampling import Sampling
from jq.tasks import generation
from jq.tasks.generation import Request, continue_batch

EOS = "<end>"
PROMPTS = ["the flies fly", "a cafe around the fly twice", "café"]


def request_of(until=(), count=12, **options):
    return Request.parse({"until": list(until), "max_gen_toks": count, **options}, EOS)


def plain(model, prompts, count):
    model, params, tokenizer = model
    rows = generate(model, params, prompts, count, eos_token_ids=tokenizer.eos_token_ids)
    return [tokenizer.decode(t for t in row if t not in tokenizer.eos_token_ids) for row in rows]


def test_texts_are_those_of_plain_generation_up_to_their_ends(model):
    prompts = [model[2].encode(text) for text in PROMPTS]
    whole = plain(model, prompts, 12)
    assert continue_batch(*model, prompts, request_of()) == whole
    # A string that begins in one token and goes on in the next ones.
    end = whole[0][2:9]
    found = continue_batch(*model, prompts, request_of([end, whole[1][5]]))
    assert found == [text.split(end)[0].split(whole[1][5])[0] for text in whole]
    assert len(found[0]) <= 2


def test_a_batch_stops_when_its_rows_have_ended(model, monkeypatch):
    prompts = [model[2].encode(text) for text in PROMPTS]
    whole, steps = plain(model, prompts, 12), []
    stream = generation.stream

    def counted(*args):
        for tokens in stream(*args):
            steps.append(tokens)
            yield tokens

    monkeypatch.setattr(generation, "stream", counted)
    continue_batch(*model, prompts, request_of([text[0] for text in whole]))
    assert len(steps) < 12


def test_options_are_read_as_the_harness_does():
    asked = Request.parse({"until": "\n", "max_new_tokens": 7, "temperature": 0.0}, EOS)
    assert asked == Request(("\n", EOS), 7, Sampling())
    assert Request.parse({}, EOS) == Request((EOS,), 256, Sampling())
    assert request_of(do_sample=False, temperature=0.7, top_p=0.9).sampling == Sampling()
    assert request_of(temperature=0.7, top_k=0).sampling == Sampling(0.7)
    assert request_of(do_sample=True, top_p=0.9).sampling == Sampling(1.0, None, 0.9)
    assert request_of(["", "x"], num_beams=1).until == ("x", EOS)
    with pytest.raises(SpecError, match=r"\{'num_beams': 4\}"):
        request_of(num_beams=4)


def test_prompts_leave_room():
    assert request_of(count=4).fit(range(10), 12) == [2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(SpecError, match="12 new tokens, the model's context has 12"):
        request_of(count=12).fit(range(10), 12)


def test_samples_need_a_key_and_repeat_with_it(model):
    prompts = [model[2].encode(PROMPTS[0])] * 2
    warm = request_of(temperature=1.0)
    first = continue_batch(*model, prompts, warm, jax.random.key(1))
    assert first == continue_batch(*model, prompts, warm, jax.random.key(1))
    assert first != continue_batch(*model, prompts, warm, jax.random.key(2))
