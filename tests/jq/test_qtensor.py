"""The quantized tensor as storage and as an ordinary pytree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jq.errors import SpecError
from jq.matmul import qmatmul
from jq.qtensor import QTensor, from_codes
from jq.spec import FP8, QuantSpec, w8a8
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle


def stack(*tensors: QTensor) -> QTensor:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


def rest_of(w: QTensor) -> tuple:
    """The fields behind codes and scale."""
    return w.zero_point, w.order, w.input_scale, w.spec, w.k, w.n


@pytest.fixture(scope="module", params=cases.FEW)
def w(request) -> QTensor:
    return cases.weight(request.param)


@pytest.mark.parametrize("name", cases.ALL)
def test_what_is_stored_is_what_comes_back(name):
    w = cases.weight(name)
    assert w.shape == (64, 48)
    assert problems.relative_error(cases.dequantize(w), oracle.weight(w)) < 1e-6


@pytest.mark.parametrize("name", ["int4 g32", "int3 g32 zero", "int8 token / channel"])
def test_act_order_is_undone(name):
    w = cases.weight(name, act_order=True)
    assert problems.relative_error(cases.dequantize(w), oracle.weight(w)) < 1e-6
    stored = np.asarray(jax.jit(lambda w: w.dequantize_stored())(w))
    np.testing.assert_array_equal(np.asarray(cases.dequantize(w))[np.asarray(w.order)], stored)


@pytest.mark.parametrize("name", cases.WEIGHT_ONLY)
def test_bits_per_weight_are_the_stored_bits(name):
    w = cases.weight(name)
    assert w.nbytes * 8 / (64 * 48) == pytest.approx(w.spec.bits_per_weight(64, 48), rel=1e-12)


def test_three_bits_are_stored_densely():
    w = cases.weight("int3 g32")
    assert w.codes.dtype == jnp.uint8
    assert w.codes.nbytes * 8 == 3 * 64 * 48
    zeros = cases.weight("int3 g32 zero").zero_point
    assert zeros is not None
    assert zeros.nbytes * 8 == 3 * 2 * 48


def test_eight_bit_operands_are_stored_ready():
    assert cases.weight("int8 token / channel").codes.dtype == jnp.int8
    assert cases.weight("fp8 token / channel").codes.dtype == jnp.float8_e4m3fn
    assert cases.weight("int8 g32 zero").codes.dtype == jnp.uint8


@pytest.mark.parametrize("k", [5, 20])
@pytest.mark.parametrize("name", ["int3 channel zero", "int4 channel"])
def test_sizes_that_bytes_do_not_divide(name, k):
    w = cases.weight(name, k, 7)
    assert w.shape == (k, 7)
    assert problems.relative_error(cases.dequantize(w), oracle.weight(w)) < 1e-6


def test_jit_takes_and_returns_it(w):
    out = jax.jit(lambda w: jax.tree.map(lambda leaf: leaf, w))(w)
    assert (out.spec, out.k, out.n) == (w.spec, w.k, w.n)
    jax.tree.map(np.testing.assert_array_equal, out, w)


def test_specs_are_static(w):
    """Another spec is another program, equal ones share it."""
    f = jax.jit(lambda w: w.dequantize())
    f(w)
    f(jax.tree.map(jnp.zeros_like, w))
    assert f._cache_size() == 1


def test_tree_map_and_eval_shape(w):
    shapes = jax.eval_shape(lambda w: w, w)
    assert isinstance(shapes, QTensor)
    assert shapes.shape == w.shape
    assert shapes.codes.shape == w.codes.shape
    assert shapes.codes.dtype == w.codes.dtype
    dense = jax.eval_shape(lambda w: w.dequantize(jnp.bfloat16), w)
    assert (dense.shape, dense.dtype) == (w.shape, jnp.bfloat16)
    doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf[None]] * 2), w)
    assert doubled.shape == (2, *w.shape)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert paths[:2] == [".codes", ".scale"]


def test_vmap_over_experts(w):
    x = jnp.asarray(cases.activations())
    halved = QTensor(w.codes, w.scale / 2, *rest_of(w))
    both = jax.jit(jax.vmap(qmatmul, (None, 0)))(x, stack(w, halved))
    assert both.shape == (2, 5, 48)
    assert problems.relative_error(both[0], cases.multiply(x, w)) < 1e-6
    assert problems.relative_error(both[1], np.asarray(cases.multiply(x, w)) / 2) < 1e-6


def test_scan_over_stacked_layers():
    """Layers with an act order, zero points and static scales, one program."""
    for name in ("int3 channel zero", "int8 tensor static / channel"):
        layers = [cases.weight(name, 48, 48, act_order=flip) for flip in (True, True)]
        layers[1] = QTensor(layers[1].codes, layers[1].scale * 0.5, *rest_of(layers[1]))
        x = jnp.asarray(cases.activations(3, 48))
        last, _ = jax.lax.scan(lambda h, w: (qmatmul(h, w) / 10, None), x, stack(*layers))
        h = x
        for layer in layers:
            h = cases.multiply(h, layer) / 10
        assert problems.relative_error(last, h) < 1e-5


@pytest.mark.parametrize("name", ["int3 g32 zero", "fp8 block", "int4 channel"])
def test_stacked_ones_dequantize_as_each_does(name):
    one, other = cases.weight(name), cases.weight(name, act_order=False)
    order = jnp.asarray(np.random.default_rng(3).permutation(64), jnp.int32)
    one = QTensor(one.codes, one.scale, one.zero_point, order, *rest_of(one)[2:])
    other = QTensor(other.codes, other.scale, other.zero_point, order[::-1], *rest_of(one)[2:])
    both = stack(one, other)
    assert both.shape == (2, 64, 48)
    for index, each in enumerate((one, other)):
        np.testing.assert_array_equal(cases.dequantize(both)[index], cases.dequantize(each))


def test_sharding(w):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(w, NamedSharding(mesh, P()))
    assert placed.codes.sharding.mesh.shape == {"x": 1}
    outputs = NamedSharding(mesh, P(None, "x"))

    @jax.jit
    def constrained(w):
        codes = jax.lax.with_sharding_constraint(w.codes, outputs)
        scale = jax.lax.with_sharding_constraint(w.scale, outputs)
        return QTensor(codes, scale, *rest_of(w)).dequantize()

    np.testing.assert_array_equal(constrained(placed), cases.dequantize(w))


G16 = QuantSpec("int4", 16)
ZERO = QuantSpec("int4", 16, symmetric=False)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (G16, {"scale": jnp.ones((1, 24))}, r"scale is \(1, 24\).*\(2, 24\)"),
        (G16, {"zero_point": jnp.ones((2, 24))}, "symmetric=True, zero points given"),
        (ZERO, {}, "symmetric=False, zero points ungiven"),
        (ZERO, {"zero_point": jnp.ones((1, 24))}, r"zero points are \(1, 24\).*\(2, 24\)"),
        (G16, {"codes": jnp.ones((32, 24), jnp.int8)}, "codes are int8.*needs uint8"),
        (QuantSpec(FP8, 16), {"codes": jnp.ones((32, 24), jnp.uint8)}, "needs float8_e4m3fn"),
        (G16, {"order": jnp.arange(31)}, r"order is \(31,\).*\(32,\)"),
        (G16, {"input_scale": jnp.float32(1)}, "static=False"),
        (w8a8(activation="tensor", static=True), {}, "static=True"),
        (QuantSpec("int4", 15), {"scale": jnp.ones((2, 24))}, "group_size 15"),
    ],
)
def test_what_from_codes_refuses(spec, change, message):
    codes = change.get("codes", jnp.ones((32, 24), jnp.float8_e4m3fn if spec.is_float else "uint8"))
    rows = 1 if spec.granularity == "channel" else 2
    scale = change.get("scale", jnp.ones((rows, 24)))
    rest = {k: v for k, v in change.items() if k in ("order", "input_scale")}
    with pytest.raises(SpecError, match=message) as caught:
        from_codes(codes, scale, change.get("zero_point"), spec, path="a/b", **rest)
    if "group_size" not in message:
        assert str(caught.value).startswith("a/b: ")


@functools.partial(jax.jit, static_argnames="spec")
def stored_and_read(codes, scale, zero, spec):
    w = from_codes(codes, scale, zero, spec)
    return w.codes, w.unsigned_codes(), w.zeros()


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives(bits):
    """All 2**b codes and zero points, stored and read back as they are."""
    n = 2**bits
    codes = jnp.tile(jnp.arange(n, dtype=jnp.uint8)[:, None], (1, n))
    zero = jnp.arange(n, dtype=jnp.float32)[None]
    spec = QuantSpec(f"int{bits}", n, symmetric=False)
    _, read, zeros = stored_and_read(codes, jnp.ones((1, n)), zero, spec)
    np.testing.assert_array_equal(read, codes)
    np.testing.assert_array_equal(zeros, zero)


def test_symmetric_int8_is_stored_around_zero():
    codes = jnp.arange(256, dtype=jnp.uint8)[:, None]
    stored, read, zeros = stored_and_read(codes, jnp.ones((1, 1)), None, QuantSpec("int8", 256))
    np.testing.assert_array_equal(stored[:, 0], np.arange(-128, 128))
    np.testing.assert_array_equal(read, codes)
    assert zeros is None
