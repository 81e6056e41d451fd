"""quantization_config: what it says, and that the reader understands the same."""

import re

import pytest

from jq.formats.config_json import quantization_config
from jq.formats.plan import FormatOptions, PlannedLinear, schemes_for
from jq.formats.quant_config import parse
from jq.spec import FP8, ActivationSpec, QuantSpec, w8a8

W4, SYM, W8 = QuantSpec("int4", 32, False), QuantSpec("int4", 32, True), QuantSpec("int8", -1, True)
STATIC = w8a8(activation="tensor", static=True)
BLOCK = QuantSpec(FP8, 32, True, "block", "float32", ActivationSpec(FP8, "group"))
NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def modules(*layers):
    """Module names of layers 1, 11, ...: names that are parts of each other, but for a dot."""
    return [f"model.layers.{layer}.{name}" for layer in layers for name in NAMES]


def config(target, specs, ordered=(), **options):
    """specs: module -> QuantSpec or None; the schemes and the JSON object."""
    plan = {m: PlannedLinear(s, 64, 64, m in ordered) for m, s in specs.items() if s is not None}
    schemes = schemes_for(plan, target, FormatOptions(**options))
    return schemes, quantization_config(target, schemes, [m for m in specs if m not in plan])


MIXED = dict.fromkeys(modules(1, 11), SYM) | {
    "model.layers.1.mlp.down_proj": None,
    "model.layers.11.self_attn.o_proj": W8,
}


@pytest.mark.parametrize(
    ("target", "specs", "options"),
    [
        ("gptq", dict.fromkeys(modules(1), SYM), {}),
        ("gptq", dict.fromkeys(modules(1), W4), {}),
        ("gptq", MIXED, {"checkpoint_format": "gptq_v2"}),
        ("awq", dict.fromkeys(modules(1), W4), {}),
        ("awq", dict.fromkeys(modules(1, 11), SYM) | {modules(1)[0]: None}, {}),
        ("compressed-tensors", MIXED, {}),
        *(
            ("compressed-tensors", dict.fromkeys(modules(1), spec), {})
            for spec in (W4, W8, w8a8(), STATIC, w8a8(FP8), BLOCK, QuantSpec(FP8, -1))
        ),
        ("compressed-tensors", dict.fromkeys(modules(1), W4) | {modules(1)[2]: STATIC}, {}),
    ],
)
def test_the_reader_understands_what_was_written(target, specs, options):
    schemes, written = config(target, specs, **options)
    read = parse(written)
    assert read.method == target
    for module, spec in specs.items():
        assert read.scheme(module) == (None if spec is None else schemes[module]), module
    assert read.scheme("lm_head") is None


def test_gptq():
    ordered = ("model.layers.11.mlp.up_proj",)
    _, written = config("gptq", MIXED, ordered)
    common = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert written.items() >= common.items()
    assert written["checkpoint_format"] == "gptq"
    assert written["dynamic"] == {
        r"+:^model\.layers\.11\.self_attn\.o_proj$": common | {"bits": 8, "group_size": -1},
        r"+:^model\.layers\.11\.mlp\.up_proj$": common | {"desc_act": True},
        r"-:^model\.layers\.1\.mlp\.down_proj$": {},
    }
    assert re.fullmatch(r"jaxq:\d.*", *written["meta"]["quantizer"])
    assert "dynamic" not in config("gptq", dict.fromkeys(modules(1), SYM))[1]


def test_awq():
    _, written = config("awq", dict.fromkeys(modules(1), W4) | {modules(1)[0]: None})
    assert written["modules_to_not_convert"] == [modules(1)[0], "lm_head"]
    expected = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32}
    assert written.items() >= (expected | {"zero_point": True}).items()


def test_compressed_tensors():
    _, written = config("compressed-tensors", MIXED)
    groups = written["config_groups"]
    assert written["format"] == "pack-quantized"
    assert written["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert groups["group_1"]["targets"] == ["model.layers.11.self_attn.o_proj"]
    assert len(groups["group_0"]["targets"]) == 8
    mixed = dict.fromkeys(modules(1), W4) | {modules(1)[2]: STATIC}
    _, written = config("compressed-tensors", mixed)
    assert written["format"] == "mixed-precision"
    assert written["config_groups"]["group_1"]["format"] == "int-quantized"
    activations = written["config_groups"]["group_1"]["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("tensor", False)
    _, written = config("compressed-tensors", dict.fromkeys(modules(1), BLOCK))
    assert written["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert written["config_groups"]["group_0"]["weights"]["block_structure"] == [32, 32]
