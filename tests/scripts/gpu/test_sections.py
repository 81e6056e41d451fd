"""The sections' own code, run on the CPU on problems of tiny size.

Here every product is XLA's: what these tests show is that the programs around the kernel work
before they meet a GPU.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.matmul import qmatmul
from jq.models import ModelConfig
from jq.pallas_kernels.config import DecodeConfig, PrefillConfig
from jq.pallas_kernels.weight import W4Weight, dequantize
from jq.prepare import prepare
from scripts.gpu import (
    ahead,
    benchmark,
    candidates,
    ceilings,
    compile_only,
    correctness,
    decode,
    environment,
    library,
    marlin,
    problems,
    products,
    refine,
    timing,
    tune,
)
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.goals import plausible
from scripts.gpu.problems import Problem, on_host

TINY = Problem(5, 128, 64, 32, symmetric=False)
pytestmark = pytest.mark.loose_promotion  # on the GPU machine they run under JAX's own rules


@pytest.fixture
def xla(monkeypatch):
    """The reference in the kernel's place."""
    from jq.pallas_kernels.w4a16 import w4a16_reference

    def product(x, w, *, config=None, interpret=False, compute_capability=(9, 0)):
        return w4a16_reference(x, w)

    monkeypatch.setattr(correctness, "w4a16", product)
    monkeypatch.setattr(products, "w4a16", product)
    return product


@pytest.mark.parametrize(
    "section", [environment, ceilings, correctness, benchmark, tune, decode, marlin, compile_only]
)
def test_items_are_json_with_keys_of_their_own(section):
    items = section.items({"done": []})
    keys = [item["key"] for item in items]
    assert len(set(keys)) == len(keys) >= 4
    assert json.loads(json.dumps(items)) == items


def test_the_first_items_are_the_most_valuable():
    assert correctness.items({})[0]["problem"]["k"] == 4096
    first = [(i["method"], i["problem"]["m"]) for i in benchmark.items({})[:4]]
    assert first == [("w4", 1), ("bf16", 1), ("w4", 16), ("bf16", 16)]
    every = {(p["k"], p["n"], p["m"]) for p in (i["problem"] for i in benchmark.items({}))}
    assert every == {(*shape, m) for shape in problems.SHAPES for m in problems.ROWS}
    assert {p.key for p in tune.problems()} == {Problem(m, k, n).key for k, n, m in every}


def test_every_format_is_checked():
    seen = {
        (p.dtype, p.group, p.symmetric)
        for p in (problems.of_item(i) for i in correctness.items({}) if "problem" in i)
    }
    assert len(seen) == 2 * 4 * 2


def test_configs_survive_json():
    for config in (DecodeConfig(split=2, pdl=True), PrefillConfig(multicast=True)):
        assert config_of(json.loads(json.dumps(config_json(config)))) == config
    assert config_of(None) is None


@pytest.mark.parametrize("m", problems.ROWS)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 8192)])
def test_candidates_are_valid_and_differ(m, shape):
    found = candidates.configs(Problem(m, *shape))
    assert 3 <= len(found) == len(set(found)) <= 1 + 2 * candidates.MOST
    for config in found:
        assert config.shared_bytes() < 227 * 1024
        refined = candidates.refinements(config)
        assert config not in refined
    few = [c for c in found if isinstance(c, DecodeConfig)]
    assert len(few) >= 5 if m <= 256 else not few
    assert any(isinstance(c, PrefillConfig) for c in found) == (m > 32)


def test_every_value_of_every_field_is_tried():
    found = [config for _, config in candidates.every_config()]
    splits = {c.split for c in found if isinstance(c, DecodeConfig)}
    multicast = {c.multicast for c in found if isinstance(c, PrefillConfig)}
    assert (splits, multicast) == ({1, 2, 4, 8}, {False, True})


def test_the_hosts_weight_is_the_devices(xla):
    host = on_host(TINY)
    assert host.zero is not None
    for row in (0, 31, 32, 127):
        for column in (0, 63):
            g = row // 32
            code, zero = int(host.codes[row, column]), int(host.zero[g, column])
            assert host.weight[row, column] == (code - zero) * float(host.scale[g, column])
    result = correctness.compare(TINY, host, None)
    assert result["ok"], result
    assert result["error"] < 3e-3
    assert 0.5 < np.sqrt(np.mean((host.x @ host.weight) ** 2)) < 2.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", [64, -1])
def test_correct_results_pass(xla, dtype, group):
    problem = dataclasses.replace(TINY, dtype=dtype, group=group, symmetric=True)
    assert correctness.compare(problem, on_host(problem), None)["ok"]


def test_wrong_results_do_not(xla, monkeypatch):
    host = on_host(TINY)
    good = host.x @ host.weight
    fine = [problems.rounded(good, "bfloat16")] * 5
    assert correctness.judge(fine, host, "bfloat16")["ok"]

    def verdict(change, run=0):
        runs = [r.copy() for r in fine]
        change(runs[run])
        result = correctness.judge(runs, host, "bfloat16")
        json.dumps(result)
        assert not result["ok"]
        return result

    def unwritten(y):
        y[2, 3] = np.nan

    def one_element(y):
        y[4, 60] += 1.0

    def biased(y):
        y *= 1.004

    assert verdict(unwritten)["unwritten"] == 1
    told = verdict(one_element)
    assert told["worst"] > 0.3
    assert told["wrong"] == 1 / good.size
    assert verdict(biased)["error"] > 3e-3
    assert verdict(one_element, run=3)["varying"] == 1
    monkeypatch.setattr(
        correctness, "w4a16", lambda x, w, **_: jnp.where(x[:, :1] > 0, xla(x, w), jnp.nan)
    )
    assert correctness.compare(TINY, host, None)["unwritten"] > 0


@pytest.mark.parametrize("use", library.USES)
def test_uses_of_the_library(use, monkeypatch):
    monkeypatch.setattr(library, "DEVICE", "sm_90")
    monkeypatch.setattr(library, "PROBLEM", Problem(8, 128, 128, 64, symmetric=False))
    result = library.run(use)
    assert result["ok"], result
    assert result["choice"]["kernel"] == "w4a16"


def test_a_device_that_is_not_served_is_an_error():
    with pytest.raises(AssertionError, match="CUDA"):
        library.run("product")


@pytest.mark.parametrize("method", products.METHODS)
def test_products_are_timed_with_different_weights(xla, method, monkeypatch):
    monkeypatch.setattr(timing, "_WALL_S", 1e-3)
    monkeypatch.setattr(products, "_COLD_BYTES", 3 * TINY.k * TINY.n // 2)
    program = products.build(TINY, method)
    pairs = products.arguments(TINY, method)
    assert len(pairs) == (2 if method == "bf16" else 3)
    assert not np.array_equal(np.asarray(pairs[0][0]), np.asarray(pairs[1][0]))
    told = benchmark.timed(TINY, method, program, {"timer": "wall"})
    assert told["us"] >= 0
    assert (told["k"], told["n"], told["m"], told["method"]) == (128, 64, 5, method)
    assert plausible(told) or method == "bf16"
    json.dumps(told)


def test_rotations_are_larger_than_the_cache():
    for shape in problems.SHAPES:
        for method in products.METHODS:
            p = Problem(16, *shape)
            size = p.k * p.n * (2 if method == "bf16" else 0.5) * products.rotations(p, method)
            assert size > 120e6
            assert products.rotations(dataclasses.replace(p, m=4096), method) <= 4


def test_a_benchmark_item_and_a_candidate_run(xla, monkeypatch):
    monkeypatch.setattr(timing, "_WALL_S", 1e-3)
    monkeypatch.setattr(products, "_COLD_BYTES", 1)
    monkeypatch.setattr(benchmark, "_ahead", None)
    item = {**problems.to_item(TINY, "w4 "), "method": "w4"}
    monkeypatch.setattr(benchmark, "items", lambda facts: [item])
    assert benchmark.run(item, {"done": [], "timer": "wall"})["us"] >= 0
    tried = tune.candidate(TINY, DecodeConfig())
    monkeypatch.setattr(tune, "items", lambda facts: [tried])
    monkeypatch.setattr(tune, "_ahead", None)
    result = tune.run(tried, {"timer": "wall"})
    facts = {"tuned": tune.best([result])}
    assert list(facts["tuned"]) == [TINY.key]
    monkeypatch.setattr(tune, "problems", lambda: [TINY])
    more = refine.items(facts)
    assert tried not in more
    monkeypatch.setattr(refine, "_ahead", None)
    assert refine.run(more[0], {**facts, "timer": "wall"})["config"]["pdl"] is True


def test_programs_are_compiled_ahead_and_once():
    built = []

    def build(key):
        built.append(key)
        if key == "b":
            raise ValueError("does not compile")
        return key.upper()

    programs = ahead.Ahead({k: lambda k=k: build(k) for k in "abc"}, threads=2)
    assert programs.get("a") == "A"
    with pytest.raises(ValueError, match="does not compile"):
        programs.get("b")
    assert programs.get("c") == "C"
    assert sorted(built) == ["a", "b", "c"]


def test_ceilings_on_a_small_scale(monkeypatch):
    monkeypatch.setattr(timing, "_WALL_S", 1e-3)
    assert ceilings.copy("wall", 1 << 16)["gbs"] > 0
    assert ceilings.read("wall", 1 << 16)["gbs"] > 0
    assert ceilings.matmul("wall", 512)["tflops"] > 0
    assert ceilings.launch("wall")["us"] > 0


@pytest.mark.parametrize(
    ("few", "more", "us"), [(2.0, 8.0, 6.0 / 4), (5.0, 3.0, 3.0 / 6)], ids=["quiet", "disturbed"]
)
def test_time_per_call_by_the_wall(monkeypatch, few, more, us):
    """Two calls, then six: their slope, or the mean of the six where that is none."""
    seconds = {1: 1.0, 2: few * 1e-6, 6: more * 1e-6}
    monkeypatch.setattr(timing, "_seconds", lambda program, args, calls: seconds[calls])
    assert timing.wall_us(None, []) == pytest.approx(us)


def test_times_of_kernels(monkeypatch):
    """The profiler's record of two calls with two kernels for each of two products."""
    calls = [
        [("dot", 0.004), ("scale", 0.001), ("dot", 0.006), ("scale", 0.001)],
        [("dot", 0.005), ("scale", 0.001), ("dot", 0.005), ("scale", 0.003)],
    ]
    from jax.experimental.mosaic.gpu import profiler

    def measured(f, *, aggregate, iterations):
        assert (aggregate, iterations) == (False, 7)
        return lambda *args: (f(*args), calls)

    monkeypatch.setattr(profiler, "measure", measured)
    monkeypatch.setattr(timing, "_WALL_S", 1e-4)
    told = timing.measure(jax.jit(lambda x: x + 1), [jnp.ones(3)], 2, "cupti", 7)
    assert told["timer"] == "cupti"
    assert told["us"] == pytest.approx((12 + 14) / 2 / 2)
    assert told["us_min"] == pytest.approx(6)
    assert told["kernels"]["dot"] == {"launches": 1.0, "us": pytest.approx(5.0)}
    assert list(told["kernels"]) == ["dot", "scale"]
    monkeypatch.setattr(profiler, "measure", lambda f, **_: lambda *args: (f(*args), None))
    told = timing.measure(jax.jit(lambda x: x + 1), [jnp.ones(3)], 2, "cupti")
    assert (told["timer"], "no kernel" in told["note"]) == ("wall", True)


def test_the_environment_of_a_cpu():
    assert environment.run({"key": "device"}, {})["platform"] == "cpu"
    assert environment.run({"key": "versions"}, {})["jax"] == jax.__version__
    assert environment.run({"key": "cupti"}, {}) == {"works": False}
    assert "text" in environment.run({"key": "nvidia-smi"}, {})


@pytest.fixture(scope="module")
def small():
    return ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )


@pytest.mark.parametrize("kind", ["dequantize", "bf16", "int8"])
def test_decoding_is_timed(small, kind, monkeypatch):
    monkeypatch.setattr(decode, "CAPACITY", 32)
    if kind == "int8":  # prepared for another device, it runs on the reference here
        monkeypatch.setattr(decode, "prepare", lambda value: prepare(value, "sm_90"))
    params = decode.parameters(small, kind)
    model = decode.Decoder(small, dtype=jnp.float32)
    told = decode.loop(model, params, 2, steps=3)
    assert told["finite"]
    assert told["tokens_per_s"] == pytest.approx(2e3 / told["step_ms"])
    assert told["peak_bytes"] > sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    json.dumps(told)


def test_steps_and_prompts_are_timed(small, monkeypatch):
    monkeypatch.setattr(decode, "CAPACITY", 32)
    params = decode.parameters(small, "bf16")
    model = decode.Decoder(small, dtype=jnp.float32)
    told = decode.by_steps(model, params, 2, steps=20)
    assert 0 < told["p50_ms"] <= told["p95_ms"]
    told = decode.prefill(model, params, 2, length=8)
    assert told["tokens_per_s"] == pytest.approx(16e3 / told["step_ms"])
    json.dumps(told)


def test_generating_is_timed(small):
    params = decode.parameters(small, "dequantize")
    told = decode.by_generate(decode.Decoder(small, dtype=jnp.float32), params, 2, steps=12)
    assert {"step_ms", "tokens_per_s"} <= set(told)


def test_a_model_that_is_not_prepared_is_no_w4_model(small):
    with pytest.raises(RuntimeError, match="not served"):
        decode.parameters(small, "w4")


def test_the_models_of_decode_differ_in_their_linears_alone(small):
    quantized = decode.parameters(small, "dequantize")
    ready = prepare(quantized, "sm_90")
    q = ready["layers_0"]["attention"]["q_proj"]["kernel"]
    assert isinstance(q.weight, W4Weight)
    assert dequantize(q.weight).shape == (128, 128)
    x = jnp.ones((1, 128), jnp.bfloat16)
    assert qmatmul(x, q).dtype == jnp.bfloat16
    assert isinstance(ready["lm_head"]["kernel"], jax.Array)
    assert decode.LLAMA_3_8B.num_hidden_layers == 32


def test_without_a_gpu_variants_are_lowered():
    problem = problems.to_item(Problem(16, 256, 128))
    result = compile_only.run(problem, {})
    assert result["level"] in ("lowered", "machine code")
