"""Named starting points: a number format and a method that go together.

spec, method = preset("gptq")                    # 4 bits in groups of 128
recipe = default_recipe(group_size=64)           # what `jaxq quantize` does when asked nothing
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Method, Recipe, uniform
from jq.spec import FP8, ActivationSpec, QuantSpec

# 8-bit activations by the name the command line gives them; None is 16 bits.
ACTIVATIONS: dict[str, ActivationSpec | None] = {
    "none": None,
    "int8-token": ActivationSpec("int8", "token"),
    "int8-tensor": ActivationSpec("int8", "tensor"),
    "int8-static": ActivationSpec("int8", "tensor", static=True),
    "fp8-token": ActivationSpec(FP8, "token"),
    "fp8-tensor": ActivationSpec(FP8, "tensor"),
    "fp8-static": ActivationSpec(FP8, "tensor", static=True),
    "fp8-block": ActivationSpec(FP8, "group"),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method and the format it starts from.

    summary: one line for people who choose.
    method: with the options we recommend.
    kind: "int" or "fp8" weights; None when the activations decide.
    bits, group_size, symmetric: of the weights; see `QuantSpec`.
    activation: a key of `ACTIVATIONS`.
    """

    summary: str
    method: Method
    kind: Literal["int", "fp8"] | None = None
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    activation: str = "none"


# GPTQ as we recommend it: clipped, and ordered so that inference needs no permutation.
GPTQ_ROUNDING = GPTQ(act_group_aware=True, clip="mse")

PRESETS: dict[str, Preset] = {
    "gptq": Preset(
        "4-bit weights; rounding that compensates its own error, group-aware, searched clipping",
        GPTQ_ROUNDING,
    ),
    "gptq-act-order": Preset(
        "4-bit weights; GPTQ in act order (desc_act), which inference pays with a gather",
        GPTQ(desc_act=True, clip="mse"),
    ),
    "awq": Preset(
        "4-bit weights; finer grids for channels with large activations, searched clipping",
        AWQ(),
    ),
    "rtn": Preset("4-bit weights; round to nearest, needs no calibration", RTN()),
    "smoothquant": Preset(
        "int8 weights and activations; outliers moved from activations into weights",
        SmoothQuant(alpha="auto"),
        bits=8,
        group_size=-1,
        symmetric=True,
        activation="int8-token",
    ),
    "smoothquant-fp8": Preset(
        "fp8 weights and activations, smoothed",
        SmoothQuant(alpha="auto", smooth="all"),
        kind="fp8",
        bits=8,
        group_size=-1,
        symmetric=True,
        activation="fp8-token",
    ),
    "int8": Preset(
        "int8 weights and activations, round to nearest, needs no calibration",
        RTN(),
        kind="int",
        bits=8,
        group_size=-1,
        symmetric=True,
        activation="int8-token",
    ),
    "fp8": Preset(
        "fp8 weights and activations, round to nearest, needs no calibration",
        RTN(),
        kind="fp8",
        bits=8,
        group_size=-1,
        symmetric=True,
        activation="fp8-token",
    ),
}

DEFAULT = "gptq"


def preset(
    name: str = DEFAULT,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activation: str | None = None,
) -> tuple[QuantSpec, Method]:
    """The format and the method behind a name.

    Args:
      name: a key of `PRESETS`.
      bits, group_size, symmetric: of the weights; None is the preset's choice.
      activation: a key of `ACTIVATIONS`, None the preset's. With 8-bit activations the weights
        follow: 8 bits and one scale per output, where nothing else is asked for.
    Raises: SpecError for an unknown name, and for combinations that have no meaning.
    """
    chosen = find_preset(name)
    act_name = chosen.activation if activation is None else activation
    if act_name not in ACTIVATIONS:
        raise SpecError(f"activation {act_name!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    act = ACTIVATIONS[act_name]
    kind = _kind(name, chosen, act, act_name)
    eight = act is not None or kind == "fp8"
    bits = (8 if eight else chosen.bits) if bits is None else bits
    if eight and bits != 8:
        raise SpecError(
            f"bits {bits} with {'activation ' + act_name if act else 'method ' + name}: "
            "8-bit arithmetic needs 8-bit weights; leave bits out, or choose a weight-only method"
        )
    if not 2 <= bits <= 8:
        raise SpecError(f"bits {bits} is not in 2..8")
    block = act is not None and act.granularity == "group"
    if group_size is None:
        group_size = 128 if block else -1 if eight else chosen.group_size
    spec = QuantSpec(
        dtype=FP8 if kind == "fp8" else f"int{bits}",
        group_size=group_size,
        symmetric=(True if eight else chosen.symmetric) if symmetric is None else symmetric,
        granularity="block" if block else "group",
        scale_dtype="bfloat16" if act is None else "float32",
        activation=act,
    )
    return spec, chosen.method


def find_preset(name: str) -> Preset:
    """The entry of `PRESETS`; SpecError listing the known names otherwise."""
    if name not in PRESETS:
        raise SpecError(f"method {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def default_recipe(
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activation: str | None = None,
) -> Recipe:
    """What we recommend without knowing more: every linear of every block by the default preset."""
    spec, method = preset(
        DEFAULT, bits=bits, group_size=group_size, symmetric=symmetric, activation=activation
    )
    return uniform(spec, method)


def _kind(
    name: str, chosen: Preset, act: ActivationSpec | None, act_name: str
) -> Literal["int", "fp8"]:
    if act is None:
        return chosen.kind or "int"
    kind = "fp8" if act.dtype == FP8 else "int"
    if chosen.kind not in (None, kind):
        raise SpecError(
            f"method {name!r} has {chosen.kind} weights, which do not go with activation "
            f"{act_name!r}"
        )
    return kind
