"""The paired bootstrap, drawn window by window."""

import math

import numpy as np


def perplexity_interval(nll, base, level, resamples, seed):
    """(low, high) of exp(mean nll) - exp(mean base), percentiles over draws of windows."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = [int(rng.integers(len(nll))) for _ in nll]
        ours = math.exp(sum(nll[i] for i in drawn) / len(drawn))
        theirs = math.exp(sum(base[i] for i in drawn) / len(drawn))
        found.append(ours - theirs)
    found.sort()
    tail = (1 - level) / 2
    return found[round(tail * (resamples - 1))], found[round((1 - tail) * (resamples - 1))]
