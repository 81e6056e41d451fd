"""Experts: each solved as if it stood alone, and what those with few tokens borrow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq
from jq import experts, statistics
from jq.blockwise import LinearGroup
from jq.checkpoint.part_writer import save_part
from jq.checkpoint.reader import part_tree, read_part
from jq.errors import CalibrationError, NonFiniteError, SpecError
from jq.experts import Experts, expert_matmul, round_experts
from jq.group import round_group
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.oneshot import quantize
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec
from tests.checkpoint.trees import assert_same
from tests.jq import moe, problems
from tests.oracles import gptq as oracle
from tests.oracles.formats import Format

E, K, N = 4, 32, 12
SPEC = QuantSpec("int4", 16, symmetric=False)
NONE = Experts("white", min_tokens=0)
STACKS = {"gate|up": Experts("layer"), "down": Experts("white")}
GROUPS = (LinearGroup("in", ("gate", "up")), LinearGroup("out", ("down",)))


def rows_of(counts, seed=0):
    """Each expert's inputs, float32 [n, K], of a distribution of its own."""
    return [problems.inputs(K, n, seed + i) for i, n in enumerate(counts)]


def stats_of(rows):
    """Their statistics, from buffers with empty places."""
    x = np.zeros((len(rows), max(map(len, rows)) + 3, rows[0].shape[1]), np.float32)
    for buffer, some in zip(x, rows, strict=True):
        buffer[1 : 1 + len(some)] = some
    return experts.finish(experts.update(experts.init(len(rows), x.shape[2]), jnp.asarray(x)))


def weights(n=N, count=E):
    return jnp.stack([jnp.asarray(problems.weights(K, n, i)) for i in range(count)])


@pytest.mark.parametrize(
    ("config", "how", "known"),
    [
        (GPTQ(), "plain", NONE),
        (GPTQ(), "plain", Experts("layer", 60)),
        (GPTQ(), "plain", Experts("white", 60)),
        (GPTQ(act_group_aware=True, clip="mse"), "gar", Experts("layer", 60)),
        (GPTQ(desc_act=True), "desc_act", NONE),
    ],
)
def test_codes_are_those_of_each_expert_alone(config, how, known):
    """Against the textbook in float64, given the tokens it has and those it borrows."""
    rows, w = rows_of((50, 200, 64, 35)), weights()
    (made,), report = round_experts([w], stats_of(rows), SPEC, config, known)
    codes = np.asarray(made.unsigned_codes())
    grams = borrowed_grams(rows, known)
    ties = 0
    for i in range(E):
        knobs = {"how": how, "clip": config.clip}
        args = (np.asarray(w[i]), grams[i], Format(4, False, "bfloat16"), 16)
        judged = oracle.quantize(*args, follow=codes[i].astype(int), **knobs)
        ties += problems.count_ties(codes[i], judged.codes, judged.margins, most=2)
    assert ties <= 2
    assert not np.asarray(report.group.failed).any()


def borrowed_grams(rows, known):
    """The rule in float64, an expert at a time."""
    grams = [x.T.astype(np.float64) @ x for x in rows]
    mean = sum(grams) / sum(map(len, rows))
    out = []
    for x, gram in zip(rows, grams, strict=True):
        missing = max(known.min_tokens - len(x), 0)
        power = np.trace(gram) / K / max(len(x), 1)
        out.append(gram + missing * (mean if known.prior == "layer" else power * np.eye(K)))
    return out


def test_an_expert_does_not_see_the_others():
    rows, w = rows_of((300, 200, 500, 150)), (weights(), weights(8))
    stats = stats_of(rows)
    made, report = round_experts(w, stats, SPEC, GPTQ(), Experts("layer"))
    np.testing.assert_array_equal(report.borrowed, 0)
    np.testing.assert_array_equal(report.tokens, [300, 200, 500, 150])
    for i in range(E):
        alone = round_group([a[i] for a in w], jax.tree.map(lambda a: a[i], stats), SPEC, GPTQ())  # noqa: B023
        for stack, one in zip(made, alone.qtensors, strict=True):
            differ = np.asarray(stack.unsigned_codes()[i]) != np.asarray(one.unsigned_codes())
            assert differ.mean() < 0.01  # products of stacks add up in another order
        np.testing.assert_allclose(
            report.group.output_error[i], alone.report.output_error, rtol=1e-3
        )


def test_waiting_changes_nothing():
    stats, w = stats_of(rows_of((99, 0, 77, 40, 64))), weights(count=5)
    together, _ = round_experts([w], stats, SPEC, GPTQ(), Experts("layer"))
    for size in (1, 2, 3):
        some, _ = round_experts([w], stats, SPEC, GPTQ(), Experts("layer", at_a_time=size))
        same = np.asarray(some[0].codes) == np.asarray(together[0].codes)
        assert same.mean() > 0.99


def test_an_expert_without_tokens_is_rounded_to_nearest_or_on_the_layers():
    rows, w = rows_of((0, 400, 400, 400)), weights()
    stats = stats_of(rows)
    (white,), report = round_experts([w], stats, SPEC, GPTQ(), Experts("white"))
    (nearest,), _ = round_experts([w], stats, SPEC, RTN(), NONE)
    np.testing.assert_array_equal(white.codes[0], nearest.codes[0])
    assert (np.asarray(white.codes[1]) != np.asarray(nearest.codes[1])).any()
    np.testing.assert_array_equal(report.tokens, [0, 400, 400, 400])
    np.testing.assert_array_equal(report.borrowed, [4 * K, 0, 0, 0])
    (layer,), _ = round_experts([w], stats, SPEC, GPTQ(), Experts("layer"))
    assert (np.asarray(layer.codes[0]) != np.asarray(nearest.codes[0])).any()


def test_nobody_saw_anything():
    (made,), report = round_experts([weights()], stats_of(rows_of((0,) * E)), SPEC, GPTQ(), NONE)
    (nearest,), _ = round_experts([weights()], None, SPEC, RTN(), NONE)
    np.testing.assert_array_equal(made.codes, nearest.codes)
    np.testing.assert_array_equal(report.tokens, 0)


@pytest.mark.parametrize("prior", ["layer", "white"])
def test_who_has_enough_keeps_every_bit(prior):
    stats = stats_of(rows_of((10, 128, 127, 400)))
    lent, borrowed = experts.borrow(stats, Experts(prior))
    np.testing.assert_array_equal(borrowed, [118, 0, 1, 0])
    for before, after in zip(stats, lent, strict=True):
        np.testing.assert_array_equal(before[1::2], after[1::2])
    assert (np.asarray(lent.gram[0]) != np.asarray(stats.gram[0])).any()
    np.testing.assert_array_equal(lent.count, stats.count)


def test_borrowing_is_better_than_few_tokens_of_its_own():
    """Held-out tokens of an expert that saw as many tokens as it has inputs."""
    rng = np.random.default_rng(3)
    shared = np.eye(K) + 0.6 * rng.standard_normal((K, K)) / K**0.5
    own = [shared + 0.3 * rng.standard_normal((K, K)) / K**0.5 for _ in range(8)]
    draw = [lambda n, m=m: (rng.standard_normal((n, K)) @ m).astype(np.float32) for m in own]
    stats = stats_of([draw[0](K), *(d(1000) for d in draw[1:])])
    w, unseen = weights(64, 8), draw[0](2000)
    errors = {}
    for name, method, known in (
        ("nearest", RTN(), NONE),
        ("own", GPTQ(), NONE),
        ("white", GPTQ(), Experts("white")),
        ("layer", GPTQ(), Experts("layer")),
    ):
        lent, _ = experts.borrow(stats, known)
        (made,), _ = round_experts([w], lent, QuantSpec("int3", 16), method, NONE)
        difference = np.asarray(made.dequantize()[0] - w[0])
        errors[name] = np.linalg.norm(unseen @ difference)
    assert errors["layer"] < 0.97 * errors["nearest"] < errors["nearest"] < errors["own"]
    assert errors["layer"] < errors["white"] < 1.01 * errors["nearest"]


@pytest.mark.parametrize("tile", [1, 16, 256])
def test_routed_rows_are_counted_for_their_expert(tile):
    rng = np.random.default_rng(5)
    rows, expert = problems.inputs(K, 90), rng.integers(-1, E + 1, 90)
    expert[expert == 2] = 1  # nobody goes to the third
    add = jax.jit(experts.update_routed, static_argnames="tile")
    stats = add(experts.init(E, K), jnp.asarray(rows), jnp.asarray(expert, jnp.int32), tile=tile)
    stats = experts.finish(stats)
    for i in range(E):
        mine = rows[expert == i].astype(np.float64)
        assert stats.count[i] == len(mine)
        np.testing.assert_allclose(stats.gram[i], mine.T @ mine, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(stats.abs_sum[i], np.abs(mine).sum(axis=0), rtol=1e-5)
        np.testing.assert_array_equal(stats.abs_max[i], np.abs(mine).max(axis=0, initial=0))


def test_a_mask_says_which_places_hold_a_token():
    x = np.asarray(problems.inputs(K, 5 * E)).reshape(E, 5, K)
    mask = np.arange(5)[None] < np.array([[5], [0], [2], [3]])
    stats = experts.update(experts.init(E, K), jnp.asarray(x), jnp.asarray(mask))
    one = statistics.update(statistics.init(K), jnp.asarray(x[2]), jnp.asarray(mask[2]))
    np.testing.assert_array_equal(stats.count, [5, 0, 2, 3])
    np.testing.assert_allclose(np.triu(stats.gram[2]), np.triu(one.gram), rtol=1e-6)


def test_products_of_experts():
    x, w = jnp.asarray(problems.inputs(K, E * 6).reshape(E, 2, 3, K)), weights()
    expected = np.einsum("eabk,ekn->eabn", *(np.asarray(a, np.float64) for a in (x, w)))
    assert problems.relative_error(expert_matmul(x, w), expected) < 1e-6
    (made,), _ = round_experts([w], None, SPEC, RTN(), NONE)
    rounded = np.asarray(made.dequantize(), np.float64)
    expected = np.einsum("eabk,ekn->eabn", np.asarray(x, np.float64), rounded)
    assert problems.relative_error(expert_matmul(x, made), expected) < 1e-6


@pytest.fixture(scope="module")
def model():
    """(parameters, calibration batches [T, D])."""
    batches = jnp.asarray(problems.inputs(moe.WIDTH, 600).reshape(3, 200, moe.WIDTH))
    params = jax.jit(moe.MoE().init)(jax.random.key(0), batches[0])["params"]
    return params, batches


def test_a_flax_model_from_calibration_to_inference(model):
    params, batches = model
    stats = jq.collect(moe.MoE(), params, batches, experts="gate|up|down")
    assert set(stats) == {"router", "gate", "up", "down"}
    chosen = np.concatenate([moe.route(b @ params["router"]["kernel"])[1] for b in batches])
    tokens = np.bincount(chosen.reshape(-1), minlength=moe.EXPERTS)
    for linear in ("gate", "up", "down"):
        np.testing.assert_array_equal(stats[linear].count, tokens)
    recipe = (Rule("router", None, None), Rule(".*", QuantSpec("int3", 16), GPTQ()))
    reports = {}
    knobs = {"groups": GROUPS, "experts": STACKS}
    small = quantize(params, recipe, stats, **knobs, on_group=reports.__setitem__)
    assert list(reports) == [("gate", "up"), ("down",)]
    np.testing.assert_array_equal(reports["gate", "up"].tokens, tokens)
    np.testing.assert_array_equal(reports["down",].borrowed, np.maximum(4 * 32 - tokens, 0))
    assert small["gate"]["kernel"].shape == (moe.EXPERTS, moe.WIDTH, moe.INNER)
    assert small["router"]["kernel"] is params["router"]["kernel"]
    nearest = quantize(params, (recipe[0], Rule(".*", QuantSpec("int3", 16))), **knobs)
    wanted, got, plain = (
        moe.MoE().apply({"params": p}, batches[1]) for p in (params, small, nearest)
    )
    assert problems.relative_error(got, wanted) < 0.9 * problems.relative_error(plain, wanted) < 0.3


def test_a_mask_of_the_models_own_serves_as_well(model):
    params, batches = model
    found = [
        jq.collect(moe.MoE(pass_mask=p), params, batches[:1], experts="gate|up|down")
        for p in (False, True)
    ]
    for linear in ("gate", "down"):
        for a, b in zip(*(stats[linear] for stats in found), strict=True):
            np.testing.assert_array_equal(a, b)


def test_stacks_are_written_and_read(model, tmp_path):
    params, _ = model
    small = quantize(params, uniform(SPEC, RTN()), experts={"gate|up|down": NONE})
    part = save_part(tmp_path / "part", "moe", small)
    again = part_tree("moe", part, read_part(tmp_path / "part", "moe", part, verify=True))
    assert_same(again, small)


def test_refusals(model):
    params, batches = model
    recipe = uniform(SPEC, GPTQ())
    stats = jq.collect(moe.MoE(), params, batches[:1], experts="gate|up|down")
    with pytest.raises(SpecError, match=r"experts 'nothing' match no kernel; there are .*gate"):
        quantize(params, recipe, stats, experts={"nothing": NONE})
    with pytest.raises(SpecError, match=r"router/kernel: experts' kernels are \[E, K, N\]"):
        quantize(params, recipe, stats, experts={".*": NONE})
    awq = (Rule("down", SPEC, AWQ()), *recipe)
    with pytest.raises(SpecError, match="down: AWQ scales an input that all experts share"):
        quantize(params, awq, stats, experts={"down": NONE}, groups=GROUPS[1:])
    with pytest.raises(SpecError, match="group 'in': gate, up read the same input, and `experts`"):
        quantize(params, recipe, stats, experts={"up": NONE, "gate": Experts()}, groups=GROUPS)
    gate = (Rule("gate", SPEC, GPTQ()),)
    with pytest.raises(CalibrationError, match="gate: its method learns from calibration inputs"):
        quantize(params, gate, {}, experts=STACKS)
    with pytest.raises(CalibrationError, match=r"gate: statistics of 32 inputs, but .* \(4, 16\)"):
        quantize(params, gate, {"gate": stats["down"]}, experts=STACKS)
    gram = stats["gate"].gram.at[1, 0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteError, match="gate: the statistics have NaN"):
        quantize(params, gate, {"gate": stats["gate"]._replace(gram=gram)}, experts=STACKS)


@pytest.mark.parametrize(
    "options", [{"prior": "own"}, {"min_tokens": -1}, {"at_a_time": 0}], ids=str
)
def test_options_without_a_meaning(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Experts(**options)


def test_stacks_that_nobody_mentions_are_left_alone(model):
    params, batches = model
    stats = jq.collect(moe.MoE(), params, batches[:1])
    assert set(stats) == {"router"}
    small = quantize(params, (Rule("router", QuantSpec("int8", -1), GPTQ()),), stats)
    assert small["gate"]["kernel"] is params["gate"]["kernel"]
