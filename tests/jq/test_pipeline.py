"""The streaming path: the same tensors as in memory, the same bytes each time, early refusals."""

import dataclasses
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jq import tree
from jq.calib import CalibrationConfig, calibration_from_tokens
from jq.calib.driver import quantize_model
from jq.checkpoint import load_params, read_manifest
from jq.errors import (
    CalibrationError,
    CheckpointError,
    ModelError,
    NonFiniteError,
    OutputError,
    SpecError,
)
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.models import Decoder, HFCheckpoint
from jq.pipeline import check_output, quantize_checkpoint, recipe_json
from jq.qtensor import QTensor
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w4a16, w8a8
from tests.checkpoint.trees import assert_same
from tests.models import checkpoints

RAW = checkpoints.CONFIGS["qwen2"] | {"intermediate_size": 32, "num_hidden_layers": 2}
STATIC = uniform(w8a8(activation="tensor", static=True), RTN())
INT8 = uniform(w8a8(), RTN())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 model with tied embeddings and biases."""
    folder = tmp_path_factory.mktemp("model")
    weights = checkpoints.random_weights(RAW)
    halves = {name: w.astype(ml_dtypes.bfloat16) for name, w in weights.items()}
    write(folder, halves)
    return folder


def write(folder, weights):
    from jq.models.safetensors_file import write_safetensors

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RAW))
    write_safetensors(folder / "model.safetensors", weights)


@pytest.fixture(scope="module")
def calibration():
    tokens = np.random.default_rng(0).integers(0, RAW["vocab_size"], (3, 16))
    mask = np.ones((3, 16), bool)
    mask[1, 9:] = False
    config = CalibrationConfig("", 3, 16)
    return calibration_from_tokens(tokens, config, vocab_size=RAW["vocab_size"], mask=mask)


def test_the_checkpoint_holds_what_memory_would(folder, calibration, tmp_path):
    steps = []
    report = quantize_checkpoint(
        folder, tmp_path / "q", STATIC, calibration, progress=steps.append, batch_size=2
    )
    source = HFCheckpoint(folder)
    expected, blocks = quantize_model(
        Decoder(source.config, dtype=jnp.float32),
        source.load(),
        STATIC,
        calibration.tokens,
        mask=calibration.mask,
    )
    assert_same(load_params(tmp_path / "q"), expected)
    assert report.linears == tuple(linear for block in blocks for linear in block.linears)
    assert [step.done for step in steps] == list(range(1, 9))


def test_the_manifest_tells_how_it_was_made(folder, calibration, tmp_path):
    report = quantize_checkpoint(
        folder, tmp_path / "q", STATIC, calibration, meta={"purpose": "test"}
    )
    meta = read_manifest(tmp_path / "q").meta
    assert meta["recipe"] == json.loads(json.dumps(recipe_json(STATIC)))
    assert meta["calibration"]["sha256"] == calibration.description["sha256"]
    assert meta["calibration"]["warnings"] == list(calibration.warnings)
    assert meta["model"] == folder.name
    assert meta["purpose"] == "test"
    told = json.loads((tmp_path / "q" / "report.json").read_text())
    assert told == json.loads(json.dumps(report.to_dict()))
    assert report.path == (tmp_path / "q").resolve()
    assert report.seconds > 0


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_equal_runs_write_equal_bytes(folder, calibration, tmp_path):
    quantize_checkpoint(folder, tmp_path / "a", STATIC, calibration)
    quantize_checkpoint(folder, tmp_path / "b", STATIC, calibration)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_recipe_that_learns_nothing_records_no_data(folder, calibration, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", INT8, calibration)
    assert read_manifest(tmp_path / "q").meta["calibration"] is None


def test_what_is_not_quantized_keeps_its_bits(folder, tmp_path):
    recipe = (Rule("mlp", None, None), Rule("", w8a8()))
    quantize_checkpoint(folder, tmp_path / "q", recipe)
    got, source = load_params(tmp_path / "q"), HFCheckpoint(folder).load()
    plain = [path for path, leaf in tree.leaves(got) if not isinstance(leaf, QTensor)]
    assert len(plain) == 2 + 2 * (2 + 3 + 3)  # embedding and norm; norms, biases, MLP
    for path in plain:
        leaf, wanted = tree.get(got, path), tree.get(source, path)
        assert leaf.dtype == wanted.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted))


def test_one_block_is_held_at_a_time(folder, tmp_path, monkeypatch):
    """When a block is read, nothing of the blocks before it is alive but the one just finished."""
    import weakref

    alive, counts = [], []
    block = HFCheckpoint.block

    def watched(self, name):
        counts.append(sum(ref() is not None for ref in alive))
        params = block(self, name)
        alive.extend(weakref.ref(leaf) for _, leaf in tree.leaves(params))
        return params

    monkeypatch.setattr(HFCheckpoint, "block", watched)
    monkeypatch.setitem(RAW, "num_hidden_layers", 5)
    deep = tmp_path / "deep"
    write(deep, checkpoints.random_weights(RAW))
    quantize_checkpoint(deep, tmp_path / "q", INT8)
    leaves = len(alive) // 5
    assert len(counts) == 5
    assert counts[0] == 0
    assert max(counts[1:]) <= leaves


def no_reading(monkeypatch):
    def refuse(self, *_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(HFCheckpoint, "_read", refuse)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (uniform(w4a16(64), RTN()), SpecError, "group_size 64 does not divide"),
        (uniform(w4a16(32), GPTQ()), CalibrationError, "GPTQ learns from calibration data"),
        (STATIC, CalibrationError, "none was given"),
        ((Rule("lm_haed", None, None), *INT8), SpecError, "lm_haed"),
    ],
)
def test_refusals_come_before_any_weight_is_read(
    folder, tmp_path, monkeypatch, recipe, error, message
):
    no_reading(monkeypatch)
    with pytest.raises(error, match=message):
        quantize_checkpoint(folder, tmp_path / "q", recipe)
    assert not os.listdir(tmp_path)


def test_a_full_output_folder_is_refused_first(folder, tmp_path, monkeypatch):
    no_reading(monkeypatch)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "file").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize_checkpoint(folder, tmp_path / "q", INT8)


def test_samples_longer_than_the_context_are_refused(folder, calibration, tmp_path):
    long = dataclasses.replace(calibration, tokens=np.zeros((1, 65), np.int32), mask=None)
    with pytest.raises(CalibrationError, match="65 tokens, the model's context 64"):
        quantize_checkpoint(folder, tmp_path / "q", STATIC, long)


def test_a_checkpoint_is_no_source(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", INT8)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "again", INT8)
    with pytest.raises(ModelError, match="is not a folder"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "again", INT8)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_weight_outside_the_blocks_that_is_not_finite(tmp_path, name):
    weights = checkpoints.random_weights(RAW)
    weights[name].flat[3] = np.nan
    write(tmp_path / "model", weights)
    with pytest.raises(NonFiniteError, match=r"(embed/embedding|final_norm/scale): the weight has"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "q", INT8)
    assert os.listdir(tmp_path) == ["model"]


def test_a_failure_in_the_first_block_leaves_nothing(folder, tmp_path):
    def fail(step):
        if step.done == 3:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        quantize_checkpoint(folder, tmp_path / "q", INT8, progress=fail)
    assert os.listdir(tmp_path) == []


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder that can be written to"):
        check_output(tmp_path / "file" / "q")
    check_output(tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="written to"):
        check_output(tmp_path / "q")


def test_recipes_become_json_with_the_names_of_methods():
    recipe = (
        Rule("down", None, None),
        Rule("", QuantSpec("int3", 32, False), AWQ(rounding=GPTQ(desc_act=True))),
    )
    first, second = json.loads(json.dumps(recipe_json(recipe)))
    assert first == {"pattern": "down", "spec": None, "method": None}
    assert second["spec"]["dtype"] == "int3"
    assert second["spec"]["activation"] is None
    assert second["method"]["name"] == "AWQ"
    assert second["method"]["rounding"]["name"] == "GPTQ"
    assert second["method"]["rounding"]["desc_act"] is True
    assert jax.tree.leaves(second["method"]["n_grid"]) == [20]
