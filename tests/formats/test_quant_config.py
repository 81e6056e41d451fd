"""quantization_config: what each linear is told, and what is refused."""

import json

import pytest

from jq.errors import ModelError
from jq.formats.awq import AWQScheme
from jq.formats.gptq import GPTQScheme
from jq.formats.quant_config import parse, quantization_of
from jq.spec import ActivationSpec, QuantSpec
from tests.formats.folders import activations, awq_config, ct_config, gptq_config, group

DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def test_gptq():
    config = parse(gptq_config(bits=3, group_size=-1, checkpoint_format="gptq_v2"))
    assert config.method == "gptq"
    assert config.scheme(DOWN) == GPTQScheme(3, -1, False, True, "gptq_v2")
    assert config.scheme("lm_head") is None
    assert parse(gptq_config(lm_head=True)).scheme("lm_head") == parse(gptq_config()).scheme(DOWN)


def test_what_older_gptq_configs_leave_out():
    config = parse({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert config.scheme(DOWN) == GPTQScheme(4, 128, True, False, "gptq")


@pytest.mark.parametrize("told", [["gptqmodel:7.6.0"], "gptqmodel:2.0", ["autogptq", "gptqmodel"]])
def test_gptqmodel_decrements_whole_words(told):
    assert parse(gptq_config(meta={"quantizer": told})).scheme(DOWN).borrow
    assert not parse(gptq_config(meta={"quantizer": ["other:1"]})).scheme(DOWN).borrow


def test_gptq_overrides_decide_in_order_from_the_start_of_a_name():
    rules = {
        r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 32, "sym": True, "desc_act": False},
        r"-:.*\.mlp\..*": {},
        r"model\.layers\.0\.self_attn\.q": {"bits": 2},
        r"mlp": {"bits": 3},
    }
    config = parse(gptq_config(dynamic=rules))
    assert config.scheme(DOWN) == GPTQScheme(8, 32, True, False)
    assert config.scheme("model.layers.0.mlp.down_proj") is None
    assert config.scheme(QUERY) == GPTQScheme(2, 16, False, True)
    assert config.scheme("model.layers.0.self_attn.o_proj") == GPTQScheme(4, 16, False, True)
    assert config.scheme("lm_head") is None


def test_gptq_of_some_modules_only():
    only = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    config = parse(gptq_config(modules_in_block_to_quantize=only))
    assert config.scheme(DOWN) == config.scheme(QUERY) == GPTQScheme(4, 16, False, True)
    assert config.scheme("model.layers.0.self_attn.v_proj") is None


def test_awq():
    config = parse(awq_config(modules_to_not_convert=["layers.0.", "down_proj"]))
    assert config.scheme("model.layers.1.mlp.up_proj") == AWQScheme(16, True)
    assert config.scheme(QUERY) is config.scheme(DOWN) is config.scheme("lm_head") is None
    old = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 64}
    assert parse(old | {"zero_point": False}).scheme(DOWN) == AWQScheme(64, False)


def test_the_narrowest_target_decides():
    config = parse(
        ct_config(
            group(num_bits=8),
            group(num_bits=4, targets=[r"re:.*mlp\..*"]),
            group(num_bits=2, targets=[DOWN]),
            ignore=["lm_head", r"re:.*\.0\.mlp\.up_proj$"],
        )
    )
    assert config.scheme(QUERY).num_bits == 8
    assert config.scheme("model.layers.0.mlp.gate_proj").num_bits == 4
    assert config.scheme(DOWN).num_bits == 2
    assert config.scheme("model.layers.0.mlp.up_proj") is config.scheme("lm_head") is None
    named = parse(ct_config(group(targets=[DOWN])))
    assert named.scheme(QUERY) is None


@pytest.mark.parametrize(
    ("one", "spec"),
    [
        (group(), QuantSpec("int4", 16)),
        (group(num_bits=8, strategy="channel", group_size=None), QuantSpec("int8", -1)),
        (group(symmetric=False, actorder="static"), QuantSpec("int4", 16, False)),
        (
            group("int-quantized", activations("int"), num_bits=8, strategy="channel"),
            QuantSpec("int8", -1, activation=ActivationSpec("int8")),
        ),
        (
            group(
                "int-quantized",
                activations("int", dynamic=False, strategy="tensor"),
                num_bits=8,
                strategy="tensor",
            ),
            QuantSpec(
                "int8",
                granularity="tensor",
                activation=ActivationSpec("int8", "tensor", static=True),
            ),
        ),
        (
            group(
                "float-quantized",
                activations("float", strategy="group", group_size=128),
                num_bits=8,
                type="float",
                strategy="block",
                group_size=None,
                block_structure=[128, 128],
            ),
            QuantSpec(
                "float8_e4m3fn",
                128,
                granularity="block",
                activation=ActivationSpec("float8_e4m3fn", "group"),
            ),
        ),
        (
            group("naive-quantized", num_bits=8, type="float", strategy="channel"),
            QuantSpec("float8_e4m3fn", -1),
        ),
    ],
)
def test_config_groups_are_specs(one, spec):
    scheme = parse(ct_config(one)).scheme(DOWN)
    assert scheme.spec("bfloat16") == spec
    assert not scheme.act_order


def test_act_order_of_the_kind_group_only_moves_rows():
    assert parse(ct_config(group(actorder="group"))).scheme(DOWN).act_order
    assert not parse(ct_config(group(actorder="weight"))).scheme(DOWN).act_order


def test_one_format_may_stand_for_all_groups():
    one = group()
    config = ct_config(one)
    del one["format"]
    assert parse(config).scheme(DOWN).format == "pack-quantized"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' cannot be read; known: gptq",
        ),
        ({}, "quant_method None cannot be read"),
        (gptq_config(bits="4"), r"quantization_config.bits must be an integer, got '4'"),
        (gptq_config(bits=True), r"bits must be an integer, got True"),
        (gptq_config(bits=5), r"quantization_config: GPTQ files have 2, 3, 4, 8 bits, not 5"),
        (gptq_config(group_size=0), r"group_size 0 is neither positive nor -1"),
        (gptq_config(sym="yes"), r"sym must be true or false, got 'yes'"),
        (gptq_config(checkpoint_format="marlin"), r"checkpoint_format 'marlin' cannot be read"),
        (gptq_config(pack_dtype="int16"), r"pack_dtype 'int16' cannot be read; known: int32"),
        (gptq_config(is_marlin_format=True), r"is_marlin_format files cannot be read"),
        (gptq_config(dynamic={"(": {}}), r"dynamic '\(': no regular expression"),
        (gptq_config(dynamic={"x": 3}), r"dynamic 'x' must be an object, got 3"),
        (gptq_config(dynamic=[1]), r"dynamic must be an object"),
        (awq_config(version="gemv"), r"version 'gemv' cannot be read; known: gemm"),
        (awq_config(bits=8), r"bits 8 cannot be read; known: 4"),
        (awq_config(modules_to_not_convert="x"), r"must be a list of names, got 'x'"),
        (awq_config(modules_to_not_convert=[1]), r"must hold names, got 1"),
        (ct_config(group("marlin-24")), r"group_0.format 'marlin-24' cannot be read"),
        (ct_config(group(), config_groups={}), r"config_groups is empty"),
        (ct_config(group(), kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme cannot be read"),
        (ct_config(group(), sparsity_config={"format": "sparse-24"}), r"'sparse-24' cannot be r"),
        (ct_config(group(), transform_config={"a": 1}), r"transform_config cannot be read"),
        (ct_config(group(), quantization_status="frozen"), r"status 'frozen' cannot be read"),
        (ct_config(group(num_bits=9)), r"group_0: weight dtype 'int9' is not one of"),
        (ct_config(group(group_size=None)), r"weights.group_size must be an integer, got None"),
        (ct_config(group(strategy="token")), r"weights.strategy 'token' cannot be read"),
        (ct_config(group(dynamic=True)), r"weights.dynamic must be false, got True"),
        (ct_config(group(targets=3 * ("re:(",))), r"target 're:\(': no regular expression"),
        (
            ct_config(group("int-quantized", activations("int", symmetric=False), num_bits=8)),
            r"input_activations.symmetric is false: asymmetric activations cannot be read",
        ),
        (
            ct_config(group("pack-quantized", activations("int"))),
            r"group_0: int8 activations need weights of the same 8-bit kind, not int4",
        ),
        (
            ct_config(
                group(
                    "float-quantized",
                    activations("float", strategy="group", group_size=64),
                    num_bits=8,
                    type="float",
                    strategy="block",
                    block_structure=[128, 128],
                )
            ),
            r"input_activations.group_size is 64, but the weights' blocks are 128",
        ),
        (
            ct_config(
                group("float-quantized", type="float", strategy="block", block_structure=[128, 64])
            ),
            r"block_structure \[128, 64\] cannot be read",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(raw, message):
    with pytest.raises(ModelError, match=message):
        parse(raw)


def test_a_file_of_its_own_may_say_it_but_not_something_else(tmp_path):
    assert quantization_of(tmp_path, {}) is None
    aside = {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(aside))
    assert parse(quantization_of(tmp_path, {})).scheme(DOWN) == GPTQScheme(4, 16, False, True)
    alike = {"quantization_config": gptq_config()}
    assert quantization_of(tmp_path, alike) == gptq_config()
    other = {"quantization_config": gptq_config(group_size=32)}
    with pytest.raises(ModelError, match=r"group_size is 32 in config.json, but 16 in quantize_c"):
        quantization_of(tmp_path, other)
    with pytest.raises(ModelError, match="quantization_config must be an object, got 3"):
        quantization_of(tmp_path, {"quantization_config": 3})
