"""Our models as lm-evaluation-harness sees a model.

Tokens, truncation and beginnings of sequence are treated as in the harness's own Hugging Face
backend, so that both give the same numbers for the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from jq.errors import ModelError, SpecError
from jq.models.decoder import Decoder
from jq.models.tokenizer import Tokenizer
from jq.tasks.generation import Request, continue_batch
from jq.tasks.scoring import fit_pair, score_pairs


class HarnessLM(TemplateLM):
    """A model for the harness's `simple_evaluate`.

    Args:
        model, params: the decoder and its parameters, quantized or not.
        tokenizer: the model's.
        batch_size: sequences that run at once.
        max_length: tokens that the model reads at most; its context when None.
        seed: of texts that a task wants sampled.
        progress: called with (done, in all, what) as requests are answered.

    Attributes:
        truncated: requests so far that were longer than max_length and lost their beginning.

    Raises: ModelError: no end- and no beginning-of-sequence token; SpecError: sizes that are none.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        super().__init__()
        context = model.config.max_position_embeddings
        length = context if max_length is None else max_length
        if batch_size < 1 or not 2 <= length <= context:
            raise SpecError(
                f"batch_size {batch_size} and max_length {length}: give 1 or more, and 2 to the "
                f"model's context of {context}"
            )
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._batch_size, self._max_length = batch_size, length
        self._key, self._progress = jax.random.key(seed), progress
        self._eos, self._prefix = _ends(tokenizer)
        self._prefix_text = tokenizer.decode([self._prefix], skip_special_tokens=False)
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._max_length

    @property
    def batch_size(self) -> int:
        """Sequences that run at once."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of prompts, which only chat templates put to use."""
        return ""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, by default with the special tokens that the tokenizer itself adds, unless
        the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of whole texts, in windows in which every token is predicted once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self._max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to any of the strings that end it."""
        eos = self._tokenizer.decode([self._eos], skip_special_tokens=False)
        groups: dict[Request, list[int]] = {}
        prompts: list[list[int]] = []
        for index, (context, options) in enumerate(request.args for request in requests):
            parsed, ids = Request.parse(options, eos), self.tok_encode(context)
            prompts.append(parsed.fit(ids or [self._prefix], self._max_length))
            self.truncated += len(prompts[-1]) < len(ids)
            groups.setdefault(parsed, []).append(index)
        texts = [""] * len(requests)
        done = 0
        for parsed, members in groups.items():
            members.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                for i, text in zip(batch, self._write(prompts, batch, parsed), strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                done += len(batch)
                self._tell(done, len(requests), "texts")
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = True,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            pairs.append(fit_pair(context, continuation, self._max_length))
            self.truncated += len(pairs[-1].context) < len(context)
        scores = score_pairs(
            self._model,
            self._params,
            pairs,
            batch_size=self._batch_size,
            max_length=self._max_length,
            progress=lambda done, total: self._tell(done, total, "likelihoods"),
        )
        answers = [(score.log_prob, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _write(self, prompts: Sequence[list[int]], batch: list[int], request: Request) -> list[str]:
        """Texts of a batch, which is filled up to its full size, so that shapes stay few."""
        rows = [prompts[i] for i in batch]
        rows += rows[-1:] * (self._batch_size - len(rows))
        key = None
        if request.sampling.temperature > 0:
            self._key, key = jax.random.split(self._key)
        texts = continue_batch(self._model, self._params, self._tokenizer, rows, request, key)
        return texts[: len(batch)]

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress is not None:
            self._progress(done, total, what)


def _ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """End of text, and what stands before a text: what the tokenizer's own file calls so first,
    since that is what the harness's backend goes by."""
    eos, bos = tokenizer.own_eos_token_id, tokenizer.own_bos_token_id
    if eos is None:
        eos = next(iter(tokenizer.eos_token_ids), None)
    if bos is None and tokenizer.own_eos_token_id is None:
        bos = tokenizer.bos_token_id
    prefix = eos if bos is None else bos
    if prefix is None:
        raise ModelError(
            "the tokenizer names neither a beginning nor an end of sequence, one of which must "
            "stand before a text; name eos_token in tokenizer_config.json"
        )
    return (prefix if eos is None else eos), prefix
