"""Scores of windows by position: how far a model is from the original, and where in a long text.

Per window and stretch of positions, so that everything else (perplexity, differences in pairs,
shorter sequences) is a weighted mean of what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jq.errors import OutputError

if TYPE_CHECKING:
    from jaxtyping import Float64

SCORES = ("nll", "kl", "top1")
_SHORTEST, _MOST = 8, 8


def position_edges(seq_len: int) -> tuple[int, ...]:
    """Stretches of positions [1, e1), [e1, e2), ..., [..., seq_len): each twice the last one's."""
    edges = [seq_len]
    while edges[0] // 2 >= _SHORTEST and len(edges) < _MOST:
        edges.insert(0, edges[0] // 2)
    return (1, *edges)


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """Mean scores of windows of seq_len tokens, per stretch of positions.

    Attributes:
        tokens_sha256: of the tokens; equal digests make pairs.
        edges: E + 1 positions that delimit the stretches; position p has p tokens before it, and
            position 0 is not scored.
        scores: float64 `[n, E]` each: "nll" (nats per token), and beside a reference "kl" (nats
            per token, of KL(reference || model)) and "top1" (share of equal first choices).
    """

    tokens_sha256: str
    edges: tuple[int, ...]
    scores: Mapping[str, np.ndarray]

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.edges[-1]

    @property
    def num_windows(self) -> int:
        return len(self.scores["nll"])

    def window(self, name: str) -> Float64[np.ndarray, "n"] | None:
        """Means over the positions of each window; None for a score that was not measured."""
        scores = self.scores.get(name)
        return None if scores is None else scores @ (self._widths / self._widths.sum())

    def prefix(self, name: str) -> Float64[np.ndarray, "n E"] | None:
        """Means over the first edges[1], edges[2], ... tokens of each window.

        A causal model scores a token by what is before it: these are the scores of windows of so
        many tokens with the same starts.
        """
        scores = self.scores.get(name)
        if scores is None:
            return None
        return np.cumsum(scores * self._widths, axis=1) / np.cumsum(self._widths)

    @property
    def _widths(self) -> np.ndarray:
        return np.diff(self.edges).astype(np.float64)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "tokens_sha256": self.tokens_sha256,
            "edges": list(self.edges),
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Quality:
        """Of what `to_dict` made."""
        scores = {name: np.asarray(x, np.float64) for name, x in value["scores"].items()}
        return cls(value["tokens_sha256"], tuple(value["edges"]), scores)

    def check_pairs(self, other: Quality) -> None:
        """Raise OutputError unless both were measured on the same windows."""
        if (self.tokens_sha256, self.edges) != (other.tokens_sha256, other.edges):
            raise OutputError(
                f"results on different windows make no pairs: {self.num_windows} of "
                f"{self.seq_len} ({self.tokens_sha256[:12]}) and {other.num_windows} of "
                f"{other.seq_len} ({other.tokens_sha256[:12]})"
            )


class Stretches:
    """Collects scores `[B, T-1]` of batches (the `observe` of `evaluate`) as means of stretches."""

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = tuple(edges)
        self._parts: dict[str, list[np.ndarray]] = {}

    def observe(self, scores: Mapping[str, np.ndarray]) -> None:
        """Take the next batch."""
        starts = np.asarray(self.edges[:-1]) - 1  # the first score is that of position 1
        for name in SCORES:
            if name in scores:
                sums = np.add.reduceat(scores[name].astype(np.float64), starts, axis=1)
                self._parts.setdefault(name, []).append(sums / np.diff(self.edges))

    def quality(self, tokens_sha256: str) -> Quality:
        """What all batches together say."""
        joined = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return Quality(tokens_sha256, self.edges, joined)
