"""One linear of each format: its values, and that writing is the inverse of reading."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jq.formats import arrays, awq, compressed_tensors, gptq
from jq.formats.awq import AWQScheme
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.qtensor import from_codes
from jq.spec import ActivationSpec, QuantSpec
from tests.formats.cases import FLOAT8, INT8, SHAPE, assert_same, assert_weight, gptq_case
from tests.oracles import packed_files as oracle


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_exact_both_ways(bits, version, symmetric, act_order):
    linear, tensors, scheme = gptq_case(
        bits, version=version, symmetric=symmetric, act_order=act_order
    )
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    assert w.spec == QuantSpec(f"int{bits}", 16, symmetric, scale_dtype="float16")
    assert (w.order is not None) == act_order
    assert_weight(w, linear.weight)
    np.testing.assert_array_equal(oracle.read_gptq(tensors, bits, version), linear.weight)
    assert_same(gptq.from_qtensor(w, scheme, "m"), tensors)


@pytest.mark.parametrize("group_size", [-1, 64, 8])
def test_gptq_group_sizes(group_size):
    linear, tensors, scheme = gptq_case(group_size=group_size)
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    assert_weight(w, linear.weight)
    assert_same(gptq.from_qtensor(w, scheme, "m"), tensors)


def test_the_qtensor_is_what_from_codes_makes():
    linear, tensors, scheme = gptq_case(bits=3, act_order=True)
    order = np.argsort(linear.groups, kind="stable").astype(np.int32)
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    want = from_codes(
        jnp.asarray(linear.codes[order], jnp.uint8),
        jnp.asarray(linear.scales),
        jnp.asarray(linear.zeros, jnp.uint8),
        w.spec,
        order=jnp.asarray(order),
    )
    assert jax.tree.structure(w) == jax.tree.structure(want)
    for got, leaf in zip(jax.tree.leaves(w), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, leaf, strict=True)


def test_zeros_that_were_decremented_in_whole_words():
    linear, tensors, scheme = gptq_case(4)
    assert (linear.zeros == 0).any()
    whole = oracle.pack(linear.zeros, 4, 1).view(np.uint32) - np.uint32(0x11111111)
    assert not np.array_equal(whole.view(np.int32), tensors["qzeros"])
    tensors["qzeros"] = whole.view(np.int32)
    scheme = dataclasses.replace(scheme, borrow=True)
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    assert gptq.has_zero_of_zero(w)
    assert_weight(w, linear.weight)
    assert_same(gptq.from_qtensor(w, scheme, "m"), tensors)


def test_g_idx_may_be_missing_without_act_order():
    linear, tensors, scheme = gptq_case()
    del tensors["g_idx"]
    assert_weight(gptq.to_qtensor(tensors, scheme, SHAPE, "m"), linear.weight)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_awq_is_exact_both_ways(group_size, zero_point):
    linear = oracle.random_linear(4, *SHAPE, group_size, symmetric=not zero_point)
    tensors, scheme = oracle.awq(linear), AWQScheme(group_size, zero_point)
    w = awq.to_qtensor(tensors, scheme, SHAPE, "m")
    assert w.spec.symmetric != zero_point
    assert_weight(w, linear.weight)
    assert_same(awq.from_qtensor(w, scheme, "m"), tensors)
    assert_same(awq.from_qtensor(w, dataclasses.replace(scheme, zero_point=True), "m"), tensors)
    if not zero_point:
        del tensors["qzeros"]
        assert_weight(awq.to_qtensor(tensors, scheme, SHAPE, "m"), linear.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "act_order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_packed_is_exact_both_ways(bits, strategy, symmetric):
    order = strategy == "act_order"
    strategy = "group" if order else strategy
    size = 16 if strategy == "group" else -1
    linear = oracle.random_linear(
        bits, *SHAPE, size, symmetric=symmetric, act_order=order, dtype="bfloat16"
    )
    tensors = oracle.packed(linear, symmetric=symmetric, act_order=order)
    scheme = CompressedTensorsScheme(
        "pack-quantized", bits, "int", strategy, size, symmetric, order
    )
    w = compressed_tensors.to_qtensor(tensors, scheme, SHAPE, "m")
    assert w.spec.scale_dtype == "bfloat16"
    assert_weight(w, linear.weight)
    np.testing.assert_array_equal(oracle.read_packed(tensors, bits), linear.weight)
    assert_same(compressed_tensors.from_qtensor(w, scheme, "m"), contiguous(tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "bits", "strategy", "activation"),
    [
        ("int-quantized", 8, "channel", INT8),
        ("int-quantized", 8, "tensor", ActivationSpec("int8", "tensor", static=True)),
        ("naive-quantized", 8, "group", None),
        ("naive-quantized", 4, "group", None),
        ("naive-quantized", 3, "asymmetric", None),
        ("naive-quantized", 8, "asymmetric", None),
    ],
)
def test_signed_bytes_are_exact_both_ways(form, bits, strategy, activation, dtype):
    symmetric = strategy != "asymmetric"
    strategy = strategy if symmetric else "group"
    size = 16 if strategy == "group" else -1
    linear = oracle.random_linear(bits, *SHAPE, size, symmetric=symmetric, dtype=dtype)
    if strategy == "tensor":
        linear = dataclasses.replace(
            linear, scales=np.broadcast_to(linear.scales[:, :1], linear.scales.shape)
        )
    tensors = oracle.plain(linear, symmetric=symmetric)
    if strategy == "tensor":
        tensors["weight_scale"] = linear.scales[0, :1]
    if activation is not None and activation.static:
        tensors["input_scale"] = np.array([0.25], linear.scales.dtype)
    scheme = CompressedTensorsScheme(
        form, bits, "int", strategy, size, symmetric, activation=activation
    )
    w = compressed_tensors.to_qtensor(tensors, scheme, SHAPE, "m")
    assert w.spec.activation == activation
    assert_weight(w, linear.weight)
    if "input_scale" in tensors:
        assert w.input_scale == np.float32(0.25)
        assert w.input_scale.shape == ()
    assert_same(compressed_tensors.from_qtensor(w, scheme, "m"), contiguous(tensors))


@pytest.mark.parametrize(
    ("strategy", "activation"),
    [
        ("channel", FLOAT8),
        ("channel", None),
        ("tensor", ActivationSpec("float8_e4m3fn", "tensor", static=True)),
        ("block", ActivationSpec("float8_e4m3fn", "group")),
    ],
)
def test_float8_is_exact_both_ways(strategy, activation):
    k, n = 64, 48
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs
    shape = {"channel": (n, 1), "tensor": (1, 1), "block": (n // 16, k // 16)}[strategy]
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    tensors = {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": scale}
    if strategy == "tensor":
        tensors |= {"weight_scale": scale.reshape(1), "input_scale": scale.reshape(1)}
    size = 16 if strategy == "block" else -1
    form = "naive-quantized" if activation is None else "float-quantized"
    scheme = CompressedTensorsScheme(form, 8, "float", strategy, size, activation=activation)
    w = compressed_tensors.to_qtensor(tensors, scheme, (k, n), "m")
    assert_weight(w, oracle.float8_weight(tensors["weight"], scale))
    assert_same(compressed_tensors.from_qtensor(w, scheme, "m"), tensors)


def contiguous(tensors):
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


@pytest.mark.parametrize("layout", [">", "F", "strided"])
def test_any_layout_and_byte_order_is_read_alike(layout):
    def other(array):
        if layout == ">":
            return array.astype(array.dtype.newbyteorder(">"))
        if layout == "F":
            return np.asfortranarray(array)
        return np.repeat(array, 2, axis=-1)[..., ::2]

    linear, tensors, scheme = gptq_case(act_order=True)
    strange = {name: other(array) for name, array in tensors.items()}
    w = gptq.to_qtensor(strange, scheme, SHAPE, "m")
    assert_weight(w, linear.weight)
    assert_same(gptq.from_qtensor(w, scheme, "m"), tensors)
    swapped = jax.tree.map(lambda leaf: other(np.asarray(leaf)), w)
    assert_same(gptq.from_qtensor(swapped, scheme, "m"), tensors)


@pytest.mark.parametrize("codes", [1, 300, 700])
def test_large_weights_are_converted_in_strips(monkeypatch, codes):
    monkeypatch.setattr(arrays, "_STRIP", codes)
    widths = {part.stop - part.start for part in arrays.strips(64, 40, 8)}
    assert widths == {8}
    linear, tensors, scheme = gptq_case(bits=3, act_order=True)
    w = gptq.to_qtensor(tensors, scheme, SHAPE, "m")
    assert_weight(w, linear.weight)
    assert_same(gptq.from_qtensor(w, scheme, "m"), tensors)
    linear = oracle.random_linear(4, *SHAPE, 16)
    w = awq.to_qtensor(oracle.awq(linear), AWQScheme(16), SHAPE, "m")
    assert_weight(w, linear.weight)
    assert_same(awq.from_qtensor(w, AWQScheme(16), "m"), oracle.awq(linear))
