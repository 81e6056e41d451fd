"""Log-likelihoods of continuations, in batches of few shapes; what contexts share is run once.

A continuation that stands alone behind its context goes through the model whole. Where several
continuations follow one context (the choices of a question), the context runs once, and they start
from its keys and values (`jq.tasks.shared`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.errors import NonFiniteError, SpecError
from jq.evaluate.scores import next_token_scores
from jq.models.decoder import Decoder
from jq.models.generation import bucket
from jq.tasks.shared import score_shared

# A context shorter than this is not worth a pass of its own.
_WORTH_SHARING = 16


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a continuation and of what stands before it; both at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return (*self.context, *self.continuation[:-1])


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a continuation: log p in nats, and whether greedy decoding would write it."""

    log_prob: float
    greedy: bool


def fit_pair(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Pair:
    """The pair, its context cut at the left where the model could not read all of it.

    Raises: SpecError for nothing to score, no context, or a continuation of more than max_length
        tokens.
    """
    if not continuation:
        raise SpecError("a task asks for the likelihood of an empty text; mend its choices")
    if not context:
        raise SpecError("a task asks for a likelihood after nothing; give at least one token")
    if len(continuation) > max_length:
        raise SpecError(
            f"a continuation of {len(continuation)} tokens does not fit into the model's context "
            f"of {max_length}"
        )
    # One token more than the context: the last one is not read.
    room = max_length + 1 - len(continuation)
    return Pair(tuple(context[-room:]), tuple(continuation))


def score_pairs(
    model: Decoder,
    params: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """The score of every pair, in their order. Equal pairs are computed once.

    Args:
        model, params: the decoder and its parameters, quantized or not.
        pairs: see `fit_pair`.
        batch_size: sequences that run at once.
        max_length: the longest shape; shorter ones are bucketed as in `jq.models.generation`.
        progress: called with (different pairs done, different pairs in all) after every batch.

    Raises: NonFiniteError: a log-likelihood is NaN or infinite, naming the pair.
    """
    unique = list(dict.fromkeys(pairs))
    families: dict[tuple[int, ...], list[Pair]] = {}
    for pair in unique:
        families.setdefault(pair.context, []).append(pair)
    sharing, alone = {}, []
    for context, members in families.items():
        if len(members) > 1 and len(context) >= _WORTH_SHARING:
            sharing[context] = [pair.continuation for pair in members]
        else:
            alone += members
    found: dict[Pair, Score] = {}

    def take(new: Iterator[tuple[Pair, float, bool]]) -> None:
        for pair, log_prob, greedy in new:
            if not np.isfinite(log_prob):
                raise NonFiniteError(
                    f"the log-likelihood of {len(pair.continuation)} tokens after "
                    f"{len(pair.context)} is {log_prob} (request {pairs.index(pair)}); check the "
                    "weights for non-finite values, or evaluate in a wider dtype"
                )
            found[pair] = Score(log_prob, greedy)
        if progress is not None:
            progress(len(found), len(unique))

    for batch in _by_length(alone, batch_size):
        take(_score_whole(model, params, batch, batch_size, max_length))
    for batch in _by_length(list(sharing), batch_size):
        rows = [(i, cont) for i, context in enumerate(batch) for cont in sharing[context]]
        scores = score_shared(model, params, batch, rows, batch_size, max_length)
        take((Pair(batch[i], cont), *score) for (i, cont), score in zip(rows, scores, strict=True))
    return [found[pair] for pair in pairs]


def _by_length(items: list[Any], batch_size: int) -> Iterator[list[Any]]:
    """Batches of neighbours in length, the longest first, so that want of memory shows at once."""

    def length(item: Any) -> int:
        return len(item.inputs) if isinstance(item, Pair) else len(item)

    ordered = sorted(items, key=lambda item: -length(item))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _score_whole(
    model: Decoder, params: Any, batch: list[Pair], batch_size: int, max_length: int
) -> Iterator[tuple[Pair, float, bool]]:
    """Pairs on the right-padded batch of their tokens; padding comes after what is scored."""
    length = min(bucket(len(batch[0].inputs)), max_length)
    inputs, targets = np.zeros((2, batch_size, length), np.int32)
    for row, pair in enumerate(batch):
        n = len(pair.inputs)
        inputs[row, :n] = pair.inputs
        targets[row, :n] = (*pair.inputs[1:], pair.continuation[-1])
    scores = next_token_scores(model, params, jnp.asarray(inputs), jnp.asarray(targets))
    log_probs, first = np.asarray(scores["log_prob"], np.float64), np.asarray(scores["first"])
    for row, pair in enumerate(batch):
        end = len(pair.inputs)
        scored = slice(end - len(pair.continuation), end)
        yield pair, float(log_probs[row, scored].sum()), bool(first[row, scored].all())
