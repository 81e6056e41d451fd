"""The arms of a comparison: a method by name, with everything else held equal.

numbers = Numbers(bits=4, group_size=128)
arms = [find_arm(name, numbers) for name in ("awq", "gptq", "gptq-no-act")]
unfair_pairs(arms)          # [("gptq-no-act", "awq", "GPTQ runs without act order ...")]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.pipeline import recipe_json
from jq.presets import PRESETS, preset
from jq.recipe import Method, Recipe, Rule, needs_calibration
from jq.spec import QuantSpec

# The model as it was given: every comparison has this arm, and measures the others against it.
ORIGINAL = "original"


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The number format that all weight-only arms share; 8-bit arms have their preset's.

    bits, group_size, symmetric: see `QuantSpec`.
    skip: regular expressions; linears whose path matches stay in full precision in every arm.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make the model smaller.

    name: what tables and files call it: letters, digits and hyphens.
    summary: one line.
    spec, method: None in the arm `ORIGINAL`.
    skip: see `Numbers`.
    """

    name: str
    summary: str
    spec: QuantSpec | None = None
    method: Method | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").isalnum():
            raise SpecError(f"arm {self.name!r}: names are letters, digits and hyphens")
        if (self.spec is None) != (self.method is None):
            raise SpecError(f"arm {self.name!r} needs both a spec and a method, or neither")

    @property
    def recipe(self) -> Recipe:
        """What `quantize_checkpoint` takes; empty for the original."""
        if self.spec is None:
            return ()
        return (*(Rule(p, None, None) for p in self.skip), Rule(".*", self.spec, self.method))

    @property
    def calibrated(self) -> bool:
        """Whether it learns from calibration data."""
        return any(rule.spec is not None and needs_calibration(rule) for rule in self.recipe)

    @property
    def family(self) -> str:
        """Arms of one family look alike in plots: "original", "RTN", "AWQ", "GPTQ", "8-bit"."""
        if self.spec is None:
            return "original"
        if self.spec.activation is not None or self.spec.bits == 8:
            return "8-bit"
        return type(self.method).__name__

    def hash(self, spec_hash: str) -> str:
        """Of the recipe and of the spec it is run under; equal hashes make equal results."""
        text = json.dumps([spec_hash, self.name, recipe_json(self.recipe)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A preset, and how an arm's method differs from the preset's."""

    preset: str
    summary: str
    method: Method | None = None


# GPTQ arms differ in their order alone, so that the order is what their comparison shows.
_GPTQ = PRESETS["gptq-act-order"].method
assert isinstance(_GPTQ, GPTQ)

ARMS: Mapping[str, _Kind] = {
    "rtn": _Kind("rtn", "round to nearest"),
    "rtn-clip": _Kind("rtn", "round to nearest, clipping searched", RTN(clip="output")),
    "awq": _Kind("awq", "activation-aware scales, clipping searched"),
    "awq-gptq": _Kind(
        "awq", "AWQ's scales, then GPTQ", AWQ(rounding=GPTQ(act_group_aware=True, clip="mse"))
    ),
    "gptq": _Kind("gptq", "GPTQ, act order within groups (needs no gather)"),
    "gptq-no-act": _Kind(
        "gptq", "GPTQ in the order of the inputs", dataclasses.replace(_GPTQ, desc_act=False)
    ),
    "gptq-act-order": _Kind("gptq-act-order", "GPTQ in act order (inference gathers)"),
    "gptq-static": _Kind(
        "gptq-act-order",
        "GPTQ in act order, groups fixed before",
        dataclasses.replace(_GPTQ, static_groups=True),
    ),
    "int8": _Kind("int8", "int8 weights and activations, round to nearest"),
    "fp8": _Kind("fp8", "fp8 weights and activations, round to nearest"),
    "smoothquant-int8": _Kind("smoothquant", "int8 weights and activations, smoothed"),
    "smoothquant-fp8": _Kind("smoothquant-fp8", "fp8 weights and activations, smoothed"),
}

DEFAULT_ARMS = (
    *("rtn", "awq", "gptq-no-act", "gptq", "gptq-act-order"),
    *("smoothquant-int8", "fp8"),
)


def original() -> Arm:
    """The arm every comparison has."""
    return Arm(ORIGINAL, "as it was given")


def find_arm(name: str, numbers: Numbers) -> Arm:
    """The arm of a name, a key of `ARMS`.

    Raises: SpecError for an unknown name, listing the known ones.
    """
    if name not in ARMS:
        raise SpecError(f"method {name!r} is unknown here; known: {', '.join(ARMS)}")
    kind = ARMS[name]
    if PRESETS[kind.preset].activation != "none":
        spec, method = preset(kind.preset)
    else:
        spec, method = preset(
            kind.preset,
            bits=numbers.bits,
            group_size=numbers.group_size,
            symmetric=numbers.symmetric,
        )
    return Arm(name, kind.summary, spec, kind.method or method, numbers.skip)


def find_arms(names: Sequence[str], numbers: Numbers) -> tuple[Arm, ...]:
    """The original and the arms of the names, each once, in their order."""
    wanted = [name for name in dict.fromkeys(names) if name != ORIGINAL]
    if not wanted:
        raise SpecError(f"nothing to compare with the original; known methods: {', '.join(ARMS)}")
    return (original(), *(find_arm(name, numbers) for name in wanted))


def unfair_pairs(arms: Sequence[Arm]) -> list[tuple[str, str, str]]:
    """(an arm, another, why) for pairs whose difference says little about their methods."""
    plain = [arm for arm in arms if _is_plain_gptq(arm)]
    aware = [arm for arm in arms if isinstance(arm.method, AWQ)]
    why = (
        "GPTQ runs without act order here, which its authors use; compare AWQ with gptq or "
        "gptq-act-order instead"
    )
    return [(a.name, b.name, why) for a in plain for b in aware]


def _is_plain_gptq(arm: Arm) -> bool:
    method: Any = arm.method
    return isinstance(method, GPTQ) and not (method.desc_act or method.act_group_aware)
