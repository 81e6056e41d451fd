"""Texts that end at given strings, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jq.errors import SpecError
from jq.models.decoder import Decoder
from jq.models.generation import FINISHED, stream
from jq.models.sampling import Sampling
from jq.models.tokenizer import TextStream, Tokenizer

_DEFAULT_NEW_TOKENS = 256  # the harness's own
# Names that other libraries have for the same thing; the first one given counts.
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Knobs that we lack, with the value that leaves them out.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}


@dataclasses.dataclass(frozen=True)
class Request:
    """How to continue a text.

    Attributes:
        until: the text ends before any of these.
        max_new_tokens: and after so many tokens.
        sampling: greedy unless the task asks for samples.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def parse(cls, options: Mapping[str, Any], eos: str) -> Request:
        """Of a task's generation_kwargs, as the harness's own backend reads them.

        eos: text of the end-of-sequence token, which always ends.
        Raises: SpecError for options that we do not have.
        """
        options = dict(options)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        given = [value for name in _NEW_TOKENS if (value := options.pop(name, None)) is not None]
        temperature = float(options.pop("temperature", 0.0) or 0.0)
        do_sample = options.pop("do_sample", None)
        if do_sample is None:
            do_sample = temperature > 0
        elif do_sample and not temperature:
            temperature = 1.0
        top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
        unknown = {k: v for k, v in options.items() if _NEUTRAL.get(k, ...) != v}
        if unknown:
            raise SpecError(
                f"a task asks for generation with {unknown}; known are until, "
                f"{', '.join(_NEW_TOKENS)}, do_sample, temperature, top_k and top_p"
            )
        sampling = Sampling(temperature, top_k or None, top_p) if do_sample else Sampling()
        ends = dict.fromkeys(text for text in (*until, eos) if text)
        return cls(tuple(ends), int(given[0] if given else _DEFAULT_NEW_TOKENS), sampling)

    def fit(self, prompt: Sequence[int], max_length: int) -> list[int]:
        """The prompt's end, as much of it as leaves room for the new tokens.

        Raises: SpecError where no room for a prompt is left.
        """
        room = max_length - self.max_new_tokens
        if room < 1:
            raise SpecError(
                f"a task asks for {self.max_new_tokens} new tokens, the model's context has "
                f"{max_length}; set max_gen_toks in the task's generation_kwargs"
            )
        return list(prompt[-room:])

    def cut(self, text: str) -> str:
        """What stands before the first end."""
        for end in self.until:
            text = text.split(end)[0]
        return text


def continue_batch(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    request: Request,
    key: jax.Array | None = None,
) -> list[str]:
    """The texts that follow; the batch stops as soon as each row has ended.

    Args:
        model, params, tokenizer: see `jq.models.generation`, whose errors are raised.
        prompts: token ids that leave room, see `Request.fit`.
        request: what ends a text.
        key: needed with a temperature.
    """
    rows = [_Row(tokenizer, request) for _ in prompts]
    steps = stream(
        model, params, prompts, request.max_new_tokens, request.sampling, key,
        tokenizer.eos_token_ids,
    )  # fmt: skip
    for tokens in steps:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.take(token)
        if all(row.ended for row in rows):
            break
    return [row.text() for row in rows]


class _Row:
    """A text in the making."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer, self._request = tokenizer, request
        self._ids: list[int] = []
        self._stream = TextStream(tokenizer)
        self._tail = ""
        # An end may begin in an earlier piece.
        self._reach = max(map(len, request.until), default=1) - 1
        self.ended = False

    def take(self, token: int) -> None:
        if self.ended:
            return
        if token == FINISHED or token in self._tokenizer.eos_token_ids:
            self.ended = True
            return
        self._ids.append(token)
        text = self._tail + self._stream.push(token)
        self.ended = any(end in text for end in self._request.until)
        self._tail = text[-self._reach :] if self._reach else ""

    def text(self) -> str:
        return self._request.cut(self._tokenizer.decode(self._ids))
