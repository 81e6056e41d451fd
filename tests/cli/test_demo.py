"""The embedded model goes by a word, and brings its own texts."""

import json

import pytest

from jq.checkpoint import read_manifest
from jq.cli.models import DEMO_NAME
from jq.demo_model import demo_model_path


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "q"


def test_a_checkpoint_of_the_demo_is_evaluated_on_its_text(call, out):
    assert call("quantize", "demo", "--out", out, "--method", "rtn").code == 0
    assert read_manifest(out).meta["model"] == DEMO_NAME
    arguments = ("--reference", "demo", "--max-windows", 1, "--seq-len", 32, "--json")
    told = json.loads(call("eval", out, *arguments).out)
    assert told["text"] == "evaluation.txt"
    assert 0 < told["kl_nats"]["value"] < 1
    assert told["perplexity"]["stderr"] is None  # of a single window


@pytest.mark.slow
def test_the_default_calibrates_on_the_demos_text(call, tmp_path):
    done = call("quantize", "demo", "--out", tmp_path / "q", "--calib-samples", 2)
    assert done.code == 0
    calibration = read_manifest(tmp_path / "q").meta["calibration"]
    assert calibration["source"] == "calibration.txt"
    assert calibration["seq_len"] == 512


def test_a_folder_of_that_name_can_still_be_meant(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert "config.json is missing" in call("inspect", "./demo").refusal
    assert str(demo_model_path()) in call("inspect", "demo").out
