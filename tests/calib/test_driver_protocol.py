"""The protocol is enough: a user's own model through the driver; and what a run compiles."""

import jax
import numpy as np
import pytest

from jq.blockwise import BlockwiseModel
from jq.calib.driver import TreeSource, quantize_blocks, quantize_model
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders, toy
from tests.oracles import gptq, qmatmul
from tests.oracles.formats import format_of

pytestmark = pytest.mark.usefixtures("fast_compiles")

INT4 = QuantSpec("int4", 8, False, scale_dtype="float32")
RECIPES = {
    "rtn": uniform(INT4, RTN("mse")),
    "gptq": uniform(INT4, GPTQ()),
    "awq": uniform(INT4, AWQ(n_grid=4)),
    "smoothquant": uniform(w8a8(), SmoothQuant("auto", smooth="all")),
    "both": (Rule("up", INT4, AWQ(n_grid=4)), Rule("down", w8a8("float8_e4m3fn"), RTN())),
}


@pytest.mark.parametrize(
    "name",
    [
        *["gptq", "awq", "smoothquant"],
        *[pytest.param(n, marks=pytest.mark.slow) for n in ("rtn", "both")],
    ],
)
def test_a_model_of_ones_own(name):
    model, params = toy.Toy(), toy.make_params()
    assert isinstance(model, BlockwiseModel)
    out, reports = quantize_model(model, params, RECIPES[name], toy.tokens())
    assert [r.name for r in reports] == ["first", "second"]
    paths = [r.path for block in reports for r in block.linears]
    assert paths == ["first/up", "first/down", "second/up", "second/down"]
    assert set(decoders.qtensors(out)) == set(paths)
    before, after = (toy.forward(model, p, toy.tokens()) for p in (params, out))
    assert 1e-4 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.15


def test_its_codes_are_the_oracles():
    model, params = toy.Toy(), toy.make_params()
    out, _ = quantize_model(model, params, RECIPES["gptq"], toy.tokens())
    h = np.asarray(model.embed(params, toy.tokens()), np.float64).reshape(-1, toy.WIDTH)
    for name in model.block_names:
        block = jax.tree.map(lambda a: np.asarray(a, np.float64), params[name])
        x = h * block["gain"]["scale"]
        for linear in ("up", "down"):
            found = out[name][linear]["kernel"]
            w = block[linear]["kernel"]
            expected = gptq.quantize(w, x.T @ x, format_of(INT4), 8)
            np.testing.assert_array_equal(found.unsigned_codes(), expected.codes)
            x = x @ qmatmul.weight(found)
            x = np.maximum(x + block["up"]["bias"], 0) if linear == "up" else x
        h = h + x


def test_blocks_come_out_one_by_one():
    """The second block is not asked for before the first is handed out."""
    model, params = toy.Toy(), toy.make_params()
    asked = []

    class Source(TreeSource):
        def block(self, name):
            asked.append(name)
            return super().block(name)

    source = Source(params, model.block_names)
    blocks = quantize_blocks(model, source, RECIPES["gptq"], toy.tokens())
    assert asked == []
    assert (next(blocks).name, asked) == ("first", ["first"])
    assert (next(blocks).name, asked) == ("second", ["first", "second"])
    assert next(blocks, None) is None


@pytest.fixture
def compilations():
    """Names of the programs that were compiled."""
    names: list[str] = []

    def listen(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def compiled(names, model, params, recipe, tokens):
    """What one run compiles when nothing is compiled yet."""
    jax.clear_caches()
    names.clear()
    quantize_model(model, params, recipe, tokens)
    return sorted(names)


def test_depth_costs_no_compilation(compilations):
    """Six blocks compile what two do; a second run compiles nothing."""
    recipe = uniform(INT4, AWQ(n_grid=4, rounding=GPTQ()))
    found = []
    for count in (2, 6):
        model = toy.Toy(tuple(f"block_{i}" for i in range(count)))
        params = toy.make_params(model=model)
        found.append(compiled(compilations, model, params, recipe, toy.tokens()))
    assert found[0] == found[1]
    stages, groups = 3, 2
    # The search for scales and the rounding run the same programs.
    assert found[0].count("jit(run_samples)") == stages
    assert found[0].count("jit(solve_group)") == groups
    assert found[0].count("jit(choose_scale)") == groups
    params, tokens = toy.make_params(1, model), toy.tokens(seed=5)
    compilations.clear()
    quantize_model(model, params, recipe, tokens)
    assert compilations == []


@pytest.mark.slow
def test_depth_of_a_decoder_costs_no_compilation(compilations):
    recipe = uniform(QuantSpec("int4", 16), GPTQ())
    found = []
    for layers in (2, 6):
        model, params, _, _ = decoders.make("llama3", layers)
        found.append(compiled(compilations, model, params, recipe, decoders.tokens()))
    assert found[0] == found[1]
    assert found[0].count("jit(run_samples)") == 5
    assert found[0].count("jit(solve_group)") == 4
