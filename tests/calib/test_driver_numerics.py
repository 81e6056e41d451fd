"""What quantizing leaves as it was: the function before rounding, dtypes, untouched parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.calib import driver, one_device
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.qtensor import QTensor
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders
from tests.models.running import forward, relative_error

pytestmark = pytest.mark.usefixtures("fast_compiles")

INT4 = QuantSpec("int4", 16)
SCALING = {
    "awq": (INT4, AWQ(search_scale=False)),
    "smoothquant": (w8a8(), SmoothQuant(0.6, smooth="all")),
}


def folded_only(monkeypatch, params, recipe, name="llama3"):
    """The parameters after all scales are folded, nothing rounded."""
    monkeypatch.setattr(
        driver._BlockWork, "_round", lambda self, index, params, stats, scaling: params
    )
    model = decoders.make(name)[0]
    return driver.quantize_model(model, params, recipe, decoders.tokens())[0]


def biggest_change(before, after):
    before, after = dict(tree.leaves(before)), dict(tree.leaves(after))
    return {
        path: float(np.max(np.abs(np.log(np.abs(np.asarray(after[path] / leaf, np.float64))))))
        for path, leaf in before.items()
        if path.startswith("layers") and not path.endswith("bias")
    }


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *[("awq", "llama3"), ("smoothquant", "qwen2")],
        pytest.param("awq", "qwen2", marks=pytest.mark.slow),
        pytest.param("smoothquant", "llama3", marks=pytest.mark.slow),
    ],
)
def test_folding_keeps_the_function(monkeypatch, how, name):
    """Grouped-query attention, and biases of the values (qwen2), included."""
    model, params, _, _ = decoders.make(name)
    after = folded_only(monkeypatch, params, uniform(*SCALING[how]), name)
    tokens = decoders.tokens()
    before = np.asarray(forward(model, params, tokens), np.float64)
    assert relative_error(forward(model, after, tokens), before) < 2e-5
    changes = biggest_change(params, after)
    # Every norm and every linear that reads a scaled input, or makes one, has changed.
    assert min(changes.values()) > 0.05, changes


def narrow(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def test_folding_into_narrow_parameters(monkeypatch):
    """bfloat16 in, bfloat16 out; the function up to the rounding of the kernels."""
    model, params, _, _ = decoders.make()
    params = narrow(params, jnp.bfloat16)
    after = folded_only(monkeypatch, params, uniform(*SCALING["awq"]))
    assert {leaf.dtype for _, leaf in tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    tokens = decoders.tokens()
    wide = [narrow(p, jnp.float32) for p in (params, after)]
    before, later = (np.asarray(forward(model, p, tokens), np.float64) for p in wide)
    assert 1e-6 < np.linalg.norm(later - before) / np.linalg.norm(before) < 2e-2


GPTQ4 = (INT4, GPTQ())
KINDS = {
    # method, dtype of the weights, of the hidden states -> of the kernels that are worked on
    "gptq": (GPTQ4, "bfloat16", "bfloat16", "bfloat16"),
    "float16 weights": (GPTQ4, "float16", "bfloat16", "float32"),
    "wide states": (GPTQ4, "bfloat16", "float32", "float32"),
    "folded scales": (SCALING["awq"], "bfloat16", "bfloat16", "float32"),
    "no tokens": ((INT4, RTN()), "bfloat16", "bfloat16", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_worked_on_as_narrow_as_changes_nothing(monkeypatch, kind):
    method, stored, computed, expected = KINDS[kind]
    model, params, _, _ = decoders.make()
    model = model.clone(dtype=jnp.dtype(computed))
    params, recipe = narrow(params, stored), uniform(*method)
    tokens = None if expected is None else decoders.tokens()
    seen, choose = [], driver._BlockWork._work_dtype

    def noted(self, params, stream):
        seen.append(choose(self, params, stream))
        return seen[-1]

    monkeypatch.setattr(driver._BlockWork, "_work_dtype", noted)
    out, reports = driver.quantize_model(model, params, recipe, tokens)
    assert [kind and jnp.dtype(kind).name for kind in seen] == [expected] * 2
    monkeypatch.setattr(driver._BlockWork, "_work_dtype", lambda *_: jnp.float32)
    wide, wide_reports = driver.quantize_model(model, params, recipe, tokens)
    for (path, leaf), (_, other) in zip(tree.leaves(out), tree.leaves(wide), strict=True):
        for found, wanted in zip(jax.tree.leaves(leaf), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=path)
    for found, wanted in zip(reports, wide_reports, strict=True):
        assert found.linears == wanted.linears


LEFT = (
    Rule("layers_1/attention/k_proj|gate_proj", None),
    Rule(".*", QuantSpec("int8", 16), AWQ(search_scale=False, rounding=RTN())),
)


def test_what_is_not_quantized_keeps_its_dtype():
    model, params, _, _ = decoders.make()
    params = narrow(params, jnp.bfloat16)
    out, _ = driver.quantize_model(model, params, LEFT, decoders.tokens())
    expected, found = dict(tree.leaves(params)), dict(tree.leaves(out))
    assert list(found) == list(expected)
    for path, leaf in found.items():
        if isinstance(leaf, QTensor):
            assert leaf.shape == expected[path].shape
            assert leaf.scale.dtype == jnp.bfloat16
        else:
            assert leaf.dtype == jnp.bfloat16, path
            assert leaf.shape == expected[path].shape
    for path in ("embed/embedding", "final_norm/scale", "lm_head/kernel"):
        assert found[path] is expected[path]
    assert len(decoders.qtensors(out)) == 14 - 3
    wide = narrow(params, jnp.float32)
    before = np.asarray(forward(model, wide, decoders.tokens()), np.float64)
    after = np.asarray(forward(model, out, decoders.tokens()), np.float64)
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.05


def test_nothing_is_changed_in_place():
    model, params, _, _ = decoders.make()
    before = {path: np.asarray(leaf).copy() for path, leaf in tree.leaves(params)}
    recipe = (Rule("down_proj", INT4, AWQ(search_scale=False)),)
    out, _ = driver.quantize_model(model, params, recipe, decoders.tokens())
    assert not np.array_equal(
        tree.get(out, "layers_0/mlp/up_proj/kernel"), before["layers_0/mlp/up_proj/kernel"]
    )
    for path, leaf in tree.leaves(params):
        np.testing.assert_array_equal(leaf, before[path])


def test_parameters_may_be_numpy_arrays():
    model, params, _, _ = decoders.make()
    recipe = (Rule("down_proj", INT4, RTN("output")),)
    plain = jax.tree.map(np.asarray, params)
    made = [driver.quantize_model(model, p, recipe, decoders.tokens())[0] for p in (params, plain)]
    assert decoders.same(*made)


def test_quantized_weights_run_as_they_were_calibrated():
    """The next block's input in the driver is what the finished model computes."""
    model, params, _, _ = decoders.make()
    nearest = RTN("output")
    recipe = (Rule("layers_0", INT4, nearest), Rule("layers_1/attention/q_proj", INT4, nearest))
    seen = {}

    def record(weights, stats, *args, **options):
        seen[weights[0].shape, len(weights)] = stats
        return round_group(weights, stats, *args, **options)

    round_group = one_device.round_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_device, "round_group", record)
        out, _ = driver.quantize_model(model, params, recipe, decoders.tokens())
    stage = jax.jit(model.block_stage, static_argnums=(0, 1))
    h, carry = model.embed(out, decoders.tokens()), None
    for index in range(5):
        h, carry = stage(None, index, out["layers_0"], h, carry, None)
    x, _ = stage(None, 0, out["layers_1"], h, None, None)
    x = np.asarray(x, np.float64).reshape(-1, 32)
    gram = seen[(32, 32), 1].gram  # q alone
    assert np.linalg.norm(gram - x.T @ x) / np.linalg.norm(x.T @ x) < 5e-6
