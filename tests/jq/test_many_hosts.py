"""Runs of several processes: each writes its shards, an error of one stops all, and all go on."""

import json
import os

import numpy as np
import pytest

from jq import api
from jq.calib import CalibrationConfig, calibration_from_tokens
from jq.checkpoint import load_params, read_manifest
from jq.models.safetensors_file import write_safetensors
from tests.checkpoint.trees import assert_same, digests
from tests.models import checkpoints
from tests.processes import outcomes, run_processes, start_processes

pytestmark = pytest.mark.slow

RAW = checkpoints.CONFIGS["qwen2"] | {"intermediate_size": 32, "num_hidden_layers": 3}
SAMPLES = 5  # which neither two nor four processes divide

PROGRAM = """
import os, signal
import jax
from jq.checkpoint import splits
from jq.distributed import all_devices
from jq.errors import OutputError
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.pipeline import quantize_checkpoint
from jq.recipe import uniform
from jq.spec import QuantSpec
from tests.jq.test_many_hosts import calibrate

model, out, what, *rest = sys.argv[3:]
what, _, where = what.partition("@")
splits.MIN_BYTES = 1 if what == "pieces" else splits.MIN_BYTES
me = jax.process_index()

def progress(step):
    if me == 1 and step.block == (where or "layers_1"):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail":
            raise OutputError("the disk of this host is full")

report = quantize_checkpoint(
    model,
    out,
    uniform(QuantSpec("int4", 16), RTN() if what in ("pieces", "export") else GPTQ()),
    calibrate(me if what == "differ" else 0),
    offload="offload" in rest,
    mesh=all_devices() if what == "alone" else None,
    target="gptq" if what == "export" else "orbax",
    progress=progress,
)
print("resumed", report.resumed)
"""


def calibrate(seed: int):
    tokens = np.random.default_rng(seed).integers(0, RAW["vocab_size"], (SAMPLES, 16))
    mask = np.ones(tokens.shape, bool)
    mask[1, 9:] = False
    config = CalibrationConfig("", *tokens.shape)
    return calibration_from_tokens(tokens, config, vocab_size=RAW["vocab_size"], mask=mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    write_safetensors(folder / "model.safetensors", checkpoints.random_weights(RAW))
    return str(folder)


def chunks(path):
    """Digests per array of codes."""
    tensors = read_manifest(path).parts["layers_1"].tensors.values()
    return {len(entry.fields["codes"].chunks) for entry in tensors if hasattr(entry, "fields")}


def test_two_processes_one_is_killed(folder, tmp_path):
    run_processes(PROGRAM, 2, folder, str(tmp_path / "whole"), "")
    assert chunks(tmp_path / "whole") == {2}
    ended = outcomes(start_processes(PROGRAM, 2, folder, str(tmp_path / "q"), "kill", heartbeat=10))
    assert ended[1].code == -9
    assert ended[0].code != 0  # JAX ends a process whose partner is gone
    assert ".q.journal" in os.listdir(tmp_path)
    # Hidden states go from devices to devices, and from there into host memory.
    failed = start_processes(PROGRAM, 2, folder, str(tmp_path / "q"), "fail@layers_2")
    assert "the disk of this host is full" in outcomes(failed)[0].error
    again = run_processes(PROGRAM, 2, folder, str(tmp_path / "q"), "", "offload")
    assert [o.out for o in again] == ["resumed 2\n"] * 2
    assert sorted(os.listdir(tmp_path)) == ["q", "whole"]
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")
    _, params = api.load(tmp_path / "q")
    run_processes(PROGRAM, 1, folder, str(tmp_path / "alone"), "alone", devices=2)
    assert chunks(tmp_path / "alone") == {0}
    assert_same(load_params(tmp_path / "alone"), params)


def test_four_processes_one_fails(folder, tmp_path):
    """Hidden states in host memory: each process has its own samples there, and puts them onto its
    devices when it goes on."""
    offload = str(tmp_path / "offload")
    ended = outcomes(start_processes(PROGRAM, 4, folder, offload, "fail", "offload", heartbeat=10))
    for index, outcome in enumerate(ended):
        assert outcome.code not in (0, -9)
        told = "OutputError: " if index == 1 else "process 1 of 4"
        assert told in outcome.error
        assert "the disk of this host is full" in outcome.error
    assert ".offload.journal" in os.listdir(tmp_path)
    again = run_processes(PROGRAM, 4, folder, offload, "")
    assert [o.out for o in again] == ["resumed 1\n"] * 4
    assert os.listdir(tmp_path) == ["offload"]
    assert chunks(tmp_path / "offload") == {4}
    run_processes(PROGRAM, 1, folder, str(tmp_path / "alone"), "alone", devices=4)
    assert_same(load_params(tmp_path / "alone"), load_params(tmp_path / "offload"))


def test_processes_that_were_started_differently(folder, tmp_path):
    for outcome in outcomes(start_processes(PROGRAM, 2, folder, str(tmp_path / "q"), "differ")):
        assert outcome.code != 0
        assert "calibration.sha256 is" in outcome.error
        assert "in process 1: give all processes the same" in outcome.error
    assert os.listdir(tmp_path) == []


def test_a_folder_for_other_tools(folder, tmp_path):
    run_processes(PROGRAM, 2, folder, str(tmp_path / "two"), "export")
    run_processes(PROGRAM, 1, folder, str(tmp_path / "one"), "export")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert_same(api.load(tmp_path / "two")[1], api.load(tmp_path / "one")[1])


ACROSS = """
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
import jq
from jq.checkpoint import reader
from jq.distributed import all_devices

place = reader.place_array

def place_array(path, *arguments):
    assert not path.endswith(("/codes", "/embedding")), path  # no process reads all of these
    return place(path, *arguments)

path = Path(sys.argv[3])
reader.place_array = place_array
model, params = jq.load(path, mesh=all_devices("model"))
reader.place_array = place
codes = params["layers_0"]["mlp"]["up_proj"]["kernel"].weight.codes
assert not codes.is_fully_addressable
tokens = np.arange(8, dtype=np.int32)[None]
logits = jax.jit(lambda params: model.apply({"params": params}, tokens))(params)
logits = multihost_utils.process_allgather(logits, tiled=True)
one, whole = jq.load(path)
np.testing.assert_allclose(logits, one.apply({"params": whole}, tokens), rtol=1e-5, atol=1e-5)
jq.save(path.with_name("again"), model, params, config_files_from=path)
"""


def test_a_model_across_processes(folder, tmp_path):
    """Written by one process, loaded onto the devices of both, run there, and saved from there."""
    run_processes(PROGRAM, 1, folder, str(tmp_path / "q"), "pieces")
    assert chunks(tmp_path / "q") == {8, 2}  # two groups of inputs
    run_processes(ACROSS, 2, str(tmp_path / "q"))
    assert chunks(tmp_path / "again") == {2}
    assert_same(load_params(tmp_path / "again"), load_params(tmp_path / "q"))
