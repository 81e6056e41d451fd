"""quantize, inspect, eval and generate, one after another, as a user runs them."""

import json
import re

import jax
import numpy as np
import pytest

from jq.api import load
from jq.checkpoint import load_params, read_manifest
from jq.cli import main
from jq.evaluate import evaluate
from jq.models import Tokenizer
from jq.models.generation import generate
from jq.presets import PRESETS, preset
from jq.qtensor import QTensor
from jq.spec import QuantSpec, w8a8
from tests.cli.folders import LINEARS, write_text

FEW = ("--calib-samples", "4", "--calib-seqlen", "32")


@pytest.fixture(scope="module")
def int4(tiny, text, tmp_path_factory):
    """GPTQ's checkpoint of `tiny`, and what the command wrote."""
    out = tmp_path_factory.mktemp("checkpoints") / "int4"
    arguments = ["quantize", tiny, "--out", out, "--calib-dataset", text, *FEW]
    arguments += ["--group-size", "32", "--damp-percent", "0.05", "--no-act-group-aware"]
    assert main([str(a) for a in arguments]) == 0
    return out


def quantized(path):
    leaves = jax.tree.leaves(load_params(path), is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QTensor)]


def test_options_reach_spec_method_and_manifest(int4):
    meta = read_manifest(int4).meta
    (rule,) = meta["recipe"]
    assert (meta["model"], rule["pattern"]) == ("tiny", ".*")
    assert rule["method"]["name"] == "GPTQ"
    assert rule["method"]["damp_percent"] == 0.05
    assert rule["method"]["act_group_aware"] is False
    assert meta["calibration"]["source"] == "words.txt"
    assert (meta["calibration"]["samples"], meta["calibration"]["seq_len"]) == (4, 32)
    tensors = quantized(int4)
    assert len(tensors) == LINEARS
    assert {w.spec for w in tensors} == {QuantSpec("int4", 32, symmetric=False)}


def test_the_tokenizer_travels(int4, tiny):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (int4 / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [*([name] for name in PRESETS), ["awq", "--rounding", "gptq"]], ids=" ".join
)
def test_every_method_makes_a_checkpoint_that_runs(call, tiny, text, tmp_path, options):
    if preset(options[0])[0].group_size == 128:
        options = [*options, "--group-size", 32]
    arguments = ("--out", tmp_path / "q", "--calib-dataset", text, *FEW)
    done = call("quantize", tiny, *arguments, "--method", *options)
    assert done.code == 0
    assert len(quantized(tmp_path / "q")) == LINEARS
    compared = call("eval", tmp_path / "q", "--text", text, "--reference", tiny, "--json")
    assert 0 < json.loads(compared.out)["kl_nats"]["value"] < 1


def test_quantize_tells_of_layers_and_time(call, tiny, tmp_path):
    done = call("quantize", tiny, "--out", tmp_path / "q", "--method", "rtn", "--group-size", 64)
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) == 8
    clock = r"elapsed \d+:\d\d, left \d+:\d\d"
    assert re.fullmatch(rf"quantize 1/8  layers_0 qkv  {clock}", lines[0])
    assert re.fullmatch(rf"quantize 8/8  layers_1 down  {clock}", lines[-1])
    assert lines[-1].endswith("left 0:00")
    # 4 bits, and a 16-bit scale and a 4-bit zero point for every 64.
    assert f"{LINEARS} quantized, 4.312 bits per weight" in done.out


def test_skipped_linears_stay(call, tiny, tmp_path):
    skip = ("--skip", "down_proj", "--skip", "layers_0/attention")
    skip += ("--calib-dataset", "unread.txt")
    done = call("quantize", tiny, "--out", tmp_path / "q", "--method", "int8", *skip)
    assert done.code == 0
    assert "note: method int8 learns nothing from data: --calib-dataset is unused" in done.err
    params = load_params(tmp_path / "q")
    assert not isinstance(params["layers_0"]["attention"]["q_proj"]["kernel"], QTensor)
    assert not isinstance(params["layers_1"]["mlp"]["down_proj"]["kernel"], QTensor)
    assert params["layers_1"]["attention"]["q_proj"]["kernel"].spec == w8a8()
    assert len(quantized(tmp_path / "q")) == LINEARS - 4 - 2


def test_a_long_window_is_cut_with_a_note(call, tiny, text, tmp_path):
    options = ("--method", "int8", "--activation", "int8-static", "--calib-dataset", text)
    done = call("quantize", tiny, "--out", tmp_path / "q", *options, "--calib-samples", 2)
    assert done.code == 0
    assert "note: calib_seqlen 2048 is cut to the model's context of 32 tokens" in done.err
    assert read_manifest(tmp_path / "q").meta["calibration"]["seq_len"] == 32
    assert re.search(r"layers_0 qkv  output error 0\.\d+  elapsed", done.err)
    assert re.search(r"output error +0\.\d+ on average; rounding to nearest: 0\.\d+", done.out)
    assert all(w.input_scale is not None for w in quantized(tmp_path / "q"))


def test_a_short_text_is_warned_of(call, tiny, tmp_path):
    short = write_text(tmp_path / "short.txt", 5)
    options = ("--method", "int8", "--activation", "int8-static", "--calib-dataset", short)
    done = call("quantize", tiny, "--out", tmp_path / "q", *options, "--calib-samples", 2)
    assert done.code == 0
    assert "warning: the calibration text has" in done.err
    assert "warning: 1 calibration samples instead of 2" in done.err
    assert len(read_manifest(tmp_path / "q").meta["calibration"]["warnings"]) == 2


def test_overwrite_replaces_a_checkpoint(call, int8, tiny, tmp_path):
    target = ("quantize", tiny, "--out", tmp_path / "q", "--method")
    assert call(*target, "int8").code == 0
    assert "not empty" in call(*target, "fp8").refusal
    assert call(*target, "fp8", "--overwrite").code == 0
    assert {w.spec.dtype for w in quantized(tmp_path / "q")} == {"float8_e4m3fn"}


def test_inspect_lists_every_tensor_and_the_totals(call, int4):
    done = call("inspect", int4)
    assert (done.code, done.err) == (0, "")
    assert "layers_1/mlp/down_proj/kernel" in done.out
    assert f"{LINEARS} quantized, 4.625 bits per weight" in done.out
    assert "GPTQ(damp_percent=0.05" in done.out
    assert "source words.txt, samples 4" in done.out
    assert f"{LINEARS} reference: cpu is no CUDA device" in done.out


def test_inspect_json_agrees_with_the_loaded_checkpoint(call, int4):
    told = json.loads(call("inspect", int4, "--json").out)
    params = load_params(int4)
    assert sum(t["quantized"] for t in told["tensors"]) == LINEARS
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(t["bytes"] for t in told["tensors"]) == total
    assert told["totals"]["model_bits"] == pytest.approx(total * 8 / told["totals"]["weights"])
    by_path = {t["path"]: t for t in told["tensors"]}
    up = by_path["layers_0/mlp/up_proj/kernel"]
    assert up["shape"] == [64, 64]
    assert up["kernel"]["kernel"] == "reference"
    assert by_path["final_norm/scale"]["kernel"] is None
    assert 0 < up["report"]["output_error"] < up["report"]["rtn_output_error"] < 1
    sizes = (f.stat().st_size for f in int4.rglob("*") if f.is_file())
    assert told["totals"]["file_bytes"] == sum(sizes)


def test_inspect_reads_plain_models(call, tiny):
    done = call("inspect", tiny)
    assert done.code == 0
    assert "error" not in done.out
    told = json.loads(call("inspect", tiny, "--json").out)
    assert {t["dtype"] for t in told["tensors"]} == {"float32"}
    assert told["totals"]["model_bits"] == 32
    assert told["totals"]["linear_bits"] is None


def test_eval_is_the_librarys(call, int4, tiny, text):
    done = call(
        "eval", int4, "--text", text, "--reference", tiny, "--max-windows", 3, "--json",
        "--batch-size", 2,
    )  # fmt: skip
    assert done.code == 0
    told = json.loads(done.out)
    tokens = np.asarray(Tokenizer(tiny).encode(text.read_text()))
    model, params = load(int4)
    expected = evaluate(
        model, params, tokens, reference_params=load(tiny)[1], seq_len=32, max_windows=3
    )
    assert told["windows"] == 3
    assert told["text"] == "words.txt"
    assert told["perplexity"]["value"] == pytest.approx(expected.perplexity.value, rel=1e-6)
    assert expected.kl is not None
    assert told["kl_nats"]["value"] == pytest.approx(expected.kl.value, rel=1e-4)
    assert told["kl_nats"]["value"] > 0


def test_eval_prints_errors_of_its_estimates(call, int8, text):
    done = call("eval", int8, "--text", text, "--seq-len", 16, "--max-windows", 2)
    assert done.code == 0
    first, second = done.out.splitlines()
    assert first.split()[0] == "perplexity"
    assert first.split()[2] == "+-"
    assert second.endswith("2 windows of 16 tokens of words.txt, token level")


def test_generate_streams_what_the_library_generates(call, int8):
    done = call("generate", int8, "--prompt", "the flies", "--max-new-tokens", 8)
    assert done.code == 0
    tokenizer = Tokenizer(int8)
    model, params = load(int8)
    ids = generate(model, params, [tokenizer.encode("the flies")], 8)[0]
    assert done.out == "the flies" + tokenizer.decode(ids) + "\n"


def test_generate_takes_a_batch_and_a_seed(call, int8):
    drawn = ("--temperature", 1.5, "--top-k", 50, "--seed", 3, "--max-new-tokens", 6)
    both = call("generate", int8, "--prompt", "the", "--prompt", "a cafe", *drawn)
    again = call("generate", int8, "--prompt", "the", "--prompt", "a cafe", *drawn)
    other = call(
        "generate", int8, "--prompt", "the", "--prompt", "a cafe", *drawn[:5], 4, *drawn[6:]
    )
    assert both.code == other.code == 0
    assert both.out == again.out != other.out
    alone = call("generate", int8, "--prompt", "the", *drawn)
    assert both.out.startswith(alone.out.rstrip("\n"))
    silent = call("generate", int8, "--prompt", "the", "--no-echo", *drawn)
    assert "the" + silent.out == alone.out
