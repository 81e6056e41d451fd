"""GPTQ against the textbook's form, code by code."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.methods import gptq
from jq.methods.gptq import GPTQ, gptq_quantize
from jq.methods.rtn import rtn_quantize
from jq.spec import FP8, QuantSpec
from tests.jq import problems
from tests.oracles import gptq as oracle
from tests.oracles.formats import format_of


def quantize(w, gram, spec, config):
    """`gptq_quantize` of NumPy arrays."""
    return gptq_quantize(jnp.asarray(w), jnp.asarray(gram), spec, config)


def how_of(config: GPTQ) -> str:
    return "desc_act" if config.desc_act else "gar" if config.act_group_aware else "plain"


def solve_oracle(w, gram, spec, config, damp=None, follow=None):
    shared = {"tensor": w.shape[1], "block": spec.group_size}.get(spec.granularity, 1)
    return oracle.quantize(
        w,
        gram,
        format_of(spec),
        spec.group_size,
        damp=config.damp_percent if damp is None else damp,
        how=how_of(config),
        static_groups=config.static_groups,
        clip=config.clip,
        shared=shared,
        follow=follow,
    )


def check(w, gram, spec, config, most=0):
    """Judge every code given the candidate's own past; then scales, order and loss.

    Returns how many ties fell to the other side.  Without any, the codes are also those of the
    oracle left to itself.
    """
    solution, info = quantize(w, gram, spec, config)
    assert not info.failed
    follow = problems.code_bytes(solution.codes)
    w = np.asarray(jnp.asarray(w, jnp.float32))
    expected = solve_oracle(w, gram, spec, config, float(info.damp), follow)
    ties = problems.count_ties(solution.codes, expected.codes, expected.margins, most)
    # Scales that storage rounds are equal to the bit; float32 ones to the last few.
    exact = spec.scale_dtype != "float32"
    np.testing.assert_allclose(solution.scale, expected.scale, rtol=0 if exact else 5e-6)
    np.testing.assert_array_equal(solution.zero, expected.zero)
    assert (solution.order is None) == (expected.order is None)
    if expected.order is not None:
        np.testing.assert_array_equal(solution.order, expected.order)
    assert info.loss == pytest.approx(expected.loss, rel=2e-4)
    assert problems.relative_error(solution.dequantize(spec), expected.weight) < 1e-6
    if ties == 0:
        alone = solve_oracle(w, gram, spec, config, float(info.damp))
        np.testing.assert_array_equal(follow, alone.codes)
    return solution, info


def some_of(all_of_them, fast):
    """Every combination; those that are not in `fast` (a compilation each) are marked slow."""
    assert set(fast) <= set(all_of_them)
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in all_of_them]


FORMATS = [
    *[(2, 16, True), (2, -1, False), (3, 16, True), (3, 32, False)],
    *[(4, 16, True), (4, 64, False), (8, 32, True), (8, -1, False)],
]


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    some_of(list(itertools.product((2, 3, 4, 8), (16, 32, 64, -1), (True, False))), FORMATS),
)
def test_codes_equal_the_textbooks(bits, group_size, symmetric):
    spec = QuantSpec(f"int{bits}", group_size, symmetric)
    for seed in range(3):
        check(problems.weights(64, 12, seed), problems.gram(64, seed=seed + 50), spec, GPTQ())


ORDERS = {
    "desc_act": GPTQ(desc_act=True),
    "static_groups": GPTQ(desc_act=True, static_groups=True),
    "gar": GPTQ(act_group_aware=True),
}


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize(("group_size", "symmetric"), [(16, True), (-1, False)])
def test_orders(how, group_size, symmetric):
    spec = QuantSpec("int3", group_size, symmetric)
    for seed in range(3):
        w, gram = problems.weights(64, 12, seed), problems.gram(64, seed=seed + 60)
        check(w, gram, spec, ORDERS[how])


CLIPPED = list(itertools.product(("mse", "output"), ("plain", *ORDERS), (True, False)))
FAST_CLIPPED = [
    *[("mse", "plain", True), ("output", "desc_act", False)],
    *[("mse", "static_groups", False), ("output", "static_groups", True)],
]


@pytest.mark.parametrize(("clip", "how", "symmetric"), some_of(CLIPPED, FAST_CLIPPED))
def test_clipping(clip, how, symmetric):
    spec = QuantSpec("int3", 16, symmetric)
    config = dataclasses.replace(ORDERS.get(how, GPTQ()), clip=clip)
    w, gram = problems.weights(64, 12, 4), problems.gram(64, seed=5)
    solution, _ = check(w, gram, spec, config)
    unclipped = solve_oracle(w, gram, spec, dataclasses.replace(config, clip="none"))
    assert np.mean(np.asarray(solution.scale) < 0.97 * unclipped.scale) > 0.1


@pytest.mark.parametrize("block_size", [1, 20, 96])
def test_block_size_changes_no_code(block_size):
    w, gram = problems.weights(96, 12, 6), problems.gram(96, seed=7)
    spec = QuantSpec("int4", 48)  # larger than some blocks, no multiple of others
    whole, _ = quantize(w, gram, spec, GPTQ())
    solution, _ = check(w, gram, spec, GPTQ(block_size=block_size))
    np.testing.assert_array_equal(solution.codes, whole.codes)
    np.testing.assert_array_equal(solution.scale, whole.scale)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("panel", [16, 48])
def test_earlier_errors_are_summed_panel_by_panel(panel, group_size, monkeypatch):
    monkeypatch.setattr(gptq, "PANEL", panel)
    gptq.gptq_solve.clear_cache()
    w, gram = problems.weights(96, 12), problems.gram(96)
    check(w, gram, QuantSpec("int4", group_size), GPTQ(block_size=16))
    gptq.gptq_solve.clear_cache()


@pytest.mark.parametrize("done", [0, 1, 32, 33, 95, 96])
def test_rows_that_are_not_rounded_yet_pull_nothing(done, monkeypatch):
    monkeypatch.setattr(gptq, "PANEL", 32)
    u, errors = problems.weights(96, 5), problems.weights(96, 12, 1)
    expected = u[:done].T.astype(np.float64) @ errors[:done]
    # What stands in the last panel is multiplied, and zero.
    errors[done:] = np.nan
    errors[done : -(-done // 32) * 32] = 0
    found = gptq._pull(jnp.asarray(u), jnp.asarray(errors), jnp.int32(done))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [37, 140])
def test_sizes_that_no_block_divides(k):
    check(problems.weights(k, 9, k), problems.gram(k, seed=k), QuantSpec("int4", -1), GPTQ())


def test_narrow_weights_are_solved_in_float32():
    w = jnp.asarray(problems.weights(64, 12, 8), jnp.bfloat16)
    gram, spec = problems.gram(64, seed=9), QuantSpec("int4", 16)
    solution, _ = check(w, gram, spec, GPTQ())
    wide, _ = quantize(w.astype(jnp.float32), gram, spec, GPTQ())
    np.testing.assert_array_equal(solution.codes, wide.codes)


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_float32_scales(bits):
    # With an unrounded symmetric scale the lowest weight of a group is exactly half a step from
    # the grid's end: one tie for each such group, and no other.
    spec = QuantSpec(f"int{bits}", -1, scale_dtype="float32")
    check(problems.weights(64, 12, 10), problems.gram(64, seed=11), spec, GPTQ(), most=12)


@pytest.mark.parametrize("granularity", [pytest.param("channel", marks=pytest.mark.slow), "block"])
def test_float8(granularity):
    spec = QuantSpec(FP8, 16, granularity=granularity)
    check(problems.weights(64, 16, 12), problems.gram(64, seed=13), spec, GPTQ())


def test_one_scale_for_the_whole_tensor():
    spec = QuantSpec("int8", granularity="tensor")
    check(problems.weights(64, 12, 14), problems.gram(64, seed=15), spec, GPTQ(desc_act=True))


@pytest.mark.slow
def test_a_larger_problem():
    w, gram = problems.weights(384, 64, 16), problems.gram(384, seed=17)
    for config in (GPTQ(), GPTQ(desc_act=True), GPTQ(act_group_aware=True)):
        check(w, gram, QuantSpec("int4", 128), config, most=3)


def test_a_disconnected_hessian_is_noticed():
    """With the identity for statistics GPTQ is RTN, and no oracle test passes."""
    w, gram = problems.weights(64, 12), problems.gram(64)
    spec = QuantSpec("int4", 16)
    plain = rtn_quantize(w, spec)
    without, _ = quantize(w, np.eye(64, dtype=np.float32), spec, GPTQ())
    np.testing.assert_array_equal(without.codes, plain.codes)
    np.testing.assert_array_equal(without.scale, plain.scale)
    solution, _ = quantize(w, gram, spec, GPTQ())
    assert np.mean(np.asarray(solution.codes) != np.asarray(plain.codes)) > 0.2
    follow = problems.code_bytes(without.codes)
    expected = solve_oracle(w, gram, spec, GPTQ(), follow=follow)
    with pytest.raises(AssertionError, match="away from the rounding boundary"):
        problems.count_ties(without.codes, expected.codes, expected.margins)


def test_a_column_index_off_by_one_is_noticed():
    """Statistics of neighbouring inputs swapped: still better than RTN, and still refused."""
    w, gram = problems.weights(64, 12), problems.gram(64)
    spec = QuantSpec("int4", 16)
    shifted, _ = quantize(w, np.roll(gram, 1, (0, 1)), spec, GPTQ())
    expected = solve_oracle(w, gram, spec, GPTQ(), follow=problems.code_bytes(shifted.codes))
    with pytest.raises(AssertionError, match="away from the rounding boundary"):
        problems.count_ties(shifted.codes, expected.codes, expected.margins)


@pytest.mark.parametrize("config", [GPTQ(), *ORDERS.values()], ids=["plain", *ORDERS])
def test_output_error_beats_rounding(config):
    w, gram = problems.weights(64, 12, 18), problems.gram(64, seed=19)
    spec = QuantSpec("int3", 16)

    def output_error(solution):
        error = np.asarray(solution.dequantize(spec), np.float64) - w
        return np.einsum("kn,kj,jn->", error, gram.astype(np.float64), error)

    solution, _ = quantize(w, gram, spec, config)
    assert output_error(solution) < 0.7 * output_error(rtn_quantize(w, spec))


def test_the_scale_of_the_statistics_does_not_matter():
    """Sums and means over tokens give the same codes; the loss scales along."""
    w, gram = problems.weights(64, 12, 20), problems.gram(64, seed=21)
    spec = QuantSpec("int4", 16)
    solution, info = quantize(w, gram, spec, GPTQ())
    mean, mean_info = quantize(w, gram / np.float32(256), spec, GPTQ())
    np.testing.assert_array_equal(solution.codes, mean.codes)
    assert info.loss == pytest.approx(float(mean_info.loss) * 256, rel=1e-6)


def test_outputs_are_independent():
    w, gram = problems.weights(64, 12, 22), problems.gram(64, seed=23)
    spec, config = QuantSpec("int3", 16), ORDERS["gar"]
    whole, info = quantize(w, gram, spec, config)
    left, left_info = quantize(w[:, :6], gram, spec, config)
    right, right_info = quantize(w[:, 6:], gram, spec, config)
    np.testing.assert_array_equal(whole.codes, np.hstack([left.codes, right.codes]))
    np.testing.assert_array_equal(whole.columns(6, 12).scale, right.scale)
    assert info.loss == pytest.approx(float(left_info.loss + right_info.loss), rel=1e-5)


def test_experts_are_solved_side_by_side():
    """vmap over stacked weights and statistics gives what each gives alone."""
    w = np.stack([problems.weights(64, 12, s) for s in (1, 2, 3)])
    gram = np.stack([problems.gram(64, seed=s) for s in (4, 5, 6)])
    spec, config = QuantSpec("int3", 16), GPTQ(desc_act=True)
    many, info = jax.vmap(lambda w, g: quantize(w, g, spec, config))(w, gram)
    for expert in range(3):
        one, one_info = quantize(w[expert], gram[expert], spec, config)
        np.testing.assert_array_equal(many.codes[expert], one.codes)
        np.testing.assert_array_equal(many.order[expert], one.order)
        assert info.loss[expert] == pytest.approx(float(one_info.loss), rel=1e-4)


def test_the_oracle_is_equation_three():
    """The Cholesky factor of the inverse is what elimination leaves of its rows."""
    h = oracle.damped(problems.gram(24), 0.01)
    eliminated = oracle.inverse_factor_by_elimination(h)
    np.testing.assert_allclose(oracle.inverse_factor(h), eliminated, rtol=1e-9, atol=1e-12)
