"""What the driver learns from: statistics of every group against a plain float64 forward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.calib import driver, one_device
from jq.group import round_group
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders, toy
from tests.jq import problems
from tests.oracles import blockwise, qmatmul

INT3 = QuantSpec("int3", 16)
SEQUENTIAL, PARALLEL = GPTQ(), GPTQ(true_sequential=False)


def mask_of_both_sides() -> np.ndarray:
    """Padding on the right, on the left, and none."""
    mask = np.ones((decoders.SAMPLES, decoders.LENGTH), bool)
    mask[0, -5:] = mask[1, :3] = mask[3, -1:] = False
    return mask


def recorded(recipe: Any, *, masked: bool = False) -> tuple[Any, list, list]:
    """(quantized params, the statistics of every group in order, reports).

    Weights are rounded to nearest, which compiles faster than GPTQ; its statistics are collected.
    """
    seen = []

    def record(weights, stats, spec, rounding, *, scale=None):
        assert isinstance(rounding, GPTQ)
        seen.append(jax.tree.map(np.asarray, stats))
        return round_group(weights, stats, spec, RTN(), scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_device, "round_group", record)
        model, params, _, _ = decoders.make()
        mask = mask_of_both_sides() if masked else None
        out, reports = driver.quantize_model(model, params, recipe, decoders.tokens(), mask=mask)
    return out, seen, list(reports)


def expected_inputs(params: Any, sequential: bool, masked: bool) -> list[np.ndarray]:
    """[tokens, K] of every group of every block, given what the driver made of the weights."""
    _, _, raw, weights = decoders.make()
    mask = mask_of_both_sides() if masked else np.ones_like(mask_of_both_sides())
    rows = [row[keep] for row, keep in zip(decoders.tokens(), mask, strict=True)]
    stream = [blockwise.embed(weights, row) for row in rows]
    found = decoders.qtensors(params)
    out = []
    for index in range(2):
        layer = blockwise.layer_of(weights, index)
        before = blockwise.inputs(raw, layer, index, stream)
        for group, names in blockwise.GROUPS.items():
            seen = blockwise.inputs(raw, layer, index, stream) if sequential else before
            out.append(np.concatenate(seen[group]))
            for name in names:
                path = f"layers_{index}/{decoders.PATHS[name]}"
                layer = layer | {f"{name}.weight": qmatmul.weight(found[path]).T}
        stream = blockwise.inputs(raw, layer, index, stream)["out"]
    return out


@pytest.mark.usefixtures("fast_compiles")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_statistics_equal_a_forward_with_quantized_predecessors(method, masked):
    params, seen, reports = recorded(uniform(INT3, method), masked=masked)
    expected = expected_inputs(params, method.true_sequential, masked)
    other = expected_inputs(params, not method.true_sequential, masked)
    fed = int(mask_of_both_sides().sum()) if masked else decoders.SAMPLES * decoders.LENGTH
    assert len(seen) == len(expected) == 8
    for stats, x in zip(seen, expected, strict=True):
        assert len(x) == fed == stats.count
        assert problems.relative_error(stats.gram, x.T @ x) < 5e-6
        np.testing.assert_array_equal(stats.gram, stats.gram.T)
        assert problems.relative_error(stats.abs_sum, np.abs(x).sum(0)) < 5e-6
        assert problems.relative_error(stats.abs_max, np.abs(x).max(0)) < 5e-6
    assert [r.tokens for block in reports for r in block.linears] == [fed] * 14
    # The other order would have been noticed, in every group but each block's first.
    for i in (1, 2, 3, 5, 6, 7):
        gram = other[i].T @ other[i]
        assert problems.relative_error(seen[i].gram, gram) > 1e-3


RECIPES = {
    "gptq": uniform(QuantSpec("int4", 16, False), GPTQ(desc_act=True)),
    "8-bit": (
        Rule("attention", w8a8(activation="tensor"), GPTQ()),
        Rule("mlp", w8a8("float8_e4m3fn"), GPTQ()),
    ),
}


def offloaded(batch_size: int | None) -> dict[str, Any]:
    """Options of a run that keeps its hidden states on the host; None leaves them on the device."""
    return {} if batch_size is None else {"offload": True, "batch_size": batch_size}


def test_offloading_changes_no_code_of_a_small_model():
    """Compiled with all optimizations, as users run it; 4 does not divide the samples."""
    params = toy.make_params()
    recipe = uniform(QuantSpec("int4", 8, False), GPTQ())
    made = [
        driver.quantize_model(toy.Toy(), params, recipe, toy.tokens(), **offloaded(size))[0]
        for size in (None, 1, 4)
    ]
    assert all(decoders.same(made[0], other) for other in made[1:])


@functools.cache
def in_batches(name: str, batch_size: int | None) -> tuple[Any, Any]:
    model, params, _, _ = decoders.make()
    return driver.quantize_model(
        model, params, RECIPES[name], decoders.tokens(), **offloaded(batch_size)
    )


# 3 does not divide the samples, and 100 is more than there are.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*[("gptq", b) for b in (1, 3, 100)], *[("8-bit", b) for b in (1, 2)]],
)
def test_offloading_changes_no_code(name, batch_size):
    """Compiled with all optimizations, as users run it."""
    (one, reports), (other, other_reports) = in_batches(name, None), in_batches(name, batch_size)
    assert decoders.same(one, other)
    for block, other_block in zip(reports, other_reports, strict=True):
        for left, right in zip(block.linears, other_block.linears, strict=True):
            assert left.output_error == pytest.approx(right.output_error, rel=1e-5)
            assert left.tokens == right.tokens


@pytest.mark.usefixtures("fast_compiles")
def test_offloaded_scales_are_those_of_the_device():
    """AWQ searches on a sample of the stream, wherever that is; with padding."""
    model, params, _, _ = decoders.make()
    recipe = uniform(INT3, AWQ(n_grid=3, rounding=RTN()))
    made = [
        driver.quantize_model(
            model, params, recipe, decoders.tokens(), mask=mask_of_both_sides(), **offloaded(size)
        )[0]
        for size in (None, 2)
    ]
    assert decoders.same(*made)


@pytest.mark.usefixtures("fast_compiles")
def test_a_second_run_changes_no_bit():
    first, seen, _ = recorded(uniform(INT3, SEQUENTIAL))
    second, seen_again, _ = recorded(uniform(INT3, SEQUENTIAL))
    assert decoders.same(first, second)
    jax.tree.map(np.testing.assert_array_equal, seen, seen_again)


@pytest.mark.usefixtures("fast_compiles")
def test_padding_tokens_may_be_anything():
    """Ids under the mask change nothing."""
    model, params, _, _ = decoders.make()
    mask, tokens = mask_of_both_sides(), decoders.tokens()
    other = np.where(mask, tokens, (tokens + 1) % decoders.VOCAB)
    recipe = uniform(w8a8(activation="tensor", static=True), RTN())
    made = [driver.quantize_model(model, params, recipe, t, mask=mask)[0] for t in (tokens, other)]
    assert decoders.same(*made)
    unmasked, _ = driver.quantize_model(model, params, recipe, other)
    assert not decoders.same(made[0], unmasked)


@pytest.mark.usefixtures("fast_compiles")
def test_the_first_block_reads_the_embedding():
    """Permuting the samples permutes nothing but the order of sums."""
    model, params, _, _ = decoders.make()
    recipe = uniform(w8a8(activation="tensor", static=True), RTN())
    tokens = decoders.tokens()
    left, _ = driver.quantize_model(model, params, recipe, tokens)
    right, _ = driver.quantize_model(model, params, recipe, jnp.asarray(tokens[::-1]))
    assert decoders.same(left, right)
