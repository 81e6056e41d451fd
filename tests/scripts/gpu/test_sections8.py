"""The 8-bit sections' own code, run on the CPU on problems of tiny size (see `test_sections`)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import w8a8
from jq.pallas_kernels.config8 import Decode8Config, Prefill8Config
from jq.pallas_kernels.quantize_rows import quantize_rows_reference
from jq.pallas_kernels.weight8 import dequantize
from scripts.gpu import (
    benchmark8,
    candidates8,
    compile_only,
    correctness8,
    problems,
    problems8,
    products,
    products8,
    timing,
    tune,
    tune8,
)
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.goals import plausible
from scripts.gpu.problems8 import FP8, Problem8, on_host8

TINY = Problem8(5, 128, 64)
BLOCKS = Problem8(6, 256, 128, FP8, block=True)
pytestmark = pytest.mark.loose_promotion  # on the GPU machine they run under JAX's own rules


@pytest.fixture
def xla(monkeypatch):
    """The references in the kernels' place."""

    def product(x, x_scale, w, *, bias=None, out_dtype=jnp.bfloat16, config=None, **_):
        return w8a8.w8a8_reference(x, x_scale, w, bias=bias, out_dtype=out_dtype)

    for module in (correctness8, products8):
        monkeypatch.setattr(module, "w8a8", product)
        monkeypatch.setattr(module, "quantize_rows", quantize_rows_reference)
    return product


@pytest.mark.parametrize("section", [correctness8, benchmark8, tune8])
def test_items_are_json_with_keys_of_their_own(section):
    items = section.items({"done": []})
    keys = [item["key"] for item in items]
    assert len(set(keys)) == len(keys) > 100
    assert json.loads(json.dumps(items)) == items


def test_the_first_items_are_the_most_valuable():
    first = [(i["method"], i["key"].split()[3]) for i in benchmark8.items({})[:4]]
    assert first == [("kernel", "int8"), ("xla", "int8"), ("kernel", FP8), ("xla", FP8)]
    every = [i["problem8"] for i in benchmark8.items({}) if i["method"] == "kernel"]
    sizes = {(p["k"], p["n"], p["m"], p["dtype"], p["block"]) for p in every}
    formats = (("int8", False), (FP8, False), (FP8, True))
    shapes = [(*s, m) for s in problems.SHAPES for m in problems.ROWS]
    assert sizes == {(*s, *f) for s in shapes for f in formats}


def test_what_was_timed_in_bfloat16_is_not_timed_again():
    def of_bf16(facts):
        return [i["key"] for i in benchmark8.items(facts) if i["method"] == "bf16"]

    every = of_bf16({})
    left = of_bf16({"bf16_us": {"4096x14336 m16": 30.0}})
    assert len(every) == len(problems.SHAPES) * len(problems.ROWS) == len(left) + 1


def test_configs_survive_json():
    for config in (Decode8Config(split=2, pdl=True), Prefill8Config(multicast="w")):
        assert config_of(json.loads(json.dumps(config_json(config)))) == config
    assert config_of(None) is None


@pytest.mark.parametrize("m", [1, 64, 128, 4096])
@pytest.mark.parametrize("dtype", ["int8", FP8])
def test_candidates_are_valid_and_differ(m, dtype):
    found = candidates8.configs(Problem8(m, 4096, 14336, dtype))
    assert 3 <= len(found) == len(set(found)) <= 2 * candidates8.MOST + 1
    assert all(c.unsupported(dtype) is None for c in found if isinstance(c, Prefill8Config))
    assert any(isinstance(c, Decode8Config) for c in found) == (m <= 256)
    assert any(isinstance(c, Prefill8Config) for c in found) == (m > 32)


def test_every_value_of_every_field_is_tried():
    found = [config for _, config in candidates8.every_config()]
    decode = [c for c in found if isinstance(c, Decode8Config)]
    prefill = [c for c in found if isinstance(c, Prefill8Config)]
    assert {c.split for c in decode} == {1, 2, 4, 8}
    assert {c.warpgroups for c in decode} == {1, 2, 3, 4}
    assert {c.slices for c in decode} == {1, 2, 3, 4}
    assert {c.multicast for c in prefill} == {None, "x", "w"}
    assert {(c.warpgroups, c.block_n) for c in prefill} >= {(1, 64), (2, 256), (3, 128)}


@pytest.mark.parametrize("problem", [TINY, BLOCKS, dataclasses.replace(TINY, bias=True)])
def test_correct_results_pass(xla, problem):
    host = on_host8(problem)
    assert 0.5 < np.sqrt(np.mean(host.expected**2)) < 2.5
    result = correctness8.compare8(problem, host, None)
    assert result["ok"], result
    json.dumps(result)


def test_wrong_results_do_not(xla, monkeypatch):
    host = on_host8(TINY)
    monkeypatch.setattr(
        correctness8, "w8a8", lambda x, s, w, **more: xla(x, s, w, **more) * jnp.bfloat16(1.004)
    )
    assert not correctness8.compare8(TINY, host, None)["ok"]


def test_quantization_is_compared(xla, monkeypatch):
    assert correctness8.quantized(3, 256, FP8, 128) == {
        "ok": True,
        "other_codes": 0,
        "other_scales": 0,
        "error": 0.0,
    }

    assert correctness8.quantized(3, 256, "int8", None, True)["ok"]

    def coarse(x, dtype, *, group=None, norm=None):
        codes, scale = quantize_rows_reference(x, dtype, group=group, norm=norm)
        return codes, 1.02 * scale

    monkeypatch.setattr(correctness8, "quantize_rows", coarse)
    assert not correctness8.quantized(3, 256, "int8", None)["ok"]
    assert not correctness8.quantized(3, 256, "int8", None, True)["ok"]


@pytest.mark.parametrize("method", products8.METHODS)
def test_products_are_timed_with_different_weights(xla, method, monkeypatch):
    monkeypatch.setattr(timing, "_WALL_S", 1e-3)
    monkeypatch.setattr(products, "_COLD_BYTES", 3 * BLOCKS.k * BLOCKS.n)
    program = products8.build(BLOCKS, method)
    triples = products8.arguments(BLOCKS, method)
    assert len(triples) == 3
    told = benchmark8.timed8(BLOCKS, method, program, {"timer": "wall"})
    assert (told["k"], told["n"], told["m"], told["method"]) == (256, 128, 6, method)
    assert (told["dtype"], told["block"]) == (FP8, True)
    assert plausible(told), told["rms"]
    json.dumps(told)


def test_methods_agree():
    """Of `scaled_matmul`'s way to take scales, and XLA's."""
    x, x_scale, w = problems8.device_problem8(BLOCKS, 0)
    wide = np.asarray(x_scale, np.float64).repeat(128, axis=1)
    exact = (np.asarray(x, np.float64) * wide) @ np.asarray(dequantize(w), np.float64)
    for method in ("xla", "scaled_matmul"):
        y = np.asarray(products8.product(BLOCKS, method)(x, x_scale, w), np.float64)
        assert np.linalg.norm(y - exact) < 4e-3 * np.linalg.norm(exact), method


def test_a_benchmark_item_and_a_candidate_run(xla, monkeypatch):
    monkeypatch.setattr(timing, "_WALL_S", 1e-3)
    monkeypatch.setattr(products, "_COLD_BYTES", 1)
    monkeypatch.setattr(benchmark8, "_ahead", None)
    item = problems8.to_item8(TINY, "kernel ", method="kernel")
    monkeypatch.setattr(benchmark8, "items", lambda facts: [item])
    assert benchmark8.run(item, {"done": [], "timer": "wall"})["us"] >= 0
    tried = problems8.to_item8(TINY, "x ", config=config_json(Decode8Config()))
    monkeypatch.setattr(tune8, "items", lambda facts: [tried])
    monkeypatch.setattr(tune8, "_ahead", None)
    result = tune8.run(tried, {"timer": "wall"})
    assert list(tune.best([result])) == [TINY.key]


@pytest.mark.parametrize("problem", [TINY, dataclasses.replace(BLOCKS, bias=True)])
def test_without_a_gpu_variants_are_lowered(problem):
    result = compile_only.run(problems8.to_item8(problem), {})
    assert result["level"] in ("lowered", "machine code")
    assert result["kernel"]


def test_a_device_problem_is_as_large_as_the_hosts():
    x, x_scale, w = jax.eval_shape(lambda: problems8.device_problem8(BLOCKS, 1))
    host = on_host8(BLOCKS)
    assert (x.shape, x_scale.shape) == (host.x.shape, host.x_scale.shape)
    assert w.shape == host.codes.shape
    assert BLOCKS.moved_bytes() == 134 * 256 + 4 * (2 + 6 * 2) + 2 * 6 * 128
