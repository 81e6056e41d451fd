"""One linear of each format: what is refused, on the way in and on the way out."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from jq.errors import CheckpointError, SpecError
from jq.formats import awq, compressed_tensors, gptq
from jq.formats.awq import AWQScheme
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.gptq import GPTQScheme
from jq.spec import ActivationSpec, QuantSpec
from tests.formats.cases import FLOAT8, INT8, SHAPE, gptq_case
from tests.oracles import packed_files as oracle

# What is refused on the way in.


def broken(change, message, **options):
    _linear, tensors, scheme = gptq_case(**options)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        gptq.to_qtensor(tensors, scheme, SHAPE, "model.m")


def test_bits_or_group_size_that_are_not_the_files_are_refused():
    _linear, tensors, scheme = gptq_case()
    lie = dataclasses.replace(scheme, bits=8)
    wanted = r"model.m.qweight: shape \[8, 40\], expected \[16, 40\], since bits is 8"
    with pytest.raises(CheckpointError, match=wanted):
        gptq.to_qtensor(tensors, lie, SHAPE, "model.m")
    lie = dataclasses.replace(scheme, group_size=32)
    with pytest.raises(CheckpointError, match=r"model.m.qzeros: shape \[4, 5\], expected \[2, 5\]"):
        gptq.to_qtensor(tensors, lie, SHAPE, "model.m")
    with pytest.raises(CheckpointError, match=r"qweight: shape \[8, 40\], expected \[12, 40\]"):
        gptq.to_qtensor(tensors, scheme, (96, 40), "model.m")
    with pytest.raises(SpecError, match="group_size 24 does not divide its 64 inputs"):
        gptq.to_qtensor(tensors, dataclasses.replace(scheme, group_size=24), SHAPE, "model.m")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -0.5])
def test_scales_that_are_no_positive_numbers_are_refused(bad):
    def change(tensors):
        tensors["scales"] = tensors["scales"].copy()
        tensors["scales"][2, 5] = bad

    message = (
        rf"model\.m\.scales: 1 of 160 scales are no positive .* {re.escape(str(bad))} at .2, 5"
    )
    broken(change, message)


def test_groups_out_of_range_and_of_unequal_size_are_refused():
    def outside(value):
        def change(tensors):
            tensors["g_idx"][3] = value

        return change

    broken(outside(4), r"model.m.g_idx: input 3 is in group 4, .* groups 0 to 3", act_order=True)
    broken(outside(-1), r"model.m.g_idx: input 3 is in group -1", act_order=True)

    def uneven(tensors):
        tensors["g_idx"][:] = np.where(np.arange(64) < 17, 0, tensors["g_idx"])
        tensors["g_idx"][:16] = 0

    _linear, tensors, scheme = gptq_case()
    uneven(tensors)
    with pytest.raises(CheckpointError, match=r"group 0 has 17 inputs, but the group size is 16"):
        gptq.to_qtensor(tensors, scheme, SHAPE, "model.m")


def test_an_order_that_the_config_denies_is_refused_and_a_lost_one_too():
    _linear, tensors, scheme = gptq_case(act_order=True)
    with pytest.raises(CheckpointError, match=r"m.g_idx: input \d+ is .* desc_act is false"):
        gptq.to_qtensor(tensors, dataclasses.replace(scheme, desc_act=False), SHAPE, "m")
    del tensors["g_idx"]
    with pytest.raises(CheckpointError, match=r"m.g_idx is missing, but desc_act is true"):
        gptq.to_qtensor(tensors, scheme, SHAPE, "m")


def test_zeros_that_deny_the_symmetry_are_refused():
    linear, tensors, scheme = gptq_case(symmetric=True)
    v2 = dataclasses.replace(scheme, checkpoint_format="gptq_v2")
    with pytest.raises(CheckpointError, match=r"m.qzeros: .* is 7, but sym is true, .* says 8"):
        gptq.to_qtensor(tensors, v2, SHAPE, "m")
    linear, tensors, scheme = gptq_case()
    with pytest.raises(CheckpointError, match=r"m.qzeros: the zero at \[0, 0\] is 0, but sym"):
        gptq.to_qtensor(tensors, dataclasses.replace(scheme, sym=True), SHAPE, "m")
    with pytest.raises(CheckpointError, match=r"m.qzeros: has a zero of 0, but zero_point is fal"):
        awq.to_qtensor(oracle.awq(linear), AWQScheme(16, zero_point=False), SHAPE, "m")


def test_missing_tensors_and_wrong_dtypes_are_refused():
    broken(lambda t: t.pop("scales"), r"model.m.scales is missing")
    broken(lambda t: t.pop("qzeros"), r"model.m.qzeros is missing")
    broken(
        lambda t: t.update(qweight=t["qweight"].astype(np.int64)),
        r"model.m.qweight: dtype int64, expected int32",
    )
    broken(
        lambda t: t.update(scales=t["scales"].astype(np.float64)),
        r"model.m.scales: scales are float64; known: float16, bfloat16, float32",
    )


def packed_case(**options):
    linear = oracle.random_linear(4, *SHAPE, 16, dtype="bfloat16", **options)
    scheme = CompressedTensorsScheme("pack-quantized", 4, "int", "group", 16, symmetric=False)
    return oracle.packed(linear, symmetric=False, act_order="act_order" in options), scheme


@pytest.mark.parametrize(
    ("change", "scheme", "message"),
    [
        ({"weight_shape": np.array([64, 40])}, {}, r"says \[64, 40\], but .* is \[40, 64\]"),
        ({"weight_shape": None}, {}, r"m.weight_shape is missing"),
        ({}, {"symmetric": True}, r"m.weight_zero_point is there, but .* symmetric=true"),
        ({}, {"num_bits": 3}, r"m.weight_packed: shape \[40, 8\], expected \[40, 6\]"),
        ({}, {"act_order": True}, r"m.weight_g_idx is missing: actorder is 'group'"),
        ({"weight_g_idx": np.zeros(64, np.int32)}, {}, r"m.weight_g_idx is there, but actorder"),
        ({"weight_scale": None}, {}, r"m.weight_scale is missing"),
        ({"weight_zero_point": None}, {}, r"m.weight_zero_point is missing"),
    ],
)
def test_packed_tensors_that_deny_the_config_are_refused(change, scheme, message):
    tensors, told = packed_case()
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        compressed_tensors.to_qtensor(tensors, dataclasses.replace(told, **scheme), SHAPE, "m")


@pytest.mark.parametrize(
    ("change", "scheme", "message"),
    [
        ({}, {"num_bits": 4, "format": "naive-quantized"}, r"m.weight: values from -128 to 127"),
        ({"input_scale": np.ones(1, np.float32)}, {}, r"m.input_scale is there, but .* dynamic"),
        ({"input_zero_point": np.ones(1, np.int8)}, {}, r"m.input_zero_point is not 0"),
        ({"weight_zero_point": np.ones((40, 1), np.int8)}, {}, r"m.weight_zero_point is there"),
        ({}, {"strategy": "tensor"}, r"m.weight_scale: shape \[40, 1\], expected \[1, 1\]"),
        (
            {},
            {"activation": ActivationSpec("int8", "tensor", static=True)},
            r"m.input_scale is missing: the scale of activations is static",
        ),
        ({}, {"type": "float", "format": "float-quantized", "activation": FLOAT8}, r"dtype int8"),
    ],
)
def test_signed_bytes_that_deny_the_config_are_refused(change, scheme, message):
    linear = oracle.random_linear(8, *SHAPE, -1, symmetric=True, dtype="float32")
    tensors = oracle.plain(linear, symmetric=True) | change
    told = CompressedTensorsScheme("int-quantized", 8, "int", "channel", activation=INT8)
    if scheme.get("num_bits"):
        scheme = {**scheme, "activation": None}
    with pytest.raises(CheckpointError, match=message):
        compressed_tensors.to_qtensor(tensors, dataclasses.replace(told, **scheme), SHAPE, "m")


def test_nan_in_float8_is_refused():
    weight = np.zeros((16, 32), np.uint8)
    weight[2, 3] = 0x7F
    tensors = {
        "weight": weight.view(ml_dtypes.float8_e4m3fn),
        "weight_scale": np.ones((16, 1), np.float32),
    }
    scheme = CompressedTensorsScheme("float-quantized", 8, "float", "channel", activation=FLOAT8)
    with pytest.raises(CheckpointError, match=r"m.weight: has NaN"):
        compressed_tensors.to_qtensor(tensors, scheme, (32, 16), "m")


# What is refused on the way out.


def test_what_gptq_and_awq_cannot_say_is_refused_by_name():
    w8a8 = QuantSpec("int8", -1, activation=INT8)
    with pytest.raises(SpecError, match=r"m: GPTQ files cannot say that activations .*int8"):
        gptq.scheme_for(w8a8, "m")
    with pytest.raises(SpecError, match=r"m: GPTQ files hold int2, .*, not int5 per group"):
        gptq.scheme_for(QuantSpec("int5"), "m")
    with pytest.raises(SpecError, match=r"m: GPTQ files hold int2, .*, not float8_e4m3fn"):
        gptq.scheme_for(QuantSpec("float8_e4m3fn", -1), "m")
    with pytest.raises(SpecError, match=r"m: AWQ files hold int4 weights, not int3"):
        awq.scheme_for(QuantSpec("int3"), "m")
    with pytest.raises(SpecError, match=r"m: AWQ files have a scale .* not per tensor"):
        awq.scheme_for(QuantSpec("int4", granularity="tensor"), "m")
    with pytest.raises(SpecError, match=r"m: pack-quantized files have a scale .* per tensor"):
        compressed_tensors.scheme_for(QuantSpec("int4", granularity="tensor"), "m")


def test_schemes_of_specs_are_those_that_read_them():
    assert gptq.scheme_for(QuantSpec("int3", 64), desc_act=True) == GPTQScheme(3, 64, True, True)
    assert awq.scheme_for(QuantSpec("int4", 32)) == AWQScheme(32, True)
    for spec, form in (
        (QuantSpec("int4", 64, False), "pack-quantized"),
        (QuantSpec("int8", -1, activation=INT8), "int-quantized"),
        (QuantSpec("float8_e4m3fn", -1, activation=FLOAT8), "float-quantized"),
        (QuantSpec("float8_e4m3fn", -1), "naive-quantized"),
    ):
        scheme = compressed_tensors.scheme_for(spec)
        assert scheme.format == form
        assert scheme.spec(spec.scale_dtype) == spec


def test_orders_have_to_have_a_place():
    _linear, tensors, scheme = gptq_case(act_order=True)
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    with pytest.raises(SpecError, match=r"m: has an act order, but desc_act is false"):
        gptq.from_qtensor(w, dataclasses.replace(scheme, desc_act=False), "m")
    with pytest.raises(SpecError, match=r"m: AWQ files have no act order"):
        awq.from_qtensor(w, AWQScheme(16), "m")
    told = CompressedTensorsScheme("pack-quantized", 4, "int", "group", 16, symmetric=False)
    with pytest.raises(SpecError, match=r"m: has an act order; write it with act_order=True"):
        compressed_tensors.from_qtensor(w, told, "m")


def test_other_specs_and_inexact_scales_are_refused():
    _linear, tensors, scheme = gptq_case()
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    with pytest.raises(SpecError, match=r"m: is QuantSpec.*int4.*, but the GPTQ scheme says"):
        gptq.from_qtensor(w, dataclasses.replace(scheme, bits=8), "m")
    spec = dataclasses.replace(w.spec, scale_dtype="float32")
    fine = dataclasses.replace(w, scale=w.scale.astype(np.float32) * np.float32(1.0001), spec=spec)
    with pytest.raises(
        SpecError, match=r"m: the GPTQ file stores scales as float16, .* quantize w"
    ):
        gptq.from_qtensor(fine, scheme, "m")
    stacked = jax.tree.map(lambda leaf: leaf[None], w)
    with pytest.raises(SpecError, match=r"m: is stacked, \[1, 64, 40\]"):
        gptq.from_qtensor(stacked, scheme, "m")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQScheme(5), r"GPTQ files have 2, 3, 4, 8 bits, not 5"),
        (lambda: GPTQScheme(4, 0), "group_size 0 is neither positive nor -1"),
        (lambda: AWQScheme(-2), "group_size -2 is neither positive nor -1"),
        (lambda: CompressedTensorsScheme(type="float"), "float weights of 4 bits"),
        (lambda: CompressedTensorsScheme("float-quantized"), "have the type 'float', not 'int'"),
        (
            lambda: CompressedTensorsScheme("int-quantized", 8, "float", "channel"),
            "have the type 'int', not 'float'",
        ),
        (
            lambda: CompressedTensorsScheme("naive-quantized", act_order=True),
            "naive-quantized per group has no weight_g_idx",
        ),
        (lambda: CompressedTensorsScheme(activation=INT8), "8-bit kind, not int4"),
    ],
)
def test_schemes_without_meaning_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()
