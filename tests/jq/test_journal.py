"""Runs that were stopped: they go on where they were, to the same bytes, or say why they cannot."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from jq import pipeline
from jq.calib import CalibrationConfig, calibration_from_tokens
from jq.checkpoint import files as checkpoint_files
from jq.errors import CheckpointError, NonFiniteError, OutputError
from jq.journal import Journal
from jq.methods.awq import AWQ
from jq.methods.rtn import RTN
from jq.models import HFCheckpoint
from jq.models.safetensors_file import write_safetensors
from jq.pipeline import quantize_checkpoint
from jq.recipe import uniform
from jq.spec import QuantSpec
from tests.models import checkpoints

BLOCKS = 3
RAW = checkpoints.CONFIGS["qwen2"] | {"intermediate_size": 32, "num_hidden_layers": BLOCKS}
INT4 = QuantSpec("int4", 16, symmetric=False)
# Folds scales into norms, and reads both statistics and hidden states.
RECIPE = uniform(INT4, AWQ(n_grid=2, rounding=RTN("output")))
GROUPS = 4


def write(folder, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    write_safetensors(folder / "model.safetensors", weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("journal") / "model", checkpoints.random_weights(RAW))


@pytest.fixture(scope="module")
def calibration():
    return calibrate(0)


def calibrate(seed):
    tokens = np.random.default_rng(seed).integers(0, RAW["vocab_size"], (3, 16))
    mask = np.ones((3, 16), bool)
    mask[1, 9:] = False
    config = CalibrationConfig("", 3, 16)
    return calibration_from_tokens(tokens, config, vocab_size=RAW["vocab_size"], mask=mask)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(folder, calibration, tmp_path_factory):
    """Digests of what an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "q"
    quantize_checkpoint(folder, out, RECIPE, calibration)
    assert os.listdir(out.parent) == ["q"]
    return digests(out)


class PowerCut(Exception):
    pass


def stop_at(group):
    def progress(step):
        if step.done == group:
            raise PowerCut

    return progress


def stopped(folder, out, calibration, group, recipe=RECIPE, **options):
    with pytest.raises(PowerCut):
        quantize_checkpoint(folder, out, recipe, calibration, progress=stop_at(group), **options)
    assert not out.exists()


@pytest.fixture
def blocks_read(monkeypatch):
    """Names of the blocks whose weights were read."""
    names, read = [], HFCheckpoint.block

    def block(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(HFCheckpoint, "block", block)
    return names


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("group", [GROUPS + 2, 2 * GROUPS + 1, 3 * GROUPS])
def test_a_stopped_run_goes_on(folder, calibration, whole, tmp_path, blocks_read, group, offload):
    stopped(folder, tmp_path / "q", calibration, group, offload=offload)
    assert os.listdir(tmp_path) == [".q.journal"]
    blocks_read.clear()
    steps = []
    report = quantize_checkpoint(
        folder, tmp_path / "q", RECIPE, calibration, offload=offload, progress=steps.append
    )
    finished = (group - 1) // GROUPS
    assert report.resumed == finished
    assert blocks_read == [f"layers_{i}" for i in range(finished, BLOCKS)]
    assert [step.done for step in steps] == list(range(finished * GROUPS + 1, BLOCKS * GROUPS + 1))
    assert all(step.before == finished * GROUPS for step in steps)
    assert [block.name for block in report.blocks] == [f"layers_{i}" for i in range(BLOCKS)]
    assert digests(tmp_path / "q") == whole
    assert os.listdir(tmp_path) == ["q"]


def test_one_stopped_before_its_first_block_leaves_nothing(folder, calibration, tmp_path):
    stopped(folder, tmp_path / "q", calibration, GROUPS)
    assert os.listdir(tmp_path) == []


def test_one_that_learns_nothing_goes_on(folder, tmp_path):
    recipe = uniform(INT4, RTN())
    quantize_checkpoint(folder, tmp_path / "whole", recipe)
    stopped(folder, tmp_path / "q", None, 2 * GROUPS + 1, recipe)
    assert quantize_checkpoint(folder, tmp_path / "q", recipe).resumed == 2
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")


def test_one_for_another_tool_goes_on(folder, calibration, tmp_path):
    recipe = uniform(dataclasses.replace(INT4, scale_dtype="float16"), RTN("output"))
    quantize_checkpoint(folder, tmp_path / "whole", recipe, calibration, target="gptq")
    stopped(folder, tmp_path / "q", calibration, 2 * GROUPS + 1, recipe, target="gptq")
    assert (
        quantize_checkpoint(folder, tmp_path / "q", recipe, calibration, target="gptq").resumed == 2
    )
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")


def test_a_full_disk_is_no_end(folder, calibration, whole, tmp_path, monkeypatch):
    """At every place that asks for room, once."""
    asked, room = [], checkpoint_files.check_room

    def check_room(path, needed):
        asked.append(path)
        if len(asked) == full:
            raise OutputError("no room")
        room(path, needed)

    monkeypatch.setattr(checkpoint_files, "check_room", check_room)
    for full in (3, 5, 3):  # noqa: B007
        asked.clear()
        with pytest.raises(OutputError, match="no room"):
            quantize_checkpoint(folder, tmp_path / "q", RECIPE, calibration)
        assert not (tmp_path / "q").exists()
    full = 0
    assert quantize_checkpoint(folder, tmp_path / "q", RECIPE, calibration).resumed == BLOCKS
    assert digests(tmp_path / "q") == whole


@pytest.fixture
def unfinished(folder, calibration, tmp_path):
    """The output folder of a run that stopped in its third block."""
    out = tmp_path / "q"
    stopped(folder, out, calibration, 2 * GROUPS + 1)
    return out


def test_another_recipe_is_refused(folder, calibration, unfinished):
    other = uniform(INT4, AWQ(n_grid=2, rounding=RTN()))
    message = r"recipe\.0\.method\.rounding\.clip was 'output' and now is 'none': repeat that run"
    with pytest.raises(OutputError, match=message):
        quantize_checkpoint(folder, unfinished, other, calibration)
    report = quantize_checkpoint(folder, unfinished, other, calibration, restart=True)
    assert report.resumed == 0
    assert os.listdir(unfinished.parent) == ["q"]


def test_other_data_are_refused(folder, unfinished):
    with pytest.raises(OutputError, match=r"calibration\.sha256 was"):
        quantize_checkpoint(folder, unfinished, RECIPE, calibrate(1))


def test_another_model_is_refused(folder, calibration, unfinished, tmp_path):
    weights = checkpoints.random_weights(RAW, seed=1)
    other = write(tmp_path / folder.name, weights)
    with pytest.raises(OutputError, match=r"files\.model\.safetensors\.modified_ns was"):
        quantize_checkpoint(other, unfinished, RECIPE, calibration)


def test_another_version_is_refused(folder, calibration, unfinished, monkeypatch):
    monkeypatch.setattr(pipeline, "library_versions", lambda: {"jax": "0.0.1"})
    with pytest.raises(OutputError, match=r"versions\.jax was '.*' and now is '0\.0\.1'"):
        quantize_checkpoint(folder, unfinished, RECIPE, calibration)


def test_a_refused_run_changes_nothing(folder, calibration, whole, unfinished):
    with pytest.raises(OutputError, match="unfinished run"):
        quantize_checkpoint(folder, unfinished, RECIPE, calibrate(1))
    assert quantize_checkpoint(folder, unfinished, RECIPE, calibration).resumed == 2
    assert digests(unfinished) == whole


@pytest.mark.parametrize("where", ["streams/layers_1", "done", "run.json"])
def test_damage_is_refused(folder, calibration, whole, unfinished, where):
    place = unfinished.with_name(".q.journal") / where
    found = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
    largest = max(found, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 64
    largest.write_bytes(data)
    with pytest.raises((CheckpointError, OutputError), match=r"damaged|unfinished run is there"):
        quantize_checkpoint(folder, unfinished, RECIPE, calibration)
    # Nothing was made of it, and the way out works.
    assert not unfinished.exists()
    quantize_checkpoint(folder, unfinished, RECIPE, calibration, restart=True)
    assert digests(unfinished) == whole


def test_a_damaged_block_is_noticed_when_loaded(folder, calibration, unfinished):
    """The output's digests are those of the first run, so `jq.load` would refuse it."""
    block = unfinished.with_name(".q.journal") / "blocks" / "layers_0"
    largest = max((p for p in block.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[0] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers_0/.*sha256|damaged"):
        quantize_checkpoint(folder, unfinished, RECIPE, calibration)


def test_a_removal_that_was_cut_short_counts_as_nothing(folder, calibration, whole, unfinished):
    (unfinished.with_name(".q.journal") / "run.json").unlink()
    assert quantize_checkpoint(folder, unfinished, RECIPE, calibration).resumed == 0
    assert digests(unfinished) == whole


def test_what_would_fail_again_leaves_nothing(calibration, tmp_path):
    weights = checkpoints.random_weights(RAW)
    weights["model.layers.2.mlp.up_proj.weight"].flat[3] = np.nan
    model = write(tmp_path / "model", weights)
    with pytest.raises(NonFiniteError, match="layers_2/mlp/up_proj"):
        quantize_checkpoint(model, tmp_path / "q", RECIPE, calibration)
    assert os.listdir(tmp_path) == ["model"]


def test_two_at_once(folder, calibration, tmp_path):
    """The second is sent away, and the first is not disturbed."""
    with (
        Journal(tmp_path / "q", {}, ()),
        pytest.raises(OutputError, match=r"q: process \d+ is writing"),
    ):
        quantize_checkpoint(folder, tmp_path / "q", RECIPE, calibration)
    quantize_checkpoint(folder, tmp_path / "q", RECIPE, calibration)


PROGRAM = """
import sys
import numpy as np
from jq.calib import CalibrationConfig, calibration_from_tokens
from jq.methods.gptq import GPTQ
from jq.pipeline import quantize_checkpoint
from jq.recipe import uniform
from jq.spec import QuantSpec
tokens = np.random.default_rng(0).integers(0, {vocab}, (8, 32))
calibration = calibration_from_tokens(tokens, CalibrationConfig("", 8, 32), vocab_size={vocab})
recipe = uniform(QuantSpec("int4", 16, symmetric=False), GPTQ(act_group_aware=True))
quantize_checkpoint(sys.argv[1], sys.argv[2], recipe, calibration)
"""


@pytest.mark.slow
def test_ten_kills_in_one_run(tmp_path):
    """SIGKILL at random moments; each time some more blocks are finished."""
    raw = RAW | {"num_hidden_layers": 24}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(raw))
    write_safetensors(model / "model.safetensors", checkpoints.random_weights(raw))
    program = PROGRAM.format(vocab=raw["vocab_size"])

    def start(out):
        arguments = [sys.executable, "-c", program, str(model), str(out)]
        # Compiled once, so that the kills come at all moments of the work.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return subprocess.Popen(arguments, env=os.environ | cache)

    assert start(tmp_path / "whole").wait() == 0
    random.seed(0)
    journal, kills = tmp_path / ".q.journal" / "done", 0

    def finished():
        return len(list(journal.glob("layers_*.json"))) if journal.is_dir() else 0

    for _ in range(10):
        before, process = finished(), start(tmp_path / "q")
        # After one more block at least; then at any moment of the next one or two.
        while finished() == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        assert not (tmp_path / "q").exists() or process.returncode == 0
        if process.returncode == 0:
            break
    if not (tmp_path / "q").exists():
        assert start(tmp_path / "q").wait() == 0
    assert kills == 10
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")
    assert not journal.parent.exists()
