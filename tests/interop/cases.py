"""What is written for other tools here, and who opens it."""

from __future__ import annotations

import dataclasses

from jq.calib import calibration_from_tokens
from jq.calib.config import CalibrationConfig
from jq.formats.plan import ExportFormat, FormatOptions
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.pipeline import quantize_checkpoint
from jq.recipe import Recipe, Rule, uniform
from jq.spec import FP8, ActivationSpec, QuantSpec, w8a8

NEAREST, ACT_ORDER = RTN(), GPTQ(desc_act=True)


def half(bits, group_size, symmetric):
    """A weight-only format with the float16 scales of GPTQ and AWQ files."""
    return QuantSpec(f"int{bits}", group_size, symmetric, scale_dtype="float16")


@dataclasses.dataclass(frozen=True)
class Written:
    """A folder that jaxq writes: the format, and how the linears are quantized."""

    target: ExportFormat
    recipe: Recipe
    options: FormatOptions = FormatOptions()


def _written(target, spec, method=NEAREST, **options):
    return Written(target, uniform(spec, method), FormatOptions(**options))


def _fp8(granularity="channel", size=-1, activation=None):
    return QuantSpec(FP8, size, True, granularity, "float32", activation)


_MIXED = (
    Rule(r"layers_0/mlp", None, None),
    Rule(r"o_proj", half(8, 64, True), RTN()),
    Rule(r".*", half(4, 128, True), RTN()),
)
_MIXED_8 = (
    Rule(r"layers_0/mlp", None, None),
    Rule(r"o_proj", w8a8(), RTN()),
    Rule(r".*", QuantSpec("int4", 128, False), RTN()),
)

WRITTEN = {
    "gptq-w4-sym-v1": _written("gptq", half(4, 128, True)),
    "gptq-w4-sym-v2": _written("gptq", half(4, 64, True), checkpoint_format="gptq_v2"),
    "gptq-w4-asym-v2": _written("gptq", half(4, 128, False)),
    "gptq-w4-sym-act-order": _written("gptq", half(4, 128, True), ACT_ORDER),
    "gptq-w4-asym-act-order": _written("gptq", half(4, 32, False), ACT_ORDER),
    "gptq-w2-asym": _written("gptq", half(2, 32, False)),
    "gptq-w3-sym": _written("gptq", half(3, 128, True)),
    "gptq-w8-column": _written("gptq", half(8, -1, True)),
    "gptq-mixed": Written("gptq", _MIXED),
    "awq-w4-asym": _written("awq", half(4, 128, False)),
    "awq-w4-sym": _written("awq", half(4, 64, True)),
    "awq-w4-skipped": Written(
        "awq", (Rule("layers_0/mlp", None, None), Rule(".*", half(4, 64, False), RTN()))
    ),
    "ct-w4-sym": _written("compressed-tensors", QuantSpec("int4", 128, True)),
    "ct-w4-asym": _written("compressed-tensors", QuantSpec("int4", 32, False)),
    "ct-w3-asym": _written("compressed-tensors", QuantSpec("int3", 64, False)),
    "ct-w8-column": _written("compressed-tensors", QuantSpec("int8", -1, True)),
    "ct-int8-dynamic": _written("compressed-tensors", w8a8()),
    "ct-int8-static": _written("compressed-tensors", w8a8(activation="tensor", static=True)),
    "ct-fp8-dynamic": _written("compressed-tensors", w8a8(FP8)),
    "ct-fp8-static": _written(
        "compressed-tensors", w8a8(FP8, activation="tensor", static=True, weight="tensor")
    ),
    "ct-fp8-block": _written(
        "compressed-tensors", _fp8("block", 128, ActivationSpec(FP8, "group"))
    ),
    "ct-fp8-weights": _written("compressed-tensors", _fp8()),
    "ct-mixed": Written("compressed-tensors", _MIXED_8),
}


def write_all(model, tokens, out):
    """Quantize a model folder into OUT/<name> for each of `WRITTEN`."""
    samples, length = tokens.shape
    config = CalibrationConfig("", samples, length)
    calibration = calibration_from_tokens(tokens, config, vocab_size=int(tokens.max()) + 1)
    for name, case in WRITTEN.items():
        quantize_checkpoint(
            model,
            out / name,
            case.recipe,
            calibration,
            target=case.target,
            options=case.options,
            shard_bytes=4_000_000,  # so that indices are read too
        )
