"""Bad input: one line on stderr that says what, exit code 2, nothing written."""

import json
import pickle

import numpy as np
import pytest

from tests.cli.folders import write_model


@pytest.fixture
def out(tmp_path):
    """A folder that must not come into being."""
    yield tmp_path / "made" / "out"
    assert not (tmp_path / "made").exists()


def quantize(call, model, out, *options):
    return call("quantize", model, "--out", out, *options).refusal


def test_a_missing_folder(call, out):
    assert "nowhere does not exist; give a folder" in quantize(call, "nowhere", out)
    assert "nowhere does not exist" in call("eval", "nowhere").refusal
    assert "nowhere does not exist" in call("generate", "nowhere", "--prompt", "x").refusal
    assert "nowhere does not exist" in call("inspect", "nowhere").refusal
    # A model's name on the hub, which is a path as well.
    assert "hf download someone/model-7B --local-dir" in quantize(call, "someone/model-7B", out)
    assert "hf download" not in quantize(call, f"{out.parents[1]}/nowhere", out)


def test_a_file_instead_of_a_folder(call, out, text):
    assert "words.txt is a file; give a folder" in quantize(call, text, out)


@pytest.mark.parametrize("command", ["inspect", "eval", "generate", "quantize"])
def test_a_folder_that_is_no_model(call, tmp_path, out, text, command):
    more = {
        "eval": ("--text", text),
        "generate": ("--prompt", "x"),
        "quantize": ("--out", out, "--method", "rtn"),
    }
    refusal = call(command, tmp_path, *more.get(command, ())).refusal
    assert f"{tmp_path / 'config.json'} is missing" in refusal


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_never_opened(call, tmp_path, out):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    for refusal in (quantize(call, folder, out), call("inspect", folder).refusal):
        assert "pickled weights only (pytorch_model.bin)" in refusal
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a.bin", "gone.safetensors"]
)
def test_an_index_that_names_other_files(call, tmp_path, out, name):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name in quantize(call, folder, out, "--method", "rtn", "--group-size", 32)


def test_a_truncated_weight_file(call, tmp_path, out):
    folder = write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refusal = quantize(call, folder, out, "--method", "rtn", "--group-size", 32)
    assert "truncated" in refusal
    assert str(file) in refusal


def test_remote_code_is_never_run(call, tmp_path, out):
    folder = write_model(tmp_path / "model", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert call("inspect", folder).code == 0
    assert not (tmp_path / "canary").exists()


def test_an_unknown_architecture_lists_the_known_ones(call, tiny, tmp_path, out):
    folder = tmp_path / "model"
    folder.mkdir()
    raw = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "gpt_j"}))
    said = "config.json: model_type 'gpt_j' is unknown; known: llama, mistral, qwen2, qwen3"
    assert quantize(call, folder, out) == f"{folder}/{said}"
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": None}))
    assert quantize(call, folder, out).startswith(f"{folder}/config.json: has no model_type; known")


def test_a_checkpoint_is_not_quantized_again(call, int8, out):
    assert "is a jaxq checkpoint, quantized already" in quantize(call, int8, out)


def test_group_sizes_that_do_not_divide_are_listed_together(call, tmp_path, out, text):
    folder = write_model(tmp_path / "model", intermediate_size=128)
    refusal = quantize(call, folder, out, "--group-size", 48, "--calib-dataset", text)
    assert "group_size 48 does not divide the inputs of" in refusal
    assert "layers_0..1/attention/q_proj (64)" in refusal
    assert "layers_0..1/mlp/down_proj (128)" in refusal
    assert refusal.endswith("valid for all of the linears: 16, 32, 64, -1 (per channel)")
    default = quantize(call, folder, out, "--calib-dataset", text)
    assert "group_size 128" in default
    assert "down_proj" not in default


def test_calibration_is_not_guessed(call, tiny, out):
    refusal = quantize(call, tiny, out, "--group-size", 64)
    assert "gptq learns from calibration text: give --calib-dataset with a .txt" in refusal
    assert "--method rtn, which needs none" in refusal


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.txt", b" \n\n", "blank.txt holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("lines.jsonl", b'{"txt": 1}\n', "field 'text' is missing"),
    ],
)
def test_calibration_text_that_is_none(call, tiny, tmp_path, out, name, content, message):
    (tmp_path / name).write_bytes(content)
    refusal = quantize(call, tiny, out, "--group-size", 64, "--calib-dataset", tmp_path / name)
    assert message in refusal


def test_token_ids_outside_the_vocabulary(call, tiny, tmp_path, out):
    np.save(tmp_path / "ids.npy", np.arange(320, dtype=np.int32))
    refusal = quantize(call, tiny, out, "--group-size", 64, "--calib-dataset", tmp_path / "ids.npy")
    assert "token id 300 at 300 is outside the model's vocabulary of 300" in refusal
    assert "token id 300" in call("eval", tiny, "--text", tmp_path / "ids.npy").refusal


def test_pickled_token_ids(call, tiny, tmp_path, out):
    np.save(tmp_path / "ids.npy", np.array([Canary(tmp_path / "canary")]), allow_pickle=True)
    options = ("--group-size", 64, "--calib-dataset", tmp_path / "ids.npy")
    assert "pickles never are" in quantize(call, tiny, out, *options)
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_of_another_model(call, tmp_path, out, text):
    folder = write_model(tmp_path / "model", vocab_size=260)
    refusal = quantize(call, folder, out, "--group-size", 64, "--calib-dataset", text)
    assert "they do not belong together" in refusal


def test_an_output_folder_that_is_not_empty(call, tiny, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    options = ("--method", "int8")
    assert "exists and is not empty" in quantize(call, tiny, out, *options)
    refusal = quantize(call, tiny, out, *options, "--overwrite")
    assert "something else than a jaxq checkpoint" in refusal
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    assert "is no folder" in quantize(call, tiny, text, *options)


def test_the_output_folder_is_checked_before_the_text_is_read(call, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    refusal = quantize(call, tiny, out, "--group-size", 64, "--calib-dataset", "no-such-file.txt")
    assert "exists and is not empty" in refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "qptq"), "method 'qptq' is unknown; known: gptq, gptq-act-order, awq"),
        (("--method=qptq",), "method 'qptq' is unknown"),
        (("--activation", "int4"), "activation 'int4' is unknown; known: none, int8-token"),
        (("--method", "awq", "--rounding", "up"), "rounding 'up' is unknown; known: rtn, gptq"),
        (("--desc-act",), "desc_act and act_group_aware are two orders"),
        (("--desc-act", "--static-groups"), "desc_act and act_group_aware are two orders"),
        (("--static-groups",), "static_groups changes nothing without desc_act"),
        (("--bits", "9"), "bits 9 is not in 2..8"),
        (("--bits", "1"), "bits 1 is not in 2..8"),
        (("--group-size", "0"), "group_size 0 is neither positive nor -1"),
        (("--activation", "int8-token", "--bits", "4"), "8-bit arithmetic needs 8-bit weights"),
        (("--method", "fp8", "--bits", "4"), "8-bit arithmetic needs 8-bit weights"),
        (("--method", "int8", "--group-size", "64"), "one weight scale per output"),
        (("--method", "int8", "--no-symmetric"), "need symmetric weights"),
        (("--method", "int8", "--activation", "fp8-token"), "do not go with activation"),
        (("--damp-percent", "2"), "damp_percent 2.0 is not in [0, 1)"),
        (("--skip", "("), "'(' is no regular expression"),
        (("--skip", "lm_haed"), "rule 'lm_haed' decides about nothing"),
        (("--skip", "layers"), "the recipe quantizes nothing"),
        (("--calib-samples", "0"), "calib_samples is 0; it must be 1 or more"),
        (("--batch-size", "-1"), "batch_size is -1; it must be 1 or more"),
        (("--seed", "-1"), "seed is -1; it must be 0 or more"),
    ],
)
def test_options_without_a_meaning(call, tiny, text, out, options, message):
    assert message in quantize(call, tiny, out, "--calib-dataset", text, *options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--desc-acts",), "--desc-acts"),
        (("--bits", "four"), "--bits"),
        (("--method", "rtn", "--damp-percent", "0.1"), "--damp-percent"),
        (("--method", "gptq", "--rounding", "rtn"), "--rounding"),
    ],
)
def test_unknown_options_are_usage_errors(call, tiny, out, options, named):
    done = call("quantize", tiny, "--out", out, *options)
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to continue: give --prompt"),
        (("--prompt", ""), "prompt 0 is empty"),
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens 0"),
        (("--prompt", "a", "--max-new-tokens", 40), "exceeds the model's 32 positions"),
        (("--prompt", "a", "--temperature", -1), "temperature must be at least 0"),
        (("--prompt", "a", "--temperature", 1, "--top-p", 2), "top_p must be above 0"),
    ],
)
def test_generations_that_cannot_be(call, tiny, arguments, message):
    assert message in call("generate", tiny, *arguments).refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "perplexity of which text? give --text"),
        (("--text", "none.txt"), "none.txt does not exist"),
        (("--text", "{text}", "--seq-len", "1"), "seq_len 1"),
        (("--text", "{text}", "--max-windows", "0"), "max_windows 0"),
        (("--text", "{text}", "--batch-size", "0"), "batch_size is 0"),
        (("--text", "{text}", "--reference", "nowhere"), "nowhere does not exist"),
    ],
)
def test_evaluations_that_cannot_be(call, tiny, text, arguments, message):
    given = [argument.format(text=text) for argument in arguments]
    assert message in call("eval", tiny, *given).refusal


def test_a_reference_that_reads_other_tokens(call, tiny, tmp_path, text):
    other = write_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refusal = call("eval", tiny, "--text", text, "--reference", other).refusal
    assert "makes other tokens of words.txt" in refusal


def test_a_damaged_manifest_and_report(call, int8, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(int8, copy)
    (copy / "report.json").write_text('{"blocks": [3]}')
    assert "report.json is no report of jaxq" in call("inspect", copy).refusal
    (copy / "report.json").unlink()
    (copy / "jaxq.json").write_text("{")
    assert "jaxq.json" in call("inspect", copy).refusal
