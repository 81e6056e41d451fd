"""Every row of the literature's two decision matrices, and what decides beside them."""

import dataclasses
import json

import pytest

from jq.advise import GPUS, Situation, advise, find_gpu, find_model
from jq.advise.formats import candidates
from jq.errors import SpecError
from jq.presets import PRESETS


def ask(gpu, model, **changes):
    _, config = find_model(model)
    context = min(4096, config.max_position_embeddings)
    return advise(Situation(find_gpu(gpu), config, **({"context": context} | changes)))


def said(advice):
    return " | ".join((*advice.reasons, *advice.warnings))


def alternatives(advice):
    return {alternative.method for alternative in advice.alternatives}


# Matrix A: constraints first


def test_70b_on_one_a100_of_40_gb():
    advice = ask("a100-40gb", "llama-70b", goal="memory")
    assert {advice.method} | alternatives(advice) >= {"awq", "gptq"}
    assert advice.method in ("awq", "gptq")
    assert advice.fit.format.name == "int4"
    assert advice.fits
    assert 35e9 < advice.fit.weights < 37e9
    # 40 GB less the weights, less what is set aside, at 0.328 MB a token.
    assert "2.4 GB are left for 7,282 tokens of key-value cache (0.328 MB each)" in said(advice)
    assert advice.fit.tokens == int((40e9 - advice.fit.weights - advice.fit.reserve) / 327_680)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in said(advice)


def test_70b_on_h100_for_throughput():
    advice = ask("h100", "llama-70b", goal="throughput")
    assert advice.method == "smoothquant-fp8"
    assert advice.fits
    assert "fp8 tensor cores" in said(advice)
    assert advice.fit.spec.activation.dtype == advice.fit.spec.dtype == "float8_e4m3fn"


@pytest.mark.parametrize("goal", ["memory", "latency", "quality"])
def test_often_requantized(goal):
    advice = ask("a100-80gb", "llama-13b", goal=goal, bits=4, requantize_often=True)
    assert advice.method == "awq"
    assert "cheapest calibration" in said(advice)
    assert "nothing about faster inference" in said(advice)


@pytest.mark.parametrize("bits", [None, 4])
def test_accuracy_first_with_time_to_calibrate(bits):
    advice = ask("a100-80gb", "llama-13b", goal="quality", bits=bits)
    assert advice.method == "gptq-act-order"
    assert "Hessian-based" in said(advice)
    assert advice.fit.format.bits == (bits or 8)
    assert advice.options[2:] == (() if bits else ("--bits", "8"))


@pytest.mark.parametrize("gpu", ["v100", "t4"])
def test_int4_on_old_fleets(gpu):
    advice = ask(gpu, "llama-7b", bits=4)
    assert advice.method in ("awq", "gptq")
    assert {advice.method} | alternatives(advice) >= {"awq", "gptq"}
    assert advice.fit.kernel.kernel == "reference"
    assert "XLA reference" in said(advice)
    assert "float16 activations" in said(advice)


@pytest.mark.parametrize("gpu", ["l4", "l40s", "rtx-4090"])
def test_fp8_on_ada(gpu):
    advice = ask(gpu, "llama-3-8b", activations="fp8")
    assert advice.method == "smoothquant-fp8"
    assert advice.fits


@pytest.mark.parametrize(("gpu", "method"), [("a10", "smoothquant"), ("l4", "smoothquant-fp8")])
def test_a_backend_that_insists_on_w8a8(gpu, method):
    advice = ask(gpu, "llama-3-8b", activations="8-bit", goal="throughput")
    assert advice.method == method
    assert PRESETS[method].activation != "none"
    assert alternatives(advice) == {"fp8" if "fp8" in method else "int8"}


# Matrix B: priorities


def test_best_4_bit_accuracy_of_instruction_tuned_models():
    advice = ask("a100-40gb", "llama-3-8b", goal="quality", bits=4, instruction_tuned=True)
    assert advice.method == "awq"
    assert "small margin" in said(advice)


def test_widest_tooling():
    advice = ask("a100-40gb", "llama-3-8b", widest_tooling=True)
    assert advice.method == "gptq"
    assert "track record" in said(advice)


@pytest.mark.parametrize("engine", ["vllm", "tgi"])
def test_best_quality_on_a_server(engine):
    advice = ask("a100-40gb", "llama-3-8b", goal="quality", bits=4, engine=engine)
    assert advice.method == "awq"
    assert advice.options == ("--method", "awq", "--format", "awq")
    assert f"whether {engine} has kernels for this on sm_80" in said(advice)


def test_lowest_latency_with_exllama_kernels():
    advice = ask("rtx-3090", "llama-3-8b", goal="latency", engine="exllama")
    assert advice.method == "gptq"
    assert advice.options == ("--method", "gptq", "--format", "gptq", "--symmetric")
    assert advice.fit.spec.symmetric


def test_frequent_requantization():
    assert ask("h100", "llama-3-8b", goal="latency", requantize_often=True).method == "awq"


@pytest.mark.parametrize("existing", ["gptq", "awq", "gptq-act-order", "rtn", "smoothquant", "fp8"])
def test_a_pipeline_that_works_is_kept(existing):
    advice = ask("h100", "llama-3-8b", goal="latency", existing=existing)
    assert advice.method == existing
    assert advice.reasons[0].startswith(f"{existing}: a pipeline that works is worth")
    assert existing not in alternatives(advice)
    assert alternatives(advice)


def test_a_pipeline_that_cannot_run_is_not_kept():
    advice = ask("a100-80gb", "llama-3-8b", existing="fp8")
    assert advice.method == "gptq"
    assert advice.reasons[0].startswith("fp8 cannot be kept: a100-80gb (sm_80) has no fp8")


# GPU families and formats

SUPPORT = {
    "v100": ("int4", "int8"),
    "t4": ("int4", "int8"),
    "a100-40gb": ("int4", "int8"),
    "a10": ("int4", "int8"),
    "a30": ("int4", "int8"),
    "l4": ("int4", "int8", "fp8"),
    "l40s": ("int4", "int8", "fp8"),
    "rtx-4090": ("int4", "int8", "fp8"),
    "h100": ("int4", "int8", "fp8"),
    "h200": ("int4", "int8", "fp8"),
}


@pytest.mark.parametrize("gpu", SUPPORT)
def test_families_and_formats(gpu):
    s = Situation(find_gpu(gpu), find_model("llama-3-8b")[1])
    open_ = {fit.format.name for fit in candidates(s) if fit.unwanted is None}
    assert open_ & {"int4", "int8", "fp8"} == set(SUPPORT[gpu])
    if "fp8" not in SUPPORT[gpu]:
        with pytest.raises(SpecError, match=r"no fp8 tensor cores; sm_89 \(Ada\) and newer have"):
            ask(gpu, "llama-3-8b", activations="fp8")


def test_int8_without_tensor_cores_is_told():
    advice = ask("v100-32gb", "llama-3-8b", activations="int8")
    assert advice.method == "smoothquant"
    assert "has no int8 tensor cores; sm_75 (Turing) and newer have: it runs" in said(advice)
    assert ask("v100-32gb", "llama-3-8b", goal="throughput").fit.format.weight_only


def test_int4_has_a_kernel_on_hopper():
    advice = ask("h100", "llama-3-8b", goal="latency")
    assert advice.fit.kernel.kernel == "w4a16"
    assert "XLA reference" not in said(advice)


# What else decides


def test_what_fits_decides_the_bits_of_quality():
    found = {
        gpu: ask(gpu, "llama-2-70b", goal="quality", accuracy="loose").fit.format.name
        for gpu in ("a100-80gb", "l40s", "a100-40gb")
    }
    assert found == {"a100-80gb": "int8 weights", "l40s": "int4", "a100-40gb": "int4"}
    longer = ask("a100-40gb", "llama-2-70b", goal="quality", accuracy="loose", batch=4)
    assert longer.fit.format.name == "int3"
    assert longer.options == ("--method", "gptq-act-order", "--bits", "3")


@pytest.mark.parametrize(
    ("accuracy", "name"), [("strict", "int8"), ("normal", "int4"), ("loose", "int3")]
)
def test_the_accuracy_bar_decides_the_bits_of_memory(accuracy, name):
    assert ask("a100-80gb", "llama-3-8b", accuracy=accuracy).fit.format.name == name


def test_latency_is_a_matter_of_the_batch():
    small = ask("h100", "llama-3-8b", goal="latency", context=64)
    large = ask("h100", "llama-3-8b", goal="latency", context=64, batch=512)
    assert small.fit.format.name == "int4"
    assert "memory-bound" in said(small)
    assert large.fit.format.name == "fp8"
    assert "compute-bound" in said(large)
    forced = ask("h100", "llama-3-8b", goal="latency", context=64, batch=512, bits=4)
    assert "weight-only formats help where memory is the bound" in said(forced)


def test_what_does_not_fit_is_said_with_the_way_out():
    advice = ask("a10", "llama-3-70b")
    assert not advice.fits
    assert advice.reasons[0].startswith("nothing fits: int4, the smallest choice, needs ")
    assert "2 x a10 would do" in advice.reasons[0]
    assert ask("a10", "llama-3-70b", gpus=2).fits
    tight = ask("a100-40gb", "llama-2-70b", batch=8)
    assert not tight.fits
    assert "tokens of cache, 8 x 4096 = 32,768 are needed" in said(tight)


def test_room_for_everything_is_said():
    assert "fits unquantized, too" in said(ask("h100", "llama-3-8b"))
    assert "fits unquantized" not in said(ask("h100", "llama-2-70b"))


def test_long_contexts_and_positions_are_warned_of():
    assert "evaluate at 32,768 tokens" in said(ask("h100", "llama-3.1-8b", context=32768))
    assert "has 4,096 positions" in said(ask("h100", "llama-2-7b", context=8192))
    assert "evaluate at" not in said(ask("h100", "llama-2-7b"))


def test_gptq_and_awq_come_with_the_fair_opponent():
    for advice in (ask("h100", "llama-3-8b"), ask("h100", "llama-3-8b", requantize_often=True)):
        assert "no fair opponent" in said(advice)
    assert "no fair opponent" not in said(ask("h100", "llama-3-8b", goal="quality"))


def test_throughput_names_the_larger_batch_where_memory_is_short():
    advice = ask("h100", "llama-2-70b", goal="throughput")
    (other,) = [a for a in advice.alternatives if "sequences" in a.why]
    assert other.method == "gptq"
    assert "31 sequences of 4,096 tokens instead of 7" in other.why


@pytest.mark.parametrize("engine", ["vllm", "tgi", "exllama", "jaxq"])
@pytest.mark.parametrize("goal", ["memory", "latency", "throughput", "quality"])
@pytest.mark.parametrize("gpu", ["v100", "a100-40gb", "l40s", "b200"])
def test_every_answer_is_a_preset_and_json(gpu, goal, engine):
    advice = ask(gpu, "qwen2.5-7b", goal=goal, engine=engine)
    assert advice.method in PRESETS
    assert alternatives(advice) <= set(PRESETS)
    assert json.loads(json.dumps(advice.to_dict()))["method"] == advice.method
    if engine != "jaxq":
        assert "--format" in advice.options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch 0"),
        ({"context": 0}, "context 0"),
        ({"gpus": 0}, "gpus 0"),
        ({"reserve": -1.0}, "reserve -1"),
        ({"bits": 5}, "bits 5"),
        ({"bits": 4, "activations": "fp8"}, "8-bit arithmetic needs 8-bit weights"),
        ({"existing": "gguf"}, "'gguf' is unknown; known: gptq"),
        ({"engine": "exllama", "accuracy": "strict"}, "no format is left: int4: accuracy strict"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        ask("h100", "llama-3-8b", **changes)


def test_facts_of_gpus_are_consistent():
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.has("int8") == (gpu.eight_bit_tops > 0)
        fewer = 1 if gpu.fp8_tflops is None else gpu.fp8_tflops / gpu.eight_bit_tops
        assert 0.5 <= fewer <= 1
        assert gpu.rate("fp8") == (fewer * gpu.rate("int8") if gpu.has("fp8") else 0)
        assert gpu.has("fp8") == (gpu.capability >= (8, 9))
        assert gpu.source
    assert dataclasses.is_dataclass(find_gpu("NVIDIA A100-40GB"))
    assert find_gpu("H100_SXM") is GPUS["h100"]
    with pytest.raises(SpecError, match="'mi300x' is unknown; known: v100-16gb"):
        find_gpu("mi300x")
