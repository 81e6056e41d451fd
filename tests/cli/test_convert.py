"""`jaxq convert`, and `jaxq quantize --format`."""

import json

import pytest

from jq.cli.export_options import Export
from jq.errors import SpecError
from jq.formats.shards import SHARD_BYTES


@pytest.fixture(scope="module")
def gptq(tiny, tmp_path_factory):
    """A GPTQ folder of `tiny`, in small files, with one linear in full precision."""
    from jq.cli import main

    out = tmp_path_factory.mktemp("folders") / "gptq"
    options = ["--method", "rtn", "--format", "gptq", "--group-size", "32", "--shard-size", "50kB"]
    assert main(["quantize", str(tiny), "--out", str(out), *options, "--skip", "k_proj"]) == 0
    return out


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_quantizing_into_a_format(gptq):
    told = config_of(gptq)
    assert (told["bits"], told["group_size"], told["sym"]) == (4, 32, False)
    assert told["checkpoint_format"] == "gptq_v2"
    assert all(name.startswith("-:") and "k_proj" in name for name in told["dynamic"])
    files = [file.name for file in gptq.glob("*.safetensors")]
    assert len(files) > 1
    assert {"tokenizer.json", "quantize_config.json", "report.json"} <= {
        file.name for file in gptq.iterdir()
    }


def test_what_quantize_says_of_it(call, tiny, tmp_path):
    options = ("--method", "rtn", "--format", "awq", "--group-size", "32")
    done = call("quantize", tiny, "--out", tmp_path / "out", *options)
    assert done.code == 0
    assert "14 quantized, 4.625 bits per weight" in done.out  # 4 + (16 + 4) / 32
    assert config_of(tmp_path / "out")["quant_method"] == "awq"


def test_converting(call, gptq, tmp_path):
    done = call("convert", gptq, tmp_path / "own")
    assert done.code == 0
    assert "orbax" in done.out
    assert "12 quantized" in done.out
    assert "convert 5/5" in done.err
    assert (tmp_path / "own" / "jaxq.json").is_file()
    done = call("convert", tmp_path / "own", tmp_path / "ct", "--format", "compressed-tensors")
    assert done.code == 0
    assert config_of(tmp_path / "ct")["format"] == "pack-quantized"
    assert call("inspect", tmp_path / "ct").code == 0
    assert "not empty" in call("convert", gptq, tmp_path / "own").refusal
    assert call("convert", gptq, tmp_path / "own", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--method", "int8", "--format", "gptq"), "gptq cannot express this model: layers_0..1/"),
        (
            ("--method", "gptq-act-order", "--format", "awq", "--group-size", "32"),
            "AWQ files have no act order",
        ),
        (("--bits", "3", "--method", "rtn", "--format", "awq"), "int4 weights, not int3"),
        (("--method", "rtn", "--format", "gptq", "--shard-size", "many"), "shard size 'many'"),
    ],
)
def test_refusals_come_before_anything_is_read_or_written(call, tiny, text, tmp_path, options):
    if "--group-size" not in options:
        options = (*options, "--group-size", "-1")
    assert text in call("quantize", tiny, "--out", tmp_path / "out", *options).refusal
    assert list(tmp_path.iterdir()) == []


def test_converting_what_cannot_be_expressed(call, int8, tiny, tmp_path):
    out = tmp_path / "out"
    assert "activations are quantized" in call("convert", int8, out, "--format", "gptq").refusal
    assert "jaxq checkpoint already" in call("convert", int8, out).refusal
    assert "is not quantized" in call("convert", tiny, out).refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20kB", 20_000), ("7", 7), ("7B", 7)],
)
def test_shard_sizes(text, size):
    assert Export(shard_size=text).shard_bytes() == size
    assert Export().shard_bytes() == SHARD_BYTES


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 GiB", "1e9"])
def test_shard_sizes_that_are_none(text):
    with pytest.raises(SpecError, match="give one like 5GB"):
        Export(shard_size=text).shard_bytes()
