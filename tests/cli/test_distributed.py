"""`jaxq quantize --distributed`: the same command on every host."""

import os

import numpy as np
import pytest

from jq.checkpoint import load_params, read_manifest
from jq.cli import main
from jq.qtensor import QTensor
from tests.processes import free_port, outcomes, start


def quantize(out, count):
    """How two processes ended that were told they are so many."""
    address = f"127.0.0.1:{free_port()}"
    options = ["--distributed", "--coordinator", address, "--processes", str(count)]
    command = ["-m", "jq", "quantize", "demo", "--out", str(out), "--method", "rtn", *options]
    return outcomes(start([[*command, "--process-id", str(index)] for index in range(count)]))


@pytest.mark.slow
def test_two_processes(tmp_path):
    first, second = quantize(tmp_path / "q", 2)
    assert (first.code, second.code) == (0, 0), first.error + second.error
    assert "checkpoint" in first.out
    assert "quantize" in first.error
    assert "jaxq" not in second.error
    assert second.out == ""
    kernel = load_params(tmp_path / "q")["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, QTensor)
    assert np.asarray(kernel.scale, np.float32).all()
    assert read_manifest(tmp_path / "q").format_version == 2
    assert os.listdir(tmp_path) == ["q"]
    # The folder is there now, and refused by each.
    for ended in quantize(tmp_path / "q", 2):
        assert ended.code == 2
        assert "is not empty" in ended.error
        assert "Traceback" not in ended.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process-id are for --distributed"),
        (["--distributed", "--processes", "2", "--process-id", "2"], "process_id 2 of 2"),
    ],
)
def test_refusals(tmp_path, capsys, options, words):
    command = ["quantize", "demo", "--out", str(tmp_path / "q"), "--method", "rtn", *options]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
