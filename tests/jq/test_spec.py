"""Specs: what they refuse, and what they say about sizes."""

import pytest

from jq.errors import SpecError
from jq.spec import FP8, ActivationSpec, QuantSpec, check_group_size, int_bits, w4a16, w8a8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int9"}, "'int9'"),
        ({"dtype": "int1"}, "'int1'"),
        ({"dtype": "int16"}, "'int16'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -2}, "group_size -2"),
        ({"dtype": FP8, "symmetric": False}, "no zero point"),
        ({"granularity": "block"}, "'block' is for"),
        ({"activation": ActivationSpec()}, "same 8-bit kind, not int4"),
        ({"dtype": FP8, "group_size": -1, "activation": ActivationSpec()}, "int8 activations"),
        ({"dtype": "int8", "group_size": -1, "activation": ActivationSpec(FP8)}, "same 8-bit"),
        ({"dtype": "int8", "activation": ActivationSpec()}, "one weight scale per output"),
        (
            {"dtype": "int8", "group_size": -1, "symmetric": False, "activation": ActivationSpec()},
            "symmetric weights",
        ),
        (
            {"dtype": FP8, "granularity": "block", "activation": ActivationSpec(FP8)},
            "need each other",
        ),
        (
            {"dtype": FP8, "group_size": -1, "activation": ActivationSpec(FP8, "group")},
            "need each other",
        ),
    ],
)
def test_combinations_without_a_meaning(options, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "'int4'"),
        ({"static": True}, "granularity='tensor'"),
        ({"static": True, "granularity": "group"}, "not 'group'"),
    ],
)
def test_activations_without_a_meaning(options, message):
    with pytest.raises(SpecError, match=message):
        ActivationSpec(**options)


def test_per_channel_has_one_name():
    assert QuantSpec(group_size=-1) == QuantSpec(group_size=64, granularity="channel")
    assert hash(QuantSpec(group_size=-1)) == hash(QuantSpec(granularity="channel"))


@pytest.mark.parametrize("name", ["int", "int44", "uint4", "4", FP8])
def test_bits_of_other_names(name):
    assert int_bits(name) is None


@pytest.mark.parametrize(
    ("spec", "shape", "bits"),
    [
        (w4a16(), (2, 384), 4 + 16 / 128),
        (w4a16(symmetric=False), (2, 384), 4 + 20 / 128),
        (QuantSpec("int3", 32), (8, 384), 3.5),
        (QuantSpec("int4", -1), (1, 384), 4 + 16 / 256),
        (QuantSpec("int8", granularity="tensor", scale_dtype="float32"), (1, 1), 8 + 32 / 98304),
        (w8a8(), (1, 384), 8 + 32 / 256),
        (w8a8(FP8, activation="group", weight="block"), (2, 3), 8 + 32 / 128**2),
    ],
)
def test_sizes(spec, shape, bits):
    assert spec.scale_shape(256, 384) == shape
    assert spec.bits_per_weight(256, 384) == pytest.approx(bits, rel=1e-12)


def test_sizes_that_do_not_fit():
    with pytest.raises(SpecError, match=r"a/b: group_size 128 .* 96 inputs; .*16, 32 or -1"):
        check_group_size(96, 128, "a/b")
    with pytest.raises(SpecError, match=r"7 inputs; valid sizes: none of the usual"):
        w4a16().scale_shape(7, 8)
    with pytest.raises(SpecError, match="does not divide its 200 outputs"):
        w8a8(FP8, activation="group", weight="block").scale_shape(256, 200)
