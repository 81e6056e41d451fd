"""Perplexity, its standard error, KL divergence and agreement: slow, obvious, NumPy float64."""

import math

import numpy as np


def log_softmax(logits):
    """[V] -> [V]."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max()
    return shifted - math.log(math.fsum(math.exp(x) for x in shifted))


def window_scores(tokens, logits, reference=None):
    """One window: tokens [T], logits [T, V] -> per scored position lists of (nll, kl, same)."""
    nll, kl, same = [], [], []
    for t in range(1, len(tokens)):
        log_q = log_softmax(logits[t - 1])
        nll.append(-log_q[tokens[t]])
        if reference is not None:
            log_p = log_softmax(reference[t - 1])
            kl.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
            same.append(float(np.argmax(log_p) == np.argmax(log_q)))
    return nll, kl, same


def mean(values):
    return math.fsum(values) / len(values)


def standard_error(values):
    m, n = mean(values), len(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (n - 1) / n)


def perplexity(token_nlls):
    """Lists of token NLLs per window -> exp of the mean over all tokens, delta-method error."""
    value = math.exp(mean([x for window in token_nlls for x in window]))
    return value, value * standard_error([mean(window) for window in token_nlls])


def jackknife_error(statistic, *columns):
    """Leave-one-out standard error of a statistic of paired columns: no delta method in it."""
    n = len(columns[0])
    left = [statistic(*(np.delete(c, i) for c in columns)) for i in range(n)]
    m = mean(left)
    return math.sqrt((n - 1) / n * math.fsum((x - m) ** 2 for x in left))
