"""Which method to choose: the decision matrices of the literature, and exact sizes.

advice = advise(Situation(find_gpu("a100-40gb"), find_model("llama-70b")[1], goal="memory"))
advice.method, advice.reasons, advice.fit.tokens
"""

from __future__ import annotations

from jq.advise.decide import Advice, Alternative, advise
from jq.advise.formats import Fit, Format
from jq.advise.known import find_model
from jq.advise.situation import Situation
from jq.gpus import GPU, GPUS, find_gpu

__all__ = [
    "GPU",
    "GPUS",
    "Advice",
    "Alternative",
    "Fit",
    "Format",
    "Situation",
    "advise",
    "find_gpu",
    "find_model",
]
