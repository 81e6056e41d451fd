"""Choosing a group's scale with the block around it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq import statistics
from jq.blockwise import LinearGroup
from jq.calib.scaling import choose_scale, sample
from jq.calib.stages import Stream, run_stage
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import AUTO_ALPHAS, SmoothQuant
from jq.scaling import scales_input
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders
from tests.oracles import blockwise, smoothquant

pytestmark = pytest.mark.usefixtures("fast_compiles")

NORM = LinearGroup("a", ("x",), "norm", "norm")
LINEAR = LinearGroup("b", ("x",), "other", "linear")
ALONE = LinearGroup("c", ("x",))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (AWQ(), (True, True, False)),
        (SmoothQuant(), (True, False, False)),
        (SmoothQuant(smooth="all"), (True, True, False)),
        (GPTQ(), (False, False, False)),
        (RTN(), (False, False, False)),
    ],
)
def test_which_methods_scale_which_groups(method, expected):
    assert tuple(scales_input(method, group) for group in (NORM, LINEAR, ALONE)) == expected


def test_a_sample_is_the_first_samples():
    x = jnp.arange(4.0 * 6 * 2).reshape(4, 6, 2)
    whole = Stream(x, {"r": x}, jnp.ones((4, 6), bool))
    for tokens, count in ((1, 1), (6, 1), (11, 1), (12, 2), (1000, 4)):
        part = sample(whole, tokens)
        np.testing.assert_array_equal(part.x, x[:count])
        np.testing.assert_array_equal(part.carry["r"], x[:count])
        assert part.mask.shape == (count, 6)
    assert sample(whole._replace(mask=None), 6).mask is None


def group_input(index, mask=None):
    """(model, its first block, stream and statistics of the input of group `index`)."""
    model, params, _, _ = decoders.make()
    stream = Stream(model.embed(params, decoders.tokens()), None, mask)
    stats = None
    for i in range(index + 1):
        stream, stats, _ = run_stage(
            *(model, None, i, params["layers_0"], stream), collect=i == index, batch_size=1
        )
    return model, params["layers_0"], stream, stats


def scale_of(index, method, spec, mask=None, specs=None):
    model, block, stream, stats = group_input(index, mask)
    count = len(model.linear_groups[index].linears)
    specs = (spec,) * count if specs is None else specs
    chosen = choose_scale(model, None, index, block, stream, stats, specs=specs, method=method)
    return np.asarray(chosen.scale), float(chosen.choice)


def oracle_inputs(group):
    _, _, raw, weights = decoders.make()
    layer = blockwise.layer_of(weights, 0)
    samples = [blockwise.embed(weights, row) for row in decoders.tokens()]
    x = np.concatenate(blockwise.inputs(raw, layer, 0, samples)[group])
    return x, [layer[f"{name}.weight"].T for name in blockwise.GROUPS[group]]


@pytest.mark.parametrize(("index", "group"), [(0, "qkv"), (3, "down")])
def test_alpha_auto_is_the_best_of_the_grid(index, group):
    spec = w8a8()
    scale, alpha = scale_of(index, SmoothQuant("auto", smooth="all"), spec)
    x, weights = oracle_inputs(group)
    scales = [np.ones(x.shape[1]), *(smoothquant.scale(a, x, weights) for a in AUTO_ALPHAS)]
    losses = [smoothquant.loss(x, weights, scale, spec) for scale in scales]
    # Losses of neighbours differ by less than single codes at boundaries make.
    picked = 0 if np.isnan(alpha) else 1 + AUTO_ALPHAS.index(round(alpha, 2))
    assert losses[picked] <= min(losses) * 1.02
    assert min(losses) < 0.98 * max(losses)
    np.testing.assert_allclose(scale, scales[picked], rtol=1e-5)


def test_heads_that_share_a_value_head_share_a_scale():
    _, _, raw, _ = decoders.make()
    heads, share = raw["num_attention_heads"], 2
    assert raw["num_key_value_heads"] * share == heads
    for method, spec in (
        (AWQ(search_scale=False), QuantSpec("int4", 16)),
        (SmoothQuant(0.5, smooth="all"), w8a8()),
    ):
        scale, _ = scale_of(1, method, spec)
        by_head = scale.reshape(-1, share, scale.size // heads)
        np.testing.assert_array_equal(by_head[:, 0], by_head[:, 1])
        assert len(np.unique(scale)) == scale.size // share


def test_no_scaling_where_nothing_can_be_won():
    """Eight bits in groups: the search still answers, with numbers in range."""
    scale, choice = scale_of(0, AWQ(n_grid=2), QuantSpec("int8", 16))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.isnan(choice) or 0 <= choice < 1


def test_linears_in_full_precision_have_no_say():
    spec = QuantSpec("int3", 16)
    method = AWQ(n_grid=4)
    all_three, _ = scale_of(0, method, spec)
    only_q, _ = scale_of(0, method, spec, specs=(spec, None, None))
    assert not np.allclose(all_three, only_q, rtol=1e-3)


def test_statistics_of_padding_do_not_matter():
    """Chosen on the masked tokens only, by both searches."""
    mask = np.ones((decoders.SAMPLES, decoders.LENGTH), bool)
    mask[:, -5:] = False
    for method, spec in ((AWQ(n_grid=4), QuantSpec("int3", 16)), (SmoothQuant("auto"), w8a8())):
        model, block, stream, stats = group_input(0, jnp.asarray(mask))
        loud = jnp.where(stream.mask[:, :, None], stream.x, jnp.float32(50))
        found = [
            choose_scale(model, None, 0, block, s, stats, specs=(spec,) * 3, method=method).scale
            for s in (stream, stream._replace(x=loud))
        ]
        np.testing.assert_array_equal(*found)
        assert not np.allclose(found[0], scale_of(0, method, spec)[0], rtol=1e-3)


def test_dead_and_huge_channels():
    model, block, stream, _ = group_input(0)
    x = stream.x.at[..., 3].set(0.0).at[..., 5].mul(1e4)
    stats = statistics.init(x.shape[-1])
    for one in x:
        stats = statistics.update(stats, one)
    stats = statistics.finish(stats)
    for method, spec in ((AWQ(n_grid=4), QuantSpec("int4", 16)), (SmoothQuant(0.8), w8a8())):
        scale = choose_scale(
            *(model, None, 0, block, stream._replace(x=x), stats), specs=(spec,) * 3, method=method
        ).scale
        assert np.isfinite(scale).all()
        assert (np.asarray(scale) > 0).all()
        assert scale[3] == 1
