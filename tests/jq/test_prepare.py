"""Preparing parameters for a device, and running them under every transformation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import SpecError
from jq.kernels.choice import REFERENCE, W4A16, W8A8, explain
from jq.matmul import qmatmul
from jq.prepare import choices, prepare
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import QuantSpec
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle

BF16 = 2.5e-3  # relative error: weights and result rounded to bfloat16


def weight(name: str = "int4 g32", k: int = 128, n: int = 64, **options) -> QTensor:
    return cases.weight(name, k, n, **options)


@functools.cache
def prepared(name: str = "int4 g32", k: int = 128, n: int = 64, act_order=False) -> PreparedTensor:
    w = prepare(weight(name, k, n, act_order=act_order), "sm_90")
    assert isinstance(w, PreparedTensor)
    return w


def inputs(tokens: int = 5, k: int = 128) -> jax.Array:
    return jnp.asarray(cases.activations(tokens, k), jnp.bfloat16)


def expected(x, w: QTensor) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return oracle.weight_only(x.reshape(-1, w.k), w, "bfloat16").reshape(*x.shape[:-1], w.n)


def stack(*tensors):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


def test_only_what_a_kernel_serves_is_prepared():
    params = {
        "norm": {"scale": jnp.ones(128)},
        "layers_0": {
            "q": {"kernel": weight()},
            "odd": {"kernel": cases.weight("int4 g32", 64, 48)},
            "int8": {"kernel": weight("int8 token / channel")},
            "odd8": {"kernel": cases.weight("fp8 token / channel", 64, 48)},
            "int3": {"kernel": weight("int3 g32 zero")},
            "small": {"kernel": weight("int4 g16")},
            "fp16": {"kernel": weight("int4 g64 fp16")},
        },
    }
    out = prepare(params, "sm_90")
    layer = out["layers_0"]
    assert isinstance(layer["q"]["kernel"], PreparedTensor)
    assert out["norm"]["scale"] is params["norm"]["scale"]
    assert isinstance(layer["int8"]["kernel"], PreparedTensor)
    for name in ("odd", "odd8", "int3", "small", "fp16"):
        assert layer[name]["kernel"] is params["layers_0"][name]["kernel"]

    found = choices(params, "sm_90")
    assert sorted(found) == sorted(f"layers_0/{name}/kernel" for name in params["layers_0"])
    assert found["layers_0/q/kernel"].kernel == W4A16
    assert found["layers_0/int8/kernel"].kernel == W8A8
    reasons = {path.split("/")[1]: c.reason for path, c in found.items() if c.kernel == REFERENCE}
    for name, said in {
        "odd": "48",
        "odd8": "48",
        "int3": "int4 weights",
        "small": "16",
        "fp16": "float16",
    }.items():
        assert said in reasons[name]
    again = choices(out, "sm_90")
    assert {p: c.kernel for p, c in again.items()} == {p: c.kernel for p, c in found.items()}


def test_other_devices_are_left_alone():
    params = {"kernel": weight()}
    assert prepare(params)["kernel"] is params["kernel"]
    for device, said in ((None, "CUDA"), (jax.devices()[0], "CUDA"), ("sm_75", "7.5")):
        choice = explain(weight(), device=device)
        assert choice.kernel == REFERENCE
        assert said in choice.reason
    with pytest.raises(SpecError, match="hopper"):
        explain(weight(), device="hopper")


def test_a_device_with_the_capability_is_served():
    device = type("Device", (), {"compute_capability": "9.0", "device_kind": "NVIDIA H200"})()
    choice = explain(weight(), device=device)
    assert choice.kernel == W4A16
    assert "H200" in choice.reason
    amd = type("Device", (), {"compute_capability": "gfx942", "device_kind": "MI300"})()
    assert explain(weight(), device=amd).kernel == REFERENCE


def test_plain_weights_and_dtypes_are_explained():
    assert explain(jnp.ones((64, 64))).kernel == REFERENCE
    choice = explain(weight(), dtype=jnp.float32, device="sm_90")
    assert (choice.kernel, "float32" in choice.reason) == (REFERENCE, True)
    assert explain(weight(), rows=0, device="sm_90").kernel == REFERENCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_dtype_of_x(dtype):
    """What the weight was not prepared for is XLA's, with the weight as it was prepared."""
    x = jnp.asarray(cases.activations(5, 128), dtype)
    y = jax.jit(qmatmul)(x, prepared())
    assert y.dtype == x.dtype
    limit = {"bfloat16": BF16, "float16": 4e-4, "float32": 1e-6}[dtype]
    assert problems.relative_error(y, expected(x, weight())) < limit


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_leading_axes_of_x(lead):
    x = jnp.broadcast_to(inputs(3)[0], (*lead, 128))
    y = jax.jit(qmatmul)(x, prepared())
    assert y.shape == (*lead, 64)
    assert problems.relative_error(y, expected(x, weight())) < BF16


@pytest.mark.parametrize("name", ["int4 g32", "int4 g32 zero", "int4 channel"])
def test_act_order(name):
    w = weight(name, act_order=True)
    x = inputs()
    y = jax.jit(qmatmul)(x, prepared(name, act_order=True))
    assert problems.relative_error(y, expected(x, w)) < BF16


def test_sizes_must_fit():
    with pytest.raises(SpecError, match=r"\(5, 64\).*\(128, 64\)"):
        qmatmul(inputs(5, 64), prepared())
    with pytest.raises(SpecError, match=r"\(2, 128, 64\)"):
        qmatmul(inputs(), stack(prepared(), prepared()))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4 g32", "int4 g32 zero"])
def test_gradient_in_x(name, act_order):
    """dx = dy times the dequantized transpose, and zeros for the weight."""
    w, ready = weight(name, act_order=act_order), prepared(name, act_order=act_order)
    x = inputs()
    dy = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.bfloat16)
    y, back = jax.vjp(lambda x: qmatmul(x, ready), x)
    (dx,) = jax.jit(back)(dy)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    rounded = oracle.round_to(oracle.weight(w), "bfloat16")
    assert problems.relative_error(dx, np.asarray(dy, np.float64) @ rounded.T) < BF16

    def loss(ready):
        return qmatmul(x, ready).astype(jnp.float32).sum()

    zeros = jax.grad(loss, allow_int=True)(ready)
    assert not np.any(np.asarray(zeros.weight.scale, np.float32))


def test_training_an_adapter_over_a_quantized_weight():
    """Gradients of low-rank factors below and above the weight, as of the dequantized model."""
    ready, w = prepared(), weight()
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.standard_normal((128, 128)) / 12, jnp.bfloat16)
    dense = jnp.asarray(oracle.weight(w), jnp.bfloat16)

    def loss(a, w):
        hidden = jnp.tanh(inputs() @ a)
        return jnp.mean(qmatmul(hidden, w).astype(jnp.float32) ** 2)

    ours, theirs = (jax.jit(jax.grad(loss))(a, w) for w in (ready, dense))
    assert problems.relative_error(ours, theirs) < 1e-2
    assert np.linalg.norm(np.asarray(theirs, np.float64)) > 0.1


def test_vmap_over_x_is_more_rows():
    x = jnp.stack([inputs(), inputs() * 2])
    y = jax.jit(jax.vmap(qmatmul, (0, None)))(x, prepared())
    assert problems.relative_error(y, expected(x, weight())) < BF16
    inner = jax.jit(jax.vmap(jax.vmap(qmatmul, (0, None)), (0, None)))(x, prepared())
    np.testing.assert_array_equal(np.asarray(inner), np.asarray(y))


@pytest.mark.parametrize("x_axis", [None, 0])
def test_vmap_over_experts(x_axis):
    first, second = weight(), cases.weight("int4 g32 zero", 128, 64)
    halved = dataclasses.replace(first, scale=first.scale / 2)
    experts = prepare(stack(first, halved), "sm_90")
    assert experts.shape == (2, 128, 64)
    x = inputs() if x_axis is None else jnp.stack([inputs(), inputs() * 2])
    y = jax.jit(jax.vmap(qmatmul, (x_axis, 0)))(x, experts)
    one = [x, x] if x_axis is None else list(x)
    for i, w in enumerate((first, halved)):
        assert problems.relative_error(y[i], expected(one[i], w)) < BF16
    gradient = jax.vmap(jax.grad(lambda x, w: qmatmul(x, w).astype(jnp.float32).sum()), (None, 0))
    dx = jax.jit(gradient)(inputs(), experts)
    assert dx.shape == (2, 5, 128)
    assert problems.relative_error(dx[1] * 2, dx[0]) < BF16
    assert second.spec != first.spec


def test_scan_over_stacked_layers():
    """Zero points and an act order, prepared as a stack; the program does not grow with it."""
    layers = [weight("int4 g32 zero", 64, 64, act_order=True)] * 2
    layers[1] = dataclasses.replace(layers[1], scale=layers[1].scale * 0.5)
    stacked = prepare(stack(*layers), "sm_90")
    assert isinstance(stacked, PreparedTensor)

    @jax.jit
    def run(x, stacked):
        return jax.lax.scan(lambda h, w: (qmatmul(h, w), None), x, stacked)[0]

    x = inputs(3, 64)
    y = run(x, stacked)
    by_hand = jnp.asarray(expected(x, layers[0]), jnp.bfloat16)
    assert problems.relative_error(y, expected(by_hand, layers[1])) < 3 * BF16


def test_stacks_with_two_leading_axes():
    grid = stack(stack(weight(), weight()), stack(weight(), weight()))
    ready = prepare(grid, "sm_90")
    assert ready.shape == (2, 2, 128, 64)
    one = jax.tree.map(lambda leaf: leaf[1, 0], ready)
    jax.tree.map(np.testing.assert_array_equal, one, prepared())


def test_it_is_an_ordinary_pytree():
    w = prepared()
    out = jax.jit(lambda w: w)(w)
    assert (out.spec, out.shape) == (w.spec, w.shape)
    shapes = jax.eval_shape(lambda w: w, w)
    assert (shapes.shape, shapes.k, shapes.n) == (w.shape, 128, 64)
    leaves, tree = jax.tree.flatten(w)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.unflatten(tree, leaves), w)


def test_linears_of_equal_shape_are_lowered_once():
    w = [prepared(k=64), jax.tree.map(lambda leaf: leaf, prepared(k=64))]

    def model(x):
        for kernel in w * 3:
            x = qmatmul(x, kernel)
        return x

    text = jax.jit(model).lower(inputs(3, 64)).as_text()
    assert text.count("func.func private @_prepared") == 1


@pytest.mark.parametrize("kind", ["portable", "prepared"])
def test_export_for_both_platforms_from_here(kind):
    """A machine without a GPU can export for one; the program still runs here."""
    w = weight(k=128, n=128) if kind == "portable" else prepared(n=128)
    exporter = jax.export.export(jax.jit(lambda x: qmatmul(x, w)), platforms=["cpu", "cuda"])
    program = exporter(jax.ShapeDtypeStruct((16, 128), jnp.bfloat16))
    x = inputs(16)
    y = jax.jit(program.call)(x)
    assert problems.relative_error(y, expected(x, weight(n=128))) < BF16
    assert ("mosaic" in program.mlir_module()) == (kind == "prepared")


@pytest.mark.parametrize("rows", [3, 13, 300])
def test_any_number_of_rows_is_lowered_for_cuda(rows):
    """What Mosaic refuses it refuses here, without a GPU."""
    w = prepared()
    exporter = jax.export.export(jax.jit(lambda x: qmatmul(x, w)), platforms=["cuda"])
    program = exporter(jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16))
    assert program.out_avals[0].shape == (rows, 64)
    assert "mosaic" in program.mlir_module()


def test_kernels_are_not_traced_where_they_do_not_run(monkeypatch):
    """A CPU's programs cost no more to make than XLA's."""
    for name in ("w4a16", "w8a8", "quantize_rows"):
        monkeypatch.setattr(f"jq.kernels.operations.{name}", lambda *args, **options: 1 / 0)
    eight = prepared("int8 token / channel")
    jax.jit(lambda x, w: qmatmul(x, w)).lower(inputs(7), eight).compile()
    jax.jit(lambda x, w: qmatmul(x, w)).lower(inputs(7), prepared()).compile()
    with jax.disable_jit():
        y = qmatmul(inputs(), prepared())
    assert problems.relative_error(y, expected(inputs(), weight())) < BF16


def test_formats_of_other_things_are_explained():
    """A manifest's entry has a format, and no arrays."""

    @dataclasses.dataclass(frozen=True)
    class Entry:
        spec: QuantSpec
        k: int
        n: int

    assert explain(Entry(QuantSpec("int4", 128), 4096, 14336), device="sm_90").kernel == W4A16
    assert "100" in explain(Entry(QuantSpec("int4", -1), 4096, 100), device="sm_90").reason
