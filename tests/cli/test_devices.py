"""`--devices`: what is not there is refused, and the numbers are those of one device.

Meshes need eight devices, and run in a process of their own that has them.
"""

import json
import os

import jax
import pytest

from jq.cli import devices, main
from jq.sharded import ShardedTensor
from tests.devices import EIGHT, on_eight, run_with
from tests.jq.tasks import tiny as tiny_tasks
from tests.jq.tasks.conftest import HARNESS

pytestmark = pytest.mark.usefixtures("fast_compiles")
COUNT = len(jax.local_devices())
REFUSALS = [
    ("two", "--devices two is neither a number nor all"),
    ("0", "0 devices are asked for"),
    (str(COUNT + 1), f"{COUNT + 1} devices are asked for, and this process has {COUNT} (cpu)"),
]
COMMANDS = {
    "quantize": ("demo", "--out", "made"),
    "generate": ("demo", "--prompt", "a"),
    "eval": ("demo",),
    "eval of tasks": ("demo", "--tasks", "arc_easy"),
    "compare": ("demo", "--out", "made", "--methods", "rtn", "--no-apart"),
}


@pytest.mark.skipif(EIGHT, reason="this is that process")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marked):
    run_with(8, __file__, marked)


@pytest.mark.skipif(EIGHT, reason="runs in the other process")
@pytest.mark.parametrize(("given", "said"), REFUSALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_there_is_refused(command, given, said, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = command.partition(" ")[0]
    done = call(name, *COMMANDS[command], "--devices", given)
    assert (done.code, done.out) == (2, "")
    assert said in done.err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def made(folder, model, *, group_size):
    """A checkpoint, rounded to nearest."""
    options = ["--method", "rtn", "--symmetric", "--group-size", str(group_size)]
    assert main(["quantize", str(model), "--out", str(folder), *options, "--devices", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def int4(tiny, tmp_path_factory):
    return made(tmp_path_factory.mktemp("checkpoints") / "int4", tiny, group_size=8)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    return made(tmp_path_factory.mktemp("checkpoints") / "demo", "demo", group_size=32)


def numbers(call, *arguments):
    """What `jaxq eval` says of every window."""
    done = call("eval", *arguments, "--json")
    assert done.code == 0, done
    return json.loads(done.out)


def assert_equal_numbers(one, many):
    assert one["tokens_sha256"] == many["tokens_sha256"]
    assert many["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=1e-5)
    assert many["per_window"]["nll"] == pytest.approx(one["per_window"]["nll"], rel=1e-5)


@on_eight
@pytest.mark.parametrize("which", ["quantized", "unquantized"])
def test_perplexity_is_that_of_one_device(call, int4, tiny, text, which):
    arguments = (int4 if which == "quantized" else tiny, "--text", text, "--max-windows", 2)
    reference = ("--reference", tiny) if which == "quantized" else ()
    one = numbers(call, *arguments, *reference)
    many = numbers(call, *arguments, *reference, "--devices", 2)
    assert_equal_numbers(one, many)
    if reference:
        ours, theirs = (found["kl_nats"]["value"] for found in (many, one))
        assert ours == pytest.approx(theirs, rel=1e-3)


@on_eight
def test_text_is_that_of_one_device(call, int4, monkeypatch):
    meshes = []
    load = devices.load_model

    def watched(folder, mesh=None):
        model, params = load(folder, mesh)
        kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
        meshes.append(kernel.mesh.size if isinstance(kernel, ShardedTensor) else None)
        return model, params

    monkeypatch.setattr("jq.cli.generate.load_model", watched)
    prompts = ("--prompt", "the flies", "--prompt", "a café", "--max-new-tokens", 4)
    texts = [call("generate", int4, *prompts, "--devices", n).out for n in ("1", "4")]
    assert meshes == [None, 4]  # which do not divide the two heads of keys
    assert texts[0].startswith("the flies")
    assert texts[1] == texts[0]


@on_eight
@pytest.mark.slow
@pytest.mark.skipif(not HARNESS, reason="needs lm-evaluation-harness")
def test_tasks_are_those_of_one_device(call, int4, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = ("--tasks", "flies", "--include-path", tiny_tasks.write_tasks(tmp_path))
    one, many = (numbers(call, int4, *tasks, *rest) for rest in ((), ("--devices", 2)))
    assert one["tasks"][0]["items"]
    assert many["tasks"] == one["tasks"]


@on_eight
@pytest.mark.slow
def test_a_comparison_on_two_devices(call, tiny, text, tmp_path):
    options = ("--methods", "rtn", "--group-size", 16, "--max-windows", 2, "--no-apart")
    timing = ("--batch-sizes", 1, "--prompt-tokens", 4, "--decode-steps", 10)
    results = []
    for count in ("1", "2"):
        out = tmp_path / count
        arguments = ("compare", tiny, "--out", out, "--text", text, *options, *timing)
        done = call(*arguments, "--devices", count, "--json")
        assert done.code == 0, done
        results.append(json.loads(done.out))
    one, many = ({row["arm"]: row for row in found["rows"]} for found in results)
    assert results[0]["spec"]["device"] | {"used": 2} == results[1]["spec"]["device"]
    for arm in ("original", "rtn"):
        for name in ("perplexity", "bits_per_weight", "weight_bytes"):
            assert many[arm][name] == pytest.approx(one[arm][name], rel=1e-5)
    assert "2 of 8 devices" in (tmp_path / "2" / "report.md").read_text()
    again = call("compare", tiny, "--out", tmp_path / "2", "--text", text, *options, *timing)
    assert "device.used was 2, is null" in again.err


@on_eight
def test_what_cannot_be_cut_is_refused_with_the_numbers_that_can(call, tmp_path, tiny):
    coarse = made(tmp_path / "coarse", tiny, group_size=32)
    said = call("generate", coarse, "--prompt", "a", "--devices", 8).refusal
    assert "cannot be cut over 8 devices: layers_0/attention/o_proj/kernel" in said
    assert said.endswith("All can over 1, 2")


@on_eight
@pytest.mark.slow
def test_the_embedded_model_on_one_to_eight_devices(call, small_demo):
    arguments = (small_demo, "--max-windows", 1, "--seq-len", 128)
    prompt = ("--prompt", "Return the", "--max-new-tokens", 8)
    one = numbers(call, *arguments)
    text = call("generate", small_demo, *prompt).out
    for count in ("2", "all"):
        assert_equal_numbers(one, numbers(call, *arguments, "--devices", count))
    assert call("generate", small_demo, *prompt, "--devices", 2).out == text
