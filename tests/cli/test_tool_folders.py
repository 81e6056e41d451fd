"""The commands on a folder that another tool has quantized."""

import json
import shutil

import pytest

from tests.cli import folders
from tests.formats import folders as tools


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A GPTQ model of two layers with a tokenizer."""
    base = tmp_path_factory.mktemp("tools")
    plain = folders.write_model(base / "tiny")
    model, _, _ = tools.write(base, tools.gptq_config(), tools.gptq_linear, raw=folders.RAW)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, model / name)
    return model


def test_inspect_lists_the_linears(call, packed):
    done = call("inspect", packed)
    assert done.code == 0, done.err
    assert f"{folders.LINEARS} quantized" in done.out
    told = json.loads(call("inspect", packed, "--json").out)
    one = next(t for t in told["tensors"] if t["path"] == "layers_0/mlp/down_proj/kernel")
    assert one["dtype"] == "int4 g16"
    assert one["quantized"]
    assert one["shape"] == [64, 64]
    # Codes, float16 scales and 4-bit zeros of four groups of 16, and an int32 group per input.
    assert one["bytes"] == 64 * 64 // 2 + 4 * 64 * 2 + 4 * 64 // 2 + 64 * 4


@pytest.mark.slow
def test_eval_and_generate_run_it(call, packed, text):
    done = call("eval", packed, "--text", text, "--seq-len", 16, "--max-windows", 2)
    assert done.code == 0, done.err
    assert "perplexity" in done.out
    assert "load " in done.err
    done = call("generate", packed, "--prompt", "the cafe", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert done.out.startswith("the cafe")


def test_quantize_wants_the_original(call, packed, tmp_path):
    out = tmp_path / "out"
    refusal = call("quantize", packed, "--out", out, "--method", "rtn").refusal
    assert "is already quantized (quant_method 'gptq'): to quantize, give the original" in refusal
    assert not out.exists()


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
def test_lies_are_refused_in_one_line(call, packed, text, tmp_path, command):
    folder = shutil.copytree(packed, tmp_path / "lying")
    tools.edit_config(folder, quant_method="bitnet")
    options = {
        "inspect": (),
        "eval": ("--text", text),
        "generate": ("--prompt", "the"),
    }[command]
    assert "quant_method 'bitnet' cannot be read" in call(command, folder, *options).refusal
