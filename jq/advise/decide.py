"""The decision: which format, by which method, and why.

The order of the questions is that of the literature's decision matrices: the quality that is
needed, what calibration may cost, which arithmetic the GPU has, and whether memory or compute
bounds the work there.  Nothing is measured here: `jaxq compare` and `jaxq bench` do that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jq.advise.formats import (
    FORMATS,
    FP8,
    INT8,
    Fit,
    Format,
    candidates,
    measure,
    spec_of,
    unquantized,
)
from jq.advise.methods import Alternative, method_for
from jq.advise.situation import Situation
from jq.advise.warnings import warnings_for
from jq.errors import SpecError
from jq.gpus import missing
from jq.presets import ACTIVATIONS, DEFAULT, PRESETS, preset
from jq.recipe import Rule, needs_calibration, uniform


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        method: a preset, as `jaxq quantize --method` takes it.
        options: the other options of `jaxq quantize`, flags and values.
        reasons: why, the weightiest first.
        warnings: what to keep in mind.
        alternatives: presets that would do too.
        fits: whether weights and cache fit; if not, the smallest choice was taken.
        fit: memory and ceilings of the choice.
        considered: every format, with what spoke against it.
        full_precision: the model in 16 bits.
    """

    method: str
    options: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    fits: bool
    fit: Fit
    considered: tuple[Fit, ...]
    full_precision: Fit

    def command(self, model: str) -> str:
        """A command line that does it; OUT and TEXT are to be filled in."""
        text = ["--calib-dataset", "TEXT"] if needs_calibration(self._rule) else []
        return " ".join(["jaxq quantize", model, "--out OUT", *self.options, *text])

    @property
    def _rule(self) -> Rule:
        return uniform(*preset(self.method))[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; bytes and seconds."""
        return dataclasses.asdict(self)


def advise(s: Situation) -> Advice:
    """Advice for a situation.

    Raises: SpecError where nothing is left, such as fp8 on a GPU that has none.
    """
    if s.activations == "fp8" and (why := missing(s.gpu, "fp8")):
        raise SpecError(f"{why}; ask for int8 or 8-bit activations")
    considered = candidates(s)
    open_, reasons = _possible(considered), []
    if s.existing is not None:
        kept = _existing_format(s)
        found = next(fit for fit in considered if fit.format is kept)
        if found.against is None:
            open_ = [found]
        else:
            reasons.append(f"{s.existing} cannot be kept: {found.against}")
            s = dataclasses.replace(s, existing=None)
    fits = [fit for fit in open_ if fit.against is None]
    if fits:
        chosen, why = _choose(s, fits)
    else:
        chosen, why = _least(s, open_)
    assert chosen.format is not None
    method = method_for(s, chosen.format)
    final = _final(s, chosen.format, method.name)
    plain = unquantized(s)
    return Advice(
        method=method.name,
        options=_options(s, final, method.name),
        reasons=(
            *reasons,
            *([] if s.existing else [why]),
            f"{method.name}: {method.why}",
            *_numbers(s, final),
        ),
        warnings=warnings_for(s, final, method.name, plain),
        alternatives=(*method.alternatives, *_other_formats(s, considered, final)),
        fits=final.against is None,
        fit=final,
        considered=considered,
        full_precision=plain,
    )


def _possible(considered: tuple[Fit, ...]) -> list[Fit]:
    """Formats that nothing but memory may speak against."""
    found = [fit for fit in considered if fit.unwanted is None]
    if not found:
        raise SpecError(
            "no format is left: "
            + "; ".join(f"{_name(fit)}: {fit.unwanted}" for fit in considered)
            + "; ask for less"
        )
    return found


def _existing_format(s: Situation) -> Format:
    """The format that the preset of a working pipeline makes."""
    chosen = PRESETS[s.existing or DEFAULT]
    activation = ACTIVATIONS[chosen.activation]
    if activation is not None:
        return FP8 if chosen.kind == "fp8" or activation.dtype != "int8" else INT8
    bits = s.bits or chosen.bits
    return next(f for f in FORMATS if f.weight_only and f.bits == bits)


def _choose(s: Situation, fits: list[Fit]) -> tuple[Fit, str]:
    """A format among those that fit, by the goal, and why."""
    quick = [fit for fit in fits if fit.format and s.gpu.has(fit.format.arithmetic)] or fits
    match s.goal:
        case "memory":
            best = min(fits, key=lambda fit: fit.weights)
            return best, f"memory is the limit: {_name(best)} takes the least of what is allowed"
        case "quality":
            best = max(fits, key=lambda fit: (_format(fit).bits, _format(fit).weight_only))
            return best, f"quality first: {_name(best)} is the widest format that fits"
        case "latency":
            best = min(quick, key=lambda fit: fit.step_seconds)
            limit = "memory" if best.memory_seconds > best.compute_seconds else "compute"
            return best, (
                f"latency first: at batch {s.batch} a step is {limit}-bound, "
                f"and {_name(best)} has the lowest floor"
            )
    return _throughput(s, quick)


def _throughput(s: Situation, fits: list[Fit]) -> tuple[Fit, str]:
    eight = [fit for fit in fits if not _format(fit).weight_only]
    if eight:
        best = max(eight, key=lambda fit: s.gpu.has("fp8") and _format(fit) is FP8)
        return best, (
            f"throughput first: large batches and prompts are compute-bound, and {s.gpu.name} "
            f"has {_format(best).arithmetic} tensor cores, twice as fast as 16-bit ones"
        )
    best = max(fits, key=lambda fit: fit.best_tokens_per_second)
    return best, (
        f"throughput first, but nothing with 8-bit activations is possible here: {_name(best)} has "
        f"the highest ceiling; sequences that fit at once: {best.sequences}"
    )


def _least(s: Situation, open_: list[Fit]) -> tuple[Fit, str]:
    best = min(open_, key=lambda fit: fit.weights)
    needed = best.weights + best.per_token * s.batch * s.context
    gpus = math.ceil(needed / (1e9 * s.gpu.memory_gb - s.reserve)) if s.gpu.memory_gb else 0
    return best, (
        f"nothing fits: {_name(best)}, the smallest choice, {best.against}; {gpus} x "
        f"{s.gpu.name} would do, or {'a shorter context' if best.tokens else 'a larger GPU'}"
    )


def _final(s: Situation, f: Format, method: str) -> Fit:
    """The format as the method and the engine want it."""
    symmetric = True if _format_flag(s, method, f) == "gptq" else None
    spec = spec_of(s, f, symmetric=symmetric)
    return measure(s, f, spec, act_order=method == "gptq-act-order")


def _options(s: Situation, fit: Fit, method: str) -> tuple[str, ...]:
    f, spec = _format(fit), fit.spec
    assert spec is not None
    options = ["--method", method]
    if f.weight_only and f.bits != PRESETS[method].bits:
        options += ["--bits", str(f.bits)]
    if f.weight_only and spec.group_size != PRESETS[method].group_size:
        options += ["--group-size", str(spec.group_size)]
    if target := _format_flag(s, method, f):
        options += ["--format", target]
    if spec.symmetric and not PRESETS[method].symmetric:
        options.append("--symmetric")
    return tuple(options)


def _format_flag(s: Situation, method: str, f: Format) -> str | None:
    """The format of files that the engine reads; None for our own."""
    if s.engine == "jaxq":
        return None
    if method.startswith("gptq"):
        return "gptq"
    return "awq" if method == "awq" and f.bits == 4 else "compressed-tensors"


def _numbers(s: Situation, fit: Fit) -> list[str]:
    """Memory and ceilings of the choice."""
    weights, capacity, reserve = (x / 1e9 for x in (fit.weights, fit.capacity, fit.reserve))
    if fit.left < 0:
        room = "nothing is left for the key-value cache"
    else:
        room = (
            f"{fit.left / 1e9:.1f} GB are left for {fit.tokens:,} tokens of key-value cache "
            f"({fit.per_token / 1e6:.3f} MB each), {fit.sequences} x {s.context:,}"
        )
    lines = [f"weights {weights:.1f} GB of {capacity:.0f} GB, {reserve:.1f} GB set aside: {room}"]
    if fit.against is None:
        rate = s.batch / fit.step_seconds
        lines.append(
            f"by the data sheet a decode step takes {1e3 * fit.step_seconds:.1f} ms or more at "
            f"batch {s.batch}: {rate:,.0f} tokens/s at the very most"
        )
    return lines


def _other_formats(s: Situation, considered: tuple[Fit, ...], chosen: Fit) -> list[Alternative]:
    """Other formats that fit, where the numbers speak for them."""
    found = []
    for fit in considered:
        f = _format(fit)
        if fit.against is not None or f is _format(chosen) or not s.gpu.has(f.arithmetic):
            continue
        faster = fit.best_tokens_per_second / max(chosen.best_tokens_per_second, 1e-9)
        if s.goal == "throughput" and faster > 1.2:
            found.append(
                Alternative(
                    method_for(dataclasses.replace(s, existing=None), f).name,
                    f"{f.name} leaves room for {fit.sequences} sequences of {s.context:,} tokens "
                    f"instead of {chosen.sequences}: its ceiling is {faster:.1f} times as high "
                    "when all of them decode; measure both",
                )
            )
    return found


def _format(fit: Fit) -> Format:
    assert fit.format is not None
    return fit.format


def _name(fit: Fit) -> str:
    return _format(fit).name
