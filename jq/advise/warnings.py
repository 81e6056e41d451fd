"""What to keep in mind: the caveats of the literature, each where it applies."""

from __future__ import annotations

from jq.advise.formats import Fit
from jq.advise.situation import Situation
from jq.kernels.choice import REFERENCE
from jq.presets import preset
from jq.recipe import needs_calibration, uniform

_LONG = 4096  # beyond it, perplexity at the usual 2048 tokens says little
_PREALLOCATED = 0.75  # of a GPU's memory, by JAX, unless the environment says otherwise


def warnings_for(s: Situation, fit: Fit, method: str, plain: Fit) -> tuple[str, ...]:
    """Warnings about a choice; `plain` is the model in 16 bits."""
    return tuple(
        text
        for text in (
            _kernel(s, fit),
            fit.caveat,
            _half(s),
            _preallocated(s, fit),
            _not_needed(plain),
            _compute_bound(s, fit),
            _positions(s),
            _long_context(s),
            _calibration(method),
            _often(s),
            _unfair(method),
            _tasks(fit),
            "numbers do not carry over between engines, kernels or calibration sets: measure "
            "yours (jaxq compare, jaxq bench)",
        )
        if text
    )


def _kernel(s: Situation, fit: Fit) -> str | None:
    if s.engine != "jaxq":
        return f"whether {s.engine} has kernels for this on {s.gpu.sm} is for its documents to say"
    if fit.kernel.kernel != REFERENCE:
        return None
    return (
        f"no kernel of ours serves this yet ({fit.kernel.reason}): it runs on the XLA reference, "
        "which saves memory but not time"
    )


def _half(s: Situation) -> str | None:
    if s.gpu.half == "bfloat16":
        return None
    return (
        f"{s.gpu.name} has no bfloat16: use float16 activations, and watch for overflow in models "
        "that were trained in bfloat16"
    )


def _not_needed(plain: Fit) -> str | None:
    if plain.against is not None:
        return None
    return (
        f"the model fits unquantized, too ({plain.weights / 1e9:.1f} GB in 16 bits, "
        f"{plain.tokens:,} tokens of cache): quantize it for speed or room, not out of need"
    )


def _compute_bound(s: Situation, fit: Fit) -> str | None:
    assert fit.format is not None
    if not fit.format.weight_only or s.batch < fit.break_even:
        return None
    return (
        f"weight-only formats help where memory is the bound: on {s.gpu.name} a step is "
        f"compute-bound from a batch of about {fit.break_even:.0f}, and yours is {s.batch}"
    )


def _preallocated(s: Situation, fit: Fit) -> str | None:
    needed = fit.weights + fit.reserve + fit.per_token * s.batch * s.context
    if s.engine != "jaxq" or fit.too_large or needed <= _PREALLOCATED * fit.capacity:
        return None
    return (
        f"JAX takes {_PREALLOCATED:.0%} of a GPU's memory by default, and this needs "
        f"{needed / fit.capacity:.0%}: set XLA_PYTHON_CLIENT_MEM_FRACTION higher"
    )


def _positions(s: Situation) -> str | None:
    limit = s.model.max_position_embeddings
    if s.context <= limit:
        return None
    return f"the model has {limit:,} positions, fewer than the context of {s.context:,} tokens"


def _long_context(s: Situation) -> str | None:
    if s.context <= _LONG:
        return None
    return f"evaluate at {s.context:,} tokens: short windows do not show what long contexts lose"


def _calibration(method: str) -> str | None:
    if not needs_calibration(uniform(*preset(method))[0]):
        return None
    return "calibrate on text like your prompts: text far from them costs quality"


def _often(s: Situation) -> str | None:
    if not s.requantize_often:
        return None
    return "faster calibration says nothing about faster inference"


def _unfair(method: str) -> str | None:
    if method not in ("gptq", "awq"):
        return None
    return "compare AWQ with gptq or gptq-act-order: GPTQ without any act order is no fair opponent"


def _tasks(fit: Fit) -> str | None:
    if fit.spec is None or fit.spec.bits > 4:
        return None
    return (
        "perplexity does not always track tasks: reasoning and code lose more than easy ones, so "
        "measure those that matter"
    )
