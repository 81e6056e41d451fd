"""Quantizing a user's own Flax model: statistics, the transform, and running it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import statistics, tree
from jq.blockwise import LinearGroup
from jq.calib.collect import collect
from jq.dense import quantized_dense
from jq.errors import CalibrationError, NonFiniteError, SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.oneshot import quantize
from jq.qtensor import QTensor
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.jq import problems
from tests.oracles import awq as awq_oracle
from tests.oracles import gptq, qmatmul, rtn, smoothquant
from tests.oracles.formats import format_of

pytestmark = pytest.mark.usefixtures("fast_compiles")

INT4 = QuantSpec("int4", 8, False, scale_dtype="float32")
WIDTH, HIDDEN = 16, 32


class MLP(nn.Module):
    """A norm with a weight, two Dense, and a head."""

    dtype: object = None

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(use_bias=False, name="norm")(x)
        h = nn.relu(nn.Dense(HIDDEN, name="up", dtype=self.dtype)(h))
        h = nn.Dense(WIDTH, name="down", use_bias=False, dtype=self.dtype)(h)
        return nn.Dense(4, name="head", dtype=self.dtype)(h)


GROUPS = (
    LinearGroup("up", ("up",), "norm", "norm"),
    LinearGroup("down", ("down",), "up", "linear"),
)
LEAVE_HEAD = Rule("head", None)


def batches(count=3, rows=20, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, rows, WIDTH)).astype("f4"))


@functools.cache
def problem():
    """(params, statistics, inputs of up, down and head in float64)."""
    key = jax.random.key(0)
    params = MLP().init(key, jnp.ones((1, WIDTH)))["params"]
    params = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.fold_in(key, a.size), a.shape), params
    )
    return params, collect(MLP(), params, batches()), inputs(params)


def inputs(params):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.concatenate(batches()).astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    up = x * p["norm"]["scale"]
    down = np.maximum(up @ p["up"]["kernel"] + p["up"]["bias"], 0)
    return {"up": up, "down": down, "head": down @ p["down"]["kernel"]}


def run(params, x, model=None):
    with quantized_dense():
        return np.asarray((model or MLP()).apply({"params": params}, x), np.float64)


# Statistics


def test_statistics_of_every_linear():
    _, stats, xs = problem()
    assert set(stats) == set(xs)
    for path, x in xs.items():
        assert stats[path].count == 60
        assert problems.relative_error(stats[path].gram, x.T @ x) < 1e-6
        np.testing.assert_allclose(stats[path].abs_max, np.abs(x).max(0), rtol=1e-5)
        np.testing.assert_allclose(stats[path].abs_sum, np.abs(x).sum(0), rtol=1e-5)


def test_some_of_the_linears():
    params, stats, _ = problem()
    some = collect(MLP(), params, batches(), pattern="up|hea")
    assert set(some) == {"up", "head"}
    jax.tree.map(np.testing.assert_array_equal, some["up"], stats["up"])


def test_a_function_and_any_batches():
    """A function that takes apart what a batch is; inputs of three axes, batched either way."""
    params, stats, _ = problem()

    def apply(params, batch):
        return MLP().apply({"params": params}, batch["x"] * batch["factor"])

    whole = np.stack(batches())
    half = {"x": whole / 2, "factor": np.float32(2)}
    at_once = collect(apply, params, [half])
    one_by_one = collect(apply, params, ({"x": x[None], "factor": np.float32(1)} for x in whole))
    for path, expected in stats.items():
        for found in (at_once[path], one_by_one[path]):
            assert problems.relative_error(found.gram, expected.gram) < 1e-5
            assert found.count == 60


def test_the_linears_of_our_own_models():
    from tests.calib import decoders

    model, params, _, _ = decoders.make(layers=1)
    stats = collect(model, params, [decoders.tokens()], pattern="q_proj|up_proj|lm_head")
    paths = ["layers_0/attention/q_proj", "layers_0/mlp/up_proj", "lm_head"]
    assert sorted(stats) == sorted(paths)
    x, _ = model.block_stage(
        None, 0, params["layers_0"], model.embed(params, decoders.tokens()), None, None
    )
    x = np.asarray(x, np.float64).reshape(-1, 32)
    assert problems.relative_error(stats[paths[0]].gram, x.T @ x) < 1e-6


def test_a_linear_that_is_called_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(WIDTH, name="dense")
            return dense(dense(x))

    params = Twice().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    assert collect(Twice(), params, batches())["dense"].count == 120


class Looped(nn.Module):
    """Dense inside nn.scan, and one outside."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(WIDTH, name="inner")(x), None

        split = {"params": True}
        x, _ = nn.scan(Layer, {"params": 0}, split_rngs=split, length=2)(name="loop")(x, None)
        return nn.remat(nn.Dense)(WIDTH, name="outer")(x)


def test_what_cannot_be_collected():
    params, _, _ = problem()
    with pytest.raises(CalibrationError, match="no calibration batches"):
        collect(MLP(), params, [])
    with pytest.raises(CalibrationError, match="no linear matches 'upp'; there are down, head, up"):
        collect(MLP(), params, batches(), pattern="upp")
    with pytest.raises(CalibrationError, match="none of down, head, up was called"):
        collect(lambda params, batch: batch, params, batches())
    looped = Looped().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    with pytest.raises(CalibrationError, match="called inside a loop"):
        collect(Looped(), looped, batches())
    jitted = jax.jit(lambda params, x: MLP().apply({"params": params}, x))
    with pytest.raises(CalibrationError, match="another jit"):
        collect(jitted, params, batches())
    jitted(params, batches()[0])
    with pytest.raises(CalibrationError, match="if the function is jitted"):
        collect(jitted, params, batches())  # compiled before: nothing is traced


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_inputs_that_are_not_finite(bad):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    params = Plain().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    some = batches()
    some[1][3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"dense: its input .* batch 1"):
        collect(Plain(), params, some)


def test_collecting_compiles_once():
    params, _, _ = problem()
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return MLP().apply({"params": params}, x)

    collect(apply, params, batches(5))
    assert traces == [(20, WIDTH)]


# The transform


def codes(params, path):
    return problems.code_bytes(tree.get(params, f"{path}/kernel").unsigned_codes())


def test_round_to_nearest_needs_no_statistics():
    params, _, _ = problem()
    out = quantize(params, (LEAVE_HEAD, *uniform(INT4, RTN())))
    for path in ("up", "down"):
        w = params[path]["kernel"]
        expected = rtn.quantize(np.asarray(w), format_of(INT4), 8)
        assert problems.count_ties(codes(out, path), expected.codes, expected.margins) == 0
    assert out["head"]["kernel"] is params["head"]["kernel"]
    assert out["up"]["bias"] is params["up"]["bias"]
    assert isinstance(params["up"]["kernel"], jax.Array)
    assert list(out) == list(params)


def test_gptq_learns_from_statistics():
    params, stats, xs = problem()
    reports = {}
    out = quantize(
        params, uniform(INT4, GPTQ()), stats, on_group=lambda p, r: reports.update({p: r})
    )
    for path, x in xs.items():
        w = np.asarray(params[path]["kernel"])
        expected = gptq.quantize(w, x.T @ x, format_of(INT4), 8)
        assert problems.count_ties(codes(out, path), expected.codes, expected.margins) == 0
        made = qmatmul.weight(out[path]["kernel"])
        error = problems.relative_error(x @ made, x @ w)
        assert reports[(path,)].output_error[0] == pytest.approx(error, rel=1e-3)
        assert error < reports[(path,)].rtn_output_error[0]


def test_awq_folds_what_it_is_told_to():
    params, stats, xs = problem()
    out = quantize(
        params, (LEAVE_HEAD, *uniform(INT4, AWQ(n_grid=5, duo_scaling=True))), stats, groups=GROUPS
    )
    scales = {}
    for path, fmt in (("up", format_of(INT4)), ("down", format_of(INT4))):
        w = np.asarray(params[path]["kernel"])
        losses, tried = awq_oracle.losses(xs[path], [w], fmt, 8, 5)
        assert np.sort(losses)[1] > losses.min() * 1.0005
        scales[path] = tried[int(np.argmin(losses))]
    norm = np.asarray(params["norm"]["scale"]) / scales["up"]
    np.testing.assert_allclose(out["norm"]["scale"], norm, rtol=1e-5)
    bias = np.asarray(params["up"]["bias"]) / scales["down"]
    np.testing.assert_allclose(out["up"]["bias"], bias, rtol=1e-5)
    up = np.asarray(params["up"]["kernel"], np.float64) * scales["up"][:, None]
    for path, w, x in (
        ("up", up / scales["down"][None, :], xs["up"] / scales["up"]),
        (
            "down",
            np.asarray(params["down"]["kernel"], np.float64) * scales["down"][:, None],
            xs["down"] / scales["down"],
        ),
    ):
        expected = rtn.quantize(w, format_of(INT4), 8, clip="output", gram=x.T @ x)
        assert problems.count_ties(codes(out, path), expected.codes, expected.margins) == 0


@pytest.mark.parametrize("smooth", ["norm", "all"])
def test_smoothquant_with_static_activations(smooth):
    params, stats, xs = problem()
    recipe = (
        LEAVE_HEAD,
        *uniform(w8a8(activation="tensor", static=True), SmoothQuant(0.5, smooth=smooth)),
    )
    out = quantize(params, recipe, stats, groups=GROUPS)
    s = smoothquant.scale(0.5, xs["up"], [np.asarray(params["up"]["kernel"])])
    found = float(out["up"]["kernel"].input_scale)
    assert found == pytest.approx(np.abs(xs["up"] / s).max() / 127, rel=1e-5)
    top = np.abs(xs["down"])
    if smooth == "all":
        top = top / smoothquant.scale(0.5, xs["down"], [np.asarray(params["down"]["kernel"])])
    assert float(out["down"]["kernel"].input_scale) == pytest.approx(top.max() / 127, rel=1e-5)
    before, after = (run(p, batches()[0]) for p in (params, out))
    assert 1e-5 < problems.relative_error(after, before) < 0.05


def test_folding_alone_changes_nothing():
    """A norm and a linear in bfloat16 keep their dtype; the head in the group stays in place."""
    params, stats, _ = problem()
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    recipe = (Rule("up", QuantSpec("int8", 8), AWQ(search_scale=False)),)
    out = quantize(narrow, recipe, stats, groups=GROUPS)
    assert out["norm"]["scale"].dtype == jnp.bfloat16
    assert out["down"]["kernel"] is narrow["down"]["kernel"]
    recipe = (Rule("down", QuantSpec("int8", 8), AWQ(search_scale=False)),)
    out = quantize(narrow, recipe, stats, groups=GROUPS)
    assert out["up"]["kernel"].dtype == out["up"]["bias"].dtype == jnp.bfloat16
    assert not np.array_equal(out["up"]["kernel"], narrow["up"]["kernel"])


@pytest.mark.parametrize(
    ("recipe", "options", "error", "match"),
    [
        (uniform(INT4, GPTQ()), {}, CalibrationError, "down: its method learns .* jq.collect"),
        (
            uniform(w8a8(activation="tensor", static=True), RTN()),
            {},
            CalibrationError,
            "down: its method learns",
        ),
        (uniform(INT4, AWQ()), {"stats": True}, SpecError, "down: AWQ moves a scale .*groups="),
        (
            uniform(w8a8(), SmoothQuant("auto")),
            {"stats": True, "groups": (LinearGroup("all", ("up", "down", "head"), "norm"),)},
            SpecError,
            "alpha='auto' compares .*quantize_model",
        ),
        (
            (Rule("up", INT4, AWQ()), Rule(".*", INT4, GPTQ())),
            {"stats": True, "groups": (LinearGroup("g", ("up", "down"), "norm"),)},
            SpecError,
            "group 'g': up, down read the same input",
        ),
        (uniform(INT4, RTN()), {"groups": (LinearGroup("g", ("upp",)),)}, SpecError, "'upp'"),
        (
            uniform(INT4, RTN()),
            {"groups": (LinearGroup("g", ("up",)), LinearGroup("h", ("up",)))},
            SpecError,
            "up stands in two groups",
        ),
        ((Rule("opu", INT4),), {}, SpecError, "'opu' decides about nothing|quantizes nothing"),
        (uniform(QuantSpec("int4", 32), RTN()), {}, SpecError, r"group_size 32 .*head \(16\)"),
    ],
)
def test_refusals(recipe, options, error, match):
    params, stats, _ = problem()
    options = dict(options)
    with pytest.raises(error, match=match):
        quantize(params, recipe, stats if options.pop("stats", False) else None, **options)


def test_a_producer_that_is_not_there():
    params, stats, _ = problem()
    group = LinearGroup("g", ("up",), "nrom", "linear")
    with pytest.raises(SpecError, match=r"group 'g'.*'nrom/kernel'"):
        quantize(params, (Rule("up", INT4, AWQ(n_grid=1)),), stats, groups=(group,))


def test_quantizing_twice():
    params, stats, _ = problem()
    out = quantize(params, (Rule("up", INT4),))
    again = quantize(out, (Rule("up", None), *uniform(INT4, RTN())))
    assert isinstance(again["down"]["kernel"], QTensor)
    assert again["up"]["kernel"] is out["up"]["kernel"]
    with pytest.raises(SpecError, match="up/kernel: already quantized"):
        quantize(out, uniform(INT4, RTN()))
    # A scale cannot be folded into a linear that is already rounded.
    with pytest.raises(SpecError, match="up/kernel: already quantized"):
        quantize(out, (Rule("down", INT4, AWQ(n_grid=1)),), stats, groups=GROUPS)


def test_numbers_that_are_not():
    params, stats, _ = problem()
    bad = tree.replace(params, "up/kernel", params["up"]["kernel"].at[3, 3].set(np.nan))
    with pytest.raises(NonFiniteError, match="up/kernel: the weight has NaN"):
        quantize(bad, uniform(INT4, RTN()))
    assert quantize(bad, (Rule("down", INT4),))
    recipe = uniform(INT4, GPTQ())
    broken = stats | {"up": stats["up"]._replace(gram=stats["up"].gram * np.inf)}
    with pytest.raises(NonFiniteError, match="up: the statistics have NaN"):
        quantize(params, recipe, broken)
    nothing = stats | {"up": statistics.init(WIDTH)}
    with pytest.raises(CalibrationError, match=r"up: every calibration input is zero.*0 tokens"):
        quantize(params, recipe, nothing)
    other = stats | {"up": stats["down"]}
    with pytest.raises(
        CalibrationError, match="up: statistics of 32 inputs, but the kernel has 16"
    ):
        quantize(params, recipe, other)
    gram = jnp.eye(WIDTH).at[0, 1].set(1e9).at[1, 0].set(1e9)
    indefinite = stats | {"up": stats["up"]._replace(gram=gram)}
    with pytest.raises(CalibrationError, match=r"up: no damping .* positive definite"):
        quantize(params, recipe, indefinite)


def test_a_tree_of_many_equal_linears_compiles_once():
    from jq import group

    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.standard_normal((24, 8)), jnp.float32)}
        for i in range(5)
    }
    before = group.solve_group._cache_size()
    quantize(params, uniform(QuantSpec("int5", 8), RTN()))
    assert group.solve_group._cache_size() == before + 1


def test_under_jit_and_eval_shape():
    params, stats, _ = problem()
    recipe = uniform(INT4, GPTQ())

    def transform(params, stats):
        return quantize(params, recipe, stats)

    shapes = jax.eval_shape(transform, params, stats)
    made = jax.jit(transform)(params, stats)
    plain = quantize(params, recipe, stats)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, plain)
    assert all(jax.tree.leaves(same))
    for path in ("up", "down", "head"):
        np.testing.assert_array_equal(codes(made, path), codes(plain, path))


def test_what_is_no_linear_stays():
    """Convolutions, embeddings, kernels of other ranks."""
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 8, 8))},
        "heads": {"kernel": jnp.ones((8, 2, 4))},
        "embed": {"embedding": jnp.ones((8, 8))},
        "dense": {"kernel": jnp.ones((8, 8))},
        "step": 3,
    }
    out = quantize(params, uniform(INT4, RTN()))
    assert isinstance(out["dense"]["kernel"], QTensor)
    assert all(out[k] is params[k] for k in ("conv", "heads", "embed", "step"))


# Running it


@pytest.mark.parametrize("spec", [INT4, w8a8(), w8a8("float8_e4m3fn", activation="tensor")])
def test_dense_multiplies_with_the_quantized_kernel(spec):
    params, _, xs = problem()
    out = quantize(params, (Rule("up", spec),))
    x = batches()[0]
    after = run(out, x)
    up = qmatmul.qmatmul(xs["up"][:20].astype(np.float32), out["up"]["kernel"])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), {**params, "up": params["up"]})
    h = np.maximum(up + p["up"]["bias"], 0) @ p["down"]["kernel"]
    expected = h @ p["head"]["kernel"] + p["head"]["bias"]
    assert problems.relative_error(after, expected) < 1e-5


def test_plain_kernels_are_left_alone():
    params, _, _ = problem()
    x = batches()[0]
    np.testing.assert_array_equal(run(params, x), MLP().apply({"params": params}, x))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes_follow_the_module(dtype):
    params, _, _ = problem()
    model = MLP(dtype=dtype)
    out = quantize(params, uniform(QuantSpec("int8", 8), RTN()))
    x = jnp.asarray(batches()[0])
    with quantized_dense():
        y = model.apply({"params": out}, x)
    assert y.dtype == (dtype or jnp.float32)
    before = np.asarray(model.apply({"params": params}, x), np.float64)
    assert problems.relative_error(y, before) < 0.03


def test_without_the_context_flax_refuses():
    params, _, _ = problem()
    out = quantize(params, uniform(INT4, RTN()))
    apply = jax.jit(lambda params, x: MLP().apply({"params": params}, x))
    x = batches()[0]
    with pytest.raises(Exception, match="kernel"):
        apply(out, x)
    inside = run(out, x)
    with quantized_dense():
        apply(out, x)
    # Compiled inside, it needs no context any more.
    assert problems.relative_error(apply(out, x), inside) < 1e-6


def test_a_dense_of_ones_own_keeps_its_own_ways():
    class Doubled(nn.Dense):
        def __call__(self, x):
            return 2 * x

    class Named(nn.Dense):
        """Only another name."""

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Named(WIDTH, name="named")(Doubled(WIDTH, name="doubled")(x))

    params = {
        name: {"kernel": jnp.asarray(problems.weights(WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
        for name in ("named", "doubled")
    }
    out = quantize(params, uniform(INT4, RTN()))
    x = batches()[0]
    expected = 2 * np.asarray(x, np.float64) @ qmatmul.weight(out["named"]["kernel"])
    assert problems.relative_error(run(out, x, Both()), expected) < 1e-6


def test_statistics_of_a_partly_quantized_model():
    """What a quantized linear makes is what the next ones read."""
    params, stats, _ = problem()
    out = quantize(params, (Rule("up", QuantSpec("int2", 8)),))
    later = collect(MLP(), out, batches())
    np.testing.assert_array_equal(later["up"].gram, stats["up"].gram)
    assert problems.relative_error(later["down"].gram, stats["down"].gram) > 1e-2
    with (
        quantized_dense(),
        pytest.raises(CalibrationError, match=r"up: .* outside of quantized_dense"),
    ):
        collect(MLP(), out, batches())
