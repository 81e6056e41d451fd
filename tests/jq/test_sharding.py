"""Weights cut over a mesh: every shard multiplies as a weight of its own.

The tests need four devices, and run in a process of their own that has four.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jq.cuts import misfit
from jq.errors import SpecError
from jq.matmul import qmatmul
from jq.prepare import choices, prepare
from jq.prepared import PreparedTensor
from jq.sharding import partition_specs, sharded_qmatmul
from jq.spec import FP8, QuantSpec
from tests.devices import run_with
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle

FOUR = len(jax.devices()) == 4
K, N = 256, 128
on_four = pytest.mark.skipif(not FOUR, reason="runs in the process with four devices")


@pytest.mark.skipif(FOUR, reason="this is that process")
def test_on_four_devices():
    run_with(4, __file__)


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def expected(x, w) -> np.ndarray:
    return oracle.weight_only(np.asarray(x, np.float64), w, "bfloat16")


def placed(w, k, n):
    """The weight, on the devices of the mesh."""
    specs = partition_specs(w, k, n)
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh(), s)), w, specs)


CUTS = {
    "columns": (None, "model"),
    "rows": ("model", None),
    "both": ("data", "model"),
    "all": (None, ("data", "model")),
}


@on_four
@pytest.mark.parametrize("kind", ["portable", "prepared"])
@pytest.mark.parametrize("name", ["int4 g32 zero", "int4 g64 fp16"])
@pytest.mark.parametrize("cut", CUTS)
def test_products_of_shards(cut, name, kind):
    k, n = CUTS[cut]
    if kind == "prepared" and cut == "all":
        pytest.skip("32 columns are half a tile")
    dtype = "float16" if "fp16" in name else "bfloat16"
    w = cases.weight(name, K, N)
    x = jnp.asarray(cases.activations(6, K), dtype)
    ready = prepare(w, "sm_90", dtype=dtype) if kind == "prepared" else w
    assert isinstance(ready, PreparedTensor) == (kind == "prepared")
    shards = placed(ready, k, n)
    y = jax.jit(lambda x, w: sharded_qmatmul(x, w, mesh(), k=k, n=n))(x, shards)
    assert (y.shape, y.dtype) == ((6, N), x.dtype)
    reference = oracle.weight_only(np.asarray(x, np.float64), w, dtype)
    assert problems.relative_error(y, reference) < (5e-3 if dtype == "bfloat16" else 8e-4)


@on_four
@pytest.mark.parametrize("name", ["int4 channel", "int8 token / channel", "fp8 block", "int3 g32"])
def test_other_formats_in_portable_shards(name):
    w, x = cases.weight(name, K, N), jnp.asarray(cases.activations(5, K))
    shards = placed(w, None if w.spec.activation else "data", "model")
    y = jax.jit(
        lambda x, w: sharded_qmatmul(
            x, w, mesh(), k=None if w.spec.activation else "data", n="model"
        )
    )(x, shards)
    assert problems.relative_error(y, oracle.qmatmul(np.asarray(x), w)) < 1e-5


@on_four
@pytest.mark.parametrize("name", ["int8 token / channel", "fp8 tensor static / tensor"])
def test_prepared_weights_with_8_bit_activations(name):
    """Columns are those of the whole; shards of K round their own inputs."""
    w, x = cases.weight(name, K, N), jnp.asarray(cases.activations(6, K), jnp.bfloat16)
    ready = prepare(w, "sm_90")
    assert isinstance(ready, PreparedTensor)
    whole = np.asarray(jax.jit(qmatmul)(x, w), np.float64)
    for (k, n), limit in (((None, "model"), 0), (("data", "model"), 0.05)):
        shards = placed(ready, k, n)
        assert shards.weight.codes.sharding.spec == P(n, k)
        y = jax.jit(lambda x, w, k=k, n=n: sharded_qmatmul(x, w, mesh(), k=k, n=n))(x, shards)
        assert problems.relative_error(y, whole) <= limit
    cut = NamedSharding(mesh(), P(None, "model"))
    moved = dataclasses.replace(w, codes=jax.device_put(w.codes, cut))
    assert prepare(moved, "sm_90").weight.codes.sharding.spec == P("model", None)


@on_four
@pytest.mark.parametrize("kind", ["portable", "prepared"])
def test_act_order_is_applied_before_the_cut(kind):
    w = cases.weight("int4 g32", K, N, act_order=True)
    x = jnp.asarray(cases.activations(4, K), jnp.bfloat16)
    ready = prepare(w, "sm_90") if kind == "prepared" else w
    y = jax.jit(lambda x, w: sharded_qmatmul(x, w, mesh(), k="model", rows="data"))(x, ready)
    assert problems.relative_error(y, expected(x, w)) < 5e-3
    assert y.sharding.spec[0] == "data"


@on_four
def test_rows_of_x_may_be_cut_and_gradients_pass():
    w = cases.weight("int4 g32", K, N)
    ready = prepare(w, "sm_90")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, K)), jnp.bfloat16)

    @jax.jit
    def run(x, w):
        def loss(x):
            y = sharded_qmatmul(x, w, mesh(), n="model", rows="data")
            return y.astype(jnp.float32).sum(), y

        return jax.grad(loss, has_aux=True)(x)

    dx, y = run(x, ready)
    dense = oracle.round_to(oracle.weight(w), "bfloat16")
    assert problems.relative_error(y, np.asarray(x, np.float64) @ dense) < 2.5e-3
    whole = np.broadcast_to(dense.sum(axis=1), x.shape)
    assert problems.relative_error(dx, whole) < 5e-3


@on_four
def test_prepare_keeps_shards_where_they_are():
    w = cases.weight("int4 g32 zero", K, N)
    whole = prepare(w, "sm_90")
    ready = prepare(placed(w, "data", "model"), "sm_90")
    fragments = ready.weight.fragments
    assert fragments.sharding.spec[:2] == ("model", "data")
    assert fragments.addressable_shards[0].data.shape == (1, 2, 4, 128)
    jax.tree.map(np.testing.assert_array_equal, ready, whole)
    # 32 columns to a shard are half a tile: the portable layout stays, and says so.
    narrow = placed(w, None, ("data", "model"))
    assert prepare({"w": narrow}, "sm_90")["w"] is narrow
    assert "64" in choices({"w": narrow}, "sm_90")["w"].reason


@on_four
def test_a_stack_of_shards_is_scanned():
    w = cases.weight("int4 g32", N, N)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    stacked = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh(), s)),
        stacked,
        partition_specs(stacked, None, "model"),
    )
    ready = prepare(stacked, "sm_90")
    assert ready.weight.fragments.sharding.spec[1] == "model"

    @jax.jit
    def run(x, stacked):
        def layer(h, w):
            return sharded_qmatmul(h, w, mesh(), n="model"), None

        return jax.lax.scan(layer, x, stacked)[0]

    x = jnp.asarray(cases.activations(3, N), jnp.bfloat16)
    once = jnp.asarray(expected(x, w), jnp.bfloat16)
    assert problems.relative_error(run(x, ready), expected(once, w)) < 7.5e-3


@on_four
def test_a_shard_map_of_ones_own():
    """`qmatmul` inside any shard_map: static sizes are the whole's, arrays are the shard's."""
    for ready in (cases.weight("int4 g32", K, N), prepare(cases.weight("int4 g32", K, N), "sm_90")):
        specs = partition_specs(ready, None, "model")
        run = jax.shard_map(
            qmatmul,
            mesh=mesh(),
            in_specs=(P(), specs),
            out_specs=P(None, "model"),
            check_vma=False,
        )
        x = jnp.asarray(cases.activations(5, K), jnp.bfloat16)
        y = jax.jit(run)(x, ready)
        assert problems.relative_error(y, expected(x, cases.weight("int4 g32", K, N))) < 2.5e-3


@on_four
def test_cuts_through_groups_are_refused():
    w = cases.weight("int4 channel", K, N)
    x = jnp.ones((1, 96), jnp.bfloat16)
    small = cases.weight("int4 g32", 96, N)
    with pytest.raises(SpecError, match="2 shards of K = 96"):
        sharded_qmatmul(x, small, mesh(), k="model")
    ready = prepare(w, "sm_90")
    with pytest.raises(SpecError, match="4 shards of N = 128"):
        sharded_qmatmul(jnp.ones((1, K), jnp.bfloat16), ready, mesh(), n=("data", "model"))


G32, ZERO = QuantSpec("int4", 32), QuantSpec("int4", 32, symmetric=False)


@pytest.mark.parametrize(
    ("spec", "parts", "tiled", "fits"),
    [
        (G32, (2, 1), False, True),
        (G32, (8, 1), False, True),
        (G32, (16, 1), False, False),  # 16 inputs are half a group
        (G32, (4, 1), True, True),
        (G32, (8, 1), True, False),  # 32 inputs are half a tile
        (G32, (1, 128), False, True),
        (ZERO, (1, 128), False, False),  # eight zero points share bytes
        (ZERO, (1, 16), False, True),
        (ZERO, (1, 2), True, True),
        (QuantSpec("int4", 128), (4, 1), True, False),
        (QuantSpec("int4", -1), (4, 1), True, True),
        (QuantSpec("int4", -1), (64, 1), False, False),
        (QuantSpec(FP8, 32, granularity="block"), (8, 4), False, True),
        (QuantSpec(FP8, 32, granularity="block"), (8, 8), False, False),
        (QuantSpec("int8", -1), (256, 128), False, True),
    ],
)
def test_where_a_weight_can_be_cut(spec, parts, tiled, fits):
    assert (misfit(spec, K, N, *parts, tiled=tiled) is None) == fits


def test_specs_of_every_array():
    w = cases.weight("int4 g32 zero", K, N, act_order=True)
    specs = partition_specs(w, "data", "model")
    assert specs.codes == specs.scale == specs.zero_point == P("data", "model")
    assert (specs.order, specs.input_scale) == (P(None), None)
    channel = partition_specs(cases.weight("int4 channel", K, N), "data", "model")
    assert channel.scale == P(None, "model")
    static = partition_specs(cases.weight("int8 tensor static / tensor"), "data", "model")
    assert (static.scale, static.input_scale) == (P(None, None), P())
    ready = partition_specs(prepare(w, "sm_90"), "data", "model").weight
    assert ready.fragments == P("model", "data", None, None)
    assert ready.scale == ready.offset == P("data", "model")
    assert ready.normaliser == P("model")
    stacked = jax.tree.map(lambda a: a[None], w)
    assert partition_specs(stacked, None, "model").codes == P(None, None, "model")
    assert partition_specs(stacked, None, "model", ("data",)).order == P("data", None)
    assert dataclasses.is_dataclass(specs)
