"""What a model's quality is, and what quantization cost: token-level perplexity, KL, agreement.

result = evaluate(model, params, tokens, reference_params=original, seq_len=2048)
result.perplexity, result.kl                         # each a value and its standard error
paired_difference(a.window_nll, b.window_nll)        # two methods, window by window
"""

from __future__ import annotations

from jq.evaluate.result import Evaluation
from jq.evaluate.run import evaluate
from jq.evaluate.scores import token_log_probs
from jq.evaluate.statistics import (
    Estimate,
    mean_estimate,
    paired_difference,
    perplexity,
    perplexity_difference,
)

__all__ = [
    "Estimate",
    "Evaluation",
    "evaluate",
    "mean_estimate",
    "paired_difference",
    "perplexity",
    "perplexity_difference",
    "token_log_probs",
]
