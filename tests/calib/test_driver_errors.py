"""What the driver refuses, before anything is quantized from it."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jq import statistics, tree
from jq.calib import stages
from jq.calib.driver import TreeSource, quantize_blocks, quantize_model
from jq.errors import CalibrationError, NonFiniteError, SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders

pytestmark = pytest.mark.usefixtures("fast_compiles")

INT4 = QuantSpec("int4", 16)
LEARNED = uniform(INT4, GPTQ())


def run(recipe=LEARNED, tokens=None, *, changed=None, **options):
    """Quantize the tiny decoder with some of its parameters replaced."""
    model, params, _, _ = decoders.make()
    for path, value in (changed or {}).items():
        params = tree.replace(params, path, value)
    tokens = decoders.tokens() if tokens is None else tokens
    return quantize_model(model, params, recipe, tokens, **options)


def leaf(path):
    return tree.get(decoders.make()[1], path)


# Fault 1: the hook


@contextlib.contextmanager
def broken_update(monkeypatch, update):
    """Statistics that are updated by `update`; no program made with it survives."""
    stages.run_samples.clear_cache()
    monkeypatch.setattr(statistics, "update", update)
    yield
    monkeypatch.undo()
    stages.run_samples.clear_cache()


def test_a_disconnected_hook_is_noticed(monkeypatch):
    fed = decoders.SAMPLES * decoders.LENGTH
    with (
        broken_update(monkeypatch, lambda stats, x, mask=None: stats),
        pytest.raises(CalibrationError, match=f"layers_0/.*q_proj: .* 0 tokens, but {fed} were"),
    ):
        run()


def test_a_hook_that_misses_tokens_is_noticed(monkeypatch):
    update = statistics.update
    with (
        broken_update(monkeypatch, lambda stats, x, mask=None: update(stats, x[1:], None)),
        pytest.raises(CalibrationError, match=r"saw 60 tokens, but 64 were fed"),
    ):
        run()


def test_a_hook_that_sees_zeros_is_noticed(monkeypatch):
    update = statistics.update
    with (
        broken_update(monkeypatch, lambda stats, x, mask=None: update(stats, x * 0.0, mask)),
        pytest.raises(CalibrationError, match="every calibration input is zero"),
    ):
        run()


# Faults 8 and 9: NaN and infinity


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_activation_that_is_not_finite(bad):
    """A token that only sample 2 has."""
    tokens = np.where(decoders.tokens() == 5, 6, decoders.tokens())
    tokens[2, 3] = 5
    table = leaf("embed/embedding").at[5, 1].set(bad)
    with pytest.raises(NonFiniteError, match=r"layers_0: qkv's input .* sample 2 \(1 of 4"):
        run(tokens=tokens, changed={"embed/embedding": table})


def test_an_activation_that_overflows_later():
    """Finite weights whose product is not: the group behind them is named, no block comes out."""
    model, params, _, _ = decoders.make()
    path = "layers_1/mlp/up_proj/kernel"
    params = tree.replace(params, path, leaf(path) * 1e38)
    blocks = quantize_blocks(
        model,
        TreeSource(params, model.block_names),
        (Rule("down_proj", INT4, GPTQ()),),
        decoders.tokens(),
    )
    assert next(blocks).name == "layers_0"
    with pytest.raises(NonFiniteError, match="layers_1: down's input is NaN or infinite"):
        next(blocks)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("path", ["layers_1/mlp/gate_proj/kernel", "layers_1/input_norm/scale"])
@pytest.mark.parametrize("recipe", [uniform(INT4, RTN()), (Rule("q_proj", INT4),)])
def test_a_weight_that_is_not_finite(bad, path, recipe):
    value = leaf(path).reshape(-1).at[7].set(bad).reshape(leaf(path).shape)
    with pytest.raises(NonFiniteError, match=path):
        run(recipe, changed={path: value})


# Faults 14 and 15: tokens


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (np.zeros((0, 8), np.int32), r"\(0, 8\)"),
        (np.zeros((2, 0), np.int32), r"\(2, 0\)"),
        (np.zeros(8, np.int32), r"integers \[samples, T\], not int32 \(8,\)"),
        (np.zeros((2, 8), np.float32), "not float32"),
        (np.full((2, 8), 64), r"ids 64\.\.64 .* 0\.\.63"),
        (np.full((2, 8), -1), r"ids -1\.\.-1"),
        (np.full((2, 8), 2**40), "not all in the model's vocabulary"),
    ],
)
def test_tokens_that_are_not_the_models(tokens, match):
    with pytest.raises(CalibrationError, match=match):
        run(tokens=tokens)


def test_no_tokens():
    model, params, _, _ = decoders.make()
    with pytest.raises(CalibrationError, match="none were given; pass tokens, or use RTN"):
        quantize_model(model, params, LEARNED)
    static = uniform(w8a8(activation="tensor", static=True), RTN())
    with pytest.raises(CalibrationError, match="none were given"):
        quantize_model(model, params, static)


def test_masks_that_do_not_fit():
    with pytest.raises(CalibrationError, match=r"mask \(4, 3\) does not fit tokens \(4, 16\)"):
        run(mask=np.ones((4, 3), bool))
    with pytest.raises(CalibrationError, match="saw 0 tokens"):
        run(mask=np.zeros((4, decoders.LENGTH), bool))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_sizes(batch_size):
    with pytest.raises(CalibrationError, match=f"batch_size is {batch_size}"):
        run(batch_size=batch_size)


# Fault 16, and recipes


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ((Rule("q_porj", INT4),), "'q_porj' decides about nothing"),
        ((Rule(".*", INT4), Rule("q_proj", INT4)), "'q_proj' decides about nothing"),
        ((Rule("embed|lm_head", INT4),), "decides about nothing"),
        ((Rule(".*", None, None),), "the recipe quantizes nothing"),
        ((), "the recipe quantizes nothing"),
    ],
)
def test_recipes_that_match_nothing(recipe, match):
    with pytest.raises(SpecError, match=match):
        run(recipe)


def test_a_group_size_that_does_not_divide():
    recipe = uniform(QuantSpec("int4", 32), RTN())
    with pytest.raises(SpecError, match=r"layers_0/mlp/down_proj: group_size 32 .* 48 .*: 16 or"):
        run(recipe)
    recipe = (Rule("down_proj", QuantSpec("int4", 16)), *recipe)
    assert run(recipe)


def test_quantizing_twice():
    first = QuantSpec("int4", 16)
    path = "layers_0/attention/v_proj/kernel"
    params, _ = run((Rule("layers_0/attention/v_proj", first),))
    for recipe in (uniform(INT4, RTN()), uniform(INT4, AWQ())):
        with pytest.raises(SpecError, match=f"{path}: already quantized"):
            run(recipe, changed={path: tree.get(params, path)})


@pytest.mark.parametrize(
    ("methods", "named"),
    [
        ((AWQ(), SmoothQuant()), "AWQ.*SmoothQuant"),
        ((AWQ(), AWQ(n_grid=5)), "n_grid=20.*n_grid=5"),
        ((SmoothQuant(), GPTQ()), "GPTQ.*SmoothQuant"),
    ],
)
def test_one_scale_must_serve_a_group(methods, named):
    """Refused for the last block, too, before the first is touched."""
    spec = QuantSpec("int8", -1)
    recipe = (
        Rule("layers_0", spec, RTN()),
        Rule("layers_1/attention/k_proj", spec, methods[0]),
        Rule("layers_1", spec, methods[1]),
    )
    model, params, _, _ = decoders.make()
    source = TreeSource(params, model.block_names)
    blocks = quantize_blocks(model, source, recipe, decoders.tokens())
    with pytest.raises(SpecError, match=rf"layers_1: .*k_proj.* same input .*{named}.* one scale"):
        next(blocks)


def test_methods_that_scale_nothing_here_may_differ():
    """SmoothQuant leaves the inputs of o and down alone: others may be beside it there."""
    spec = QuantSpec("int8", -1)
    recipe = (Rule("o_proj", spec, RTN()), Rule(".*", spec, SmoothQuant()))
    _, reports = run(recipe)
    choices = {r.path.split("/")[-1]: r.scale_choice for r in reports[0].linears}
    assert choices["o_proj"] is choices["down_proj"] is None
    assert choices["q_proj"] == choices["up_proj"] == pytest.approx(0.8)


# Faults 10 to 13: what must stay finite


def reported(reports):
    return [r for block in reports for r in block.linears]


def finite(params):
    return all(
        bool(jnp.isfinite(w.dequantize()).all()) and bool(jnp.isfinite(w.scale).all())
        for w in decoders.qtensors(params).values()
    )


def test_few_tokens_are_reported():
    recipe = (Rule("[qd]\\w*_proj", INT4, GPTQ()),)
    params, reports = run(recipe, decoders.tokens(2, 5))
    assert finite(params)
    assert len(reported(reports)) == 4
    for report in reported(reports):
        k = 48 if "down" in report.path else 32
        assert report.warnings[0] == (
            f"10 calibration tokens cannot fill a Hessian of {k} inputs: use more"
        )
        assert report.tokens == 10
    _, reports = run(recipe)
    assert all(r.warnings == () for r in reported(reports))


DEAD = 3
METHODS = {
    "gptq": (INT4, GPTQ(act_group_aware=True)),
    "awq": (INT4, AWQ(n_grid=3)),
    "smoothquant": (w8a8(), SmoothQuant(0.5, smooth="all")),
    "fp8": (w8a8("float8_e4m3fn", activation="tensor"), RTN()),
}


@pytest.mark.parametrize(
    "name",
    ["smoothquant", *[pytest.param(n, marks=pytest.mark.slow) for n in ("gptq", "awq", "fp8")]],
)
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_dead_and_huge_channels(name, size):
    """One input channel of the first attention and of the last MLP is 0, or 10,000 times larger."""
    changed = {
        path: leaf(path).at[DEAD].mul(size)
        for path in ("layers_0/input_norm/scale", "layers_1/post_attention_norm/scale")
    }
    column = leaf("layers_0/mlp/up_proj/kernel").at[:, DEAD].mul(size)
    changed["layers_0/mlp/up_proj/kernel"] = column
    params, reports = run(uniform(*METHODS[name]), changed=changed)
    assert finite(params)
    for report in reported(reports):
        assert np.isfinite(report.output_error or 0)
        assert np.isfinite(report.weight_error)
        assert not any("rounded to nearest" in w for w in report.warnings)
    model = decoders.make()[0]
    logits = model.apply({"params": params}, decoders.tokens())
    assert jnp.isfinite(logits).all()


def test_a_failed_solve_is_in_the_report(monkeypatch):
    """No damping helps: rounded to nearest, and said."""
    from jq.calib import one_device

    def failing(*args, **options):
        group = round_group(*args, **options)
        report = group.report._replace(failed=jnp.bool_(True), damp=jnp.float32(10.0))
        return group._replace(report=report)

    round_group = one_device.round_group
    monkeypatch.setattr(one_device, "round_group", failing)
    _, reports = run((Rule("layers_1/mlp/down_proj", INT4, GPTQ()),))
    (report,) = reported(reports)
    assert report.warnings == ("no damping made the Hessian positive definite: rounded to nearest",)

    def damped(*args, **options):
        group = round_group(*args, **options)
        return group._replace(report=group.report._replace(damp=jnp.float32(0.1)))

    monkeypatch.setattr(one_device, "round_group", damped)
    _, reports = run((Rule("layers_1/mlp/down_proj", INT4, GPTQ()),))
    assert reported(reports)[0].warnings == ("damping raised from 0.01 to 0.1",)


def test_progress_counts_every_group():
    steps = []
    run(uniform(INT4, RTN()), progress=steps.append)
    assert [s.done for s in steps] == list(range(1, 9))
    assert {s.total for s in steps} == {8}
    assert [(s.block, s.group) for s in steps[3:5]] == [("layers_0", "down"), ("layers_1", "qkv")]
    assert all(s.error is None for s in steps)
    assert steps[-1].seconds_left == 0
    assert dataclasses.asdict(steps[0])["seconds"] >= 0
