"""Clocks that are made up tell what is divided by what; real ones, that it runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.bench import Device, measure_ceilings, measure_linears
from jq.bench.timing import time_calls
from jq.errors import ModelError
from jq.oneshot import quantize
from jq.presets import preset
from jq.recipe import uniform


def ticking(step=1.0):
    """A clock that moves on by `step` whenever it is read."""
    ticks = itertools.count()
    return lambda: step * next(ticks)


def test_samples_are_means_of_calls_in_a_row():
    now, calls = [0.0], []

    def call():
        now[0] += 10.0 if not calls else 0.25
        calls.append(now[0])

    first, latency = time_calls(call, samples=3, sample_seconds=2.0, clock=lambda: now[0])
    assert first == 10.0
    assert latency.seconds == (0.25,) * 3
    assert len(calls) == 1 + 1 + 3 * 8


def test_ceilings_are_work_over_time():
    found = measure_ceilings(("float32", "int8"), buffer_bytes=1 << 16, largest=32, clock=ticking())
    assert found.read_bytes_per_second == 1 << 16
    assert found.copy_bytes_per_second == found.bytes_per_second == 2 << 16
    assert found.products_per_second == {"float32": 2 * 32**3, "int8": 2 * 32**3}
    assert found.to_dict()["bytes_per_second"] == 2 << 16


def test_matrices_grow_until_they_take_long_enough():
    found = measure_ceilings(("float32",), buffer_bytes=1 << 12, largest=512, clock=ticking(15e-3))
    assert found.rate("float32") == pytest.approx(2 * 512**3 / 15e-3)
    found = measure_ceilings(("float32",), buffer_bytes=1 << 12, largest=512, clock=ticking())
    assert found.rate("float32") == 2 * 256**3


@pytest.fixture(scope="module")
def params():
    def rtn(name, kernel, **options):
        recipe = uniform(*preset(name, **options))
        return quantize({"linear": {"kernel": kernel}}, recipe)["linear"]

    layers = {}
    for i in range(3):
        wide = np.full((32, 64), i + 1.0, np.float32)
        layers[f"layers_{i}"] = {
            "mlp": {
                "gate_proj": rtn("rtn", wide, group_size=16),
                "up_proj": rtn("rtn", wide, group_size=16),
                "down_proj": rtn("int8", wide.T),
            },
            "norm": {"scale": jnp.ones(32)},
        }
    return {
        "embed": {"embedding": jnp.ones((5, 32))},
        **layers,
        "lm_head": {"kernel": jnp.ones((32, 64))},
    }


def test_linears_of_equal_shape_and_format_are_one_line(params):
    seen = []
    found = measure_linears(
        params,
        dtype=jnp.float32,
        rows=(1, 4),
        samples=2,
        most=2,
        progress=lambda *step: seen.append(step),
        clock=ticking(),
    )
    lines = [(t.names, t.shape, t.format, t.count, t.measured, t.rows) for t in found]
    assert lines == [
        (("mlp/gate_proj", "mlp/up_proj"), (32, 64), "int4 g16 zp", 6, 2, 1),
        (("mlp/gate_proj", "mlp/up_proj"), (32, 64), "int4 g16 zp", 6, 2, 4),
        (("mlp/down_proj",), (64, 32), "int8 x int8", 3, 2, 1),
        (("mlp/down_proj",), (64, 32), "int8 x int8", 3, 2, 4),
        (("lm_head",), (32, 64), "float32", 1, 1, 1),
        (("lm_head",), (32, 64), "float32", 1, 1, 4),
    ]
    assert {t.latency.seconds for t in found[:4]} == {(0.5, 0.5)}  # two products in a second
    assert found[4].latency.seconds == (1.0, 1.0)
    assert {t.kernel for t in found} == {"reference"}
    assert found[2].work.operations == {"int8": 2.0 * 64 * 32}
    assert [step[:2] for step in seen] == [(i, 6) for i in range(7)]
    told = found[0].to_dict()
    assert (told["latency"]["p50"], told["shape"]) == (0.5, [32, 64])
    assert told["work"]["operations"] == {"float32": 2.0 * 32 * 64}


def test_every_product_is_computed(params, monkeypatch):
    from jq.bench import linears

    weights = [params[f"layers_{i}"]["mlp"]["up_proj"]["kernel"] for i in range(3)]
    outputs = linears._products(jnp.ones((2, 32)), weights)
    for i, y in enumerate(outputs):
        np.testing.assert_allclose(y, np.full((2, 64), 32.0 * (i + 1)), rtol=1e-2)
    text = jax.jit(linears._products).lower(jnp.ones((2, 32)), weights).compile().as_text()
    assert text.count(" dot(") + text.count("custom-call") >= 3  # none joined, none left out


@pytest.mark.parametrize("options", [{"rows": ()}, {"rows": (0,)}, {"samples": 0}, {"most": 0}])
def test_nothing_to_measure_is_refused(params, options):
    with pytest.raises(ModelError, match="at least 1 of each"):
        measure_linears(params, dtype=jnp.float32, **options)
    with pytest.raises(ModelError, match="0 kinds of linears"):
        measure_linears({"norm": {"scale": jnp.ones(3)}}, dtype=jnp.float32)


def test_the_device_says_that_it_is_a_cpu():
    assert Device.default().label == "cpu"
    assert Device("gpu", "NVIDIA H200", "0").label == "gpu (NVIDIA H200)"
