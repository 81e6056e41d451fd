"""The result of an evaluation: numbers per window, and the estimates made of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jq.errors import CalibrationError
from jq.evaluate.statistics import Estimate, mean_estimate, perplexity, perplexity_difference

PROTOCOL = "token level, non-overlapping windows, first token of a window not scored"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model on windows of text, per token of its tokenizer.

    Perplexities of different tokenizers, window lengths or texts are not comparable, nor are they
    with word-level ones (lm-eval's `word_perplexity`).

    Attributes:
        seq_len: tokens of a window; seq_len - 1 are scored.
        tokens_sha256: of the tokens that were evaluated; equal digests make pairs.
        window_nll: float64 `[n]`, mean negative log-likelihood per scored token, nats.
        reference_window_nll: the same of the reference model; None without one.
        window_kl: float64 `[n]`, mean over positions of KL(reference || model), nats, or None.
        window_top1: float64 `[n]`, share of positions where both models' first choice is the same,
            or None.
    """

    seq_len: int
    tokens_sha256: str
    window_nll: np.ndarray
    reference_window_nll: np.ndarray | None = None
    window_kl: np.ndarray | None = None
    window_top1: np.ndarray | None = None

    @property
    def num_windows(self) -> int:
        return len(self.window_nll)

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return self.num_windows * (self.seq_len - 1)

    @property
    def perplexity(self) -> Estimate:
        """Token-level perplexity and its standard error (see `statistics.perplexity`)."""
        return perplexity(self.window_nll)

    @property
    def reference_perplexity(self) -> Estimate | None:
        return _optional(perplexity, self.reference_window_nll)

    @property
    def perplexity_increase(self) -> Estimate | None:
        """Perplexity minus the reference's, with the standard error of the pairs."""
        if self.reference_window_nll is None:
            return None
        return perplexity_difference(self.window_nll, self.reference_window_nll)

    @property
    def kl(self) -> Estimate | None:
        """Mean KL(reference || model) over positions, nats; standard error over windows."""
        return _optional(mean_estimate, self.window_kl)

    @property
    def top1_agreement(self) -> Estimate | None:
        """Share of positions with the same first choice, in [0, 1]; standard error over windows."""
        return _optional(mean_estimate, self.window_top1)

    def perplexity_over(self, other: Evaluation) -> Estimate:
        """Perplexity minus another model's on the same tokens, with the pairs' standard error.

        Raises: CalibrationError when the two saw different tokens or windows.
        """
        if (self.tokens_sha256, self.seq_len) != (other.tokens_sha256, other.seq_len):
            raise CalibrationError(
                "evaluations of different tokens make no pairs:"
                f" {self.num_windows} windows of {self.seq_len} ({self.tokens_sha256[:12]}) and"
                f" {other.num_windows} of {other.seq_len} ({other.tokens_sha256[:12]})"
            )
        return perplexity_difference(self.window_nll, other.window_nll)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; None where there is no reference, or where a number is not finite."""
        estimates = {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "perplexity_increase": self.perplexity_increase,
            "kl_nats": self.kl,
            "top1_agreement": self.top1_agreement,
        }
        windows = {
            "nll": self.window_nll,
            "reference_nll": self.reference_window_nll,
            "kl": self.window_kl,
            "top1": self.window_top1,
        }
        return {
            "level": "token",
            "protocol": PROTOCOL,
            "seq_len": self.seq_len,
            "windows": self.num_windows,
            "tokens_scored": self.num_tokens,
            "tokens_sha256": self.tokens_sha256,
            **{name: _plain(estimate) for name, estimate in estimates.items()},
            "per_window": {
                name: values.tolist() for name, values in windows.items() if values is not None
            },
        }


def _optional(estimate, values: np.ndarray | None) -> Estimate | None:
    return None if values is None else estimate(values)


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    numbers = estimate._asdict().items()
    return {name: number if math.isfinite(number) else None for name, number in numbers}
