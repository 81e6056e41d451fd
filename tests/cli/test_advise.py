"""`jaxq advise`: an answer, its numbers, and a command line that quantize takes."""

import json
import shlex

import pytest

ASKED = ("--gpu", "a100-40gb", "--model", "llama-70b")


def test_the_answer_names_method_room_and_command(call):
    done = call("advise", *ASKED, "--goal", "throughput")
    assert (done.code, done.err) == (0, "")
    first, *lines = done.out.splitlines()
    assert first == "llama-2-70b on a100-40gb: gptq"
    assert any(line.split()[:3] == ["int4", "36.6", "GB"] and "7,282" in line for line in lines)
    assert any(line.split()[:3] == ["unquantized", "138.0", "GB"] for line in lines)
    assert "0.328 MB each" in done.out
    command = "jaxq quantize path/to/llama-2-70b --out OUT --method gptq --calib-dataset TEXT"
    assert lines[-1].strip() == command


def test_what_does_not_fit_is_in_the_first_line(call):
    done = call("advise", "--gpu", "2x", "--model", "llama-8b")
    assert "GPU '2x' is unknown; known: v100-16gb" in done.refusal
    out = call("advise", *ASKED, "--batch", 64).out
    assert out.startswith("llama-2-70b on a100-40gb: gptq, but nothing fits\n")
    assert call("advise", *ASKED, "--gpus", 4, "--batch", 64).out.startswith(
        "llama-2-70b on 4 x a100-40gb: gptq\n"
    )


def test_missing_arithmetic_is_refused_with_the_way_out(call):
    refusal = call("advise", "--gpu", "v100", "--model", "llama-8b", "--activations", "fp8").refusal
    assert refusal == (
        "v100-16gb (sm_70) has no fp8 tensor cores; sm_89 (Ada) and newer have; "
        "ask for int8 or 8-bit activations"
    )


def test_json_has_every_number(call):
    told = json.loads(call("advise", *ASKED, "--json").out)
    assert (told["model"], told["gpu"]["memory_gb"], told["method"]) == ("llama-2-70b", 40, "gptq")
    assert told["fit"]["spec"]["dtype"] == "int4"
    assert {fit["format"]["name"] for fit in told["considered"]} >= {"int4", "fp8"}
    assert told["full_precision"]["weights"] == 2 * 68_976_648_192


def test_a_folder_is_a_model(call, tiny):
    done = call("advise", "--gpu", "t4", "--model", tiny)
    assert done.code == 0
    assert f"jaxq quantize {tiny} --out OUT --method gptq --group-size 64" in done.out
    assert "sequences of 32 tokens" in done.out  # its positions
    assert "demo_model --out OUT" in call("advise", "--gpu", "t4", "--model", "demo").out
    assert "known: llama-7b" in call("advise", "--gpu", "t4", "--model", "unheard-of").refusal


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--goal", "quality"),
        ("--goal", "quality", "--engine", "vllm"),
        ("--goal", "latency", "--engine", "exllama"),
        ("--goal", "throughput", "--engine", "vllm"),
        ("--accuracy", "loose", "--requantize-often"),
        ("--existing", "fp8"),
    ],
)
def test_the_command_is_one_that_quantize_takes(call, tmp_path, options):
    out = call("advise", "--gpu", "h100", "--model", "llama-3-8b", *options).out
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["jaxq", "quantize"]
    arguments = [str(tmp_path / "none") if a.startswith("path/") else a for a in command[1:]]
    assert "does not exist; give a folder with config.json" in call(*arguments).refusal
