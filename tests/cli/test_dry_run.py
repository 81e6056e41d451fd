"""`--dry-run`, and the same check at the start of every run."""

import dataclasses

import numpy as np
import pytest

from jq.pipeline import quantize_checkpoint
from jq.presets import preset
from jq.recipe import uniform
from jq.requirements import of_checkpoint
from jq.requirements.machine import Machine


@pytest.fixture
def out(tmp_path):
    """A folder that must not come into being."""
    yield tmp_path / "made" / "out"
    assert not (tmp_path / "made").exists()


@pytest.fixture
def little(monkeypatch):
    """A machine with next to no room."""

    def little(**free):
        there = dataclasses.replace(Machine(None, None, None, own_memory=False), **free)
        monkeypatch.setattr(of_checkpoint, "machine", lambda folder: there)

    return little


def test_what_a_run_needs(call, tiny, text, out):
    done = call(
        *("quantize", tiny, "--out", out, "--calib-dataset", text, "--group-size", "16"),
        *("--calib-samples", "4", "--calib-seqlen", "16", "--dry-run"),
    )
    assert done.code == 0
    facts = {line[:33].strip(): line[33:].strip() for line in done.out.splitlines()}
    names = " ".join(facts)
    for name in ("blocks", "calibration", "host memory", "weights of a block", "disk", "output"):
        assert name in names, done.out
    assert "4 x 16 tokens" in done.out
    assert "about 0:" in done.out
    assert "estimate" in done.out
    assert done.out.count("free:") == 2


def test_what_cannot_fit_is_refused_all_the_same(call, tiny, out, little):
    little(disk=100)
    done = call(
        "quantize", tiny, "--out", out, "--method", "rtn", "--dry-run", "--group-size", "16"
    )
    assert done.code == 2
    assert "output and journal need" in done.err
    assert "0 kB are free" in done.err


def test_every_run_checks_first(call, tiny, out, little):
    little(host=10**6)
    refusal = call(
        *("quantize", tiny, "--out", out, "--method", "rtn", "--group-size", "16")
    ).refusal
    assert refusal.startswith("host memory: 50")
    assert "1.00 MB are free" in refusal


def test_unless_told_otherwise(tiny, tmp_path, little):
    little(host=10**6, disk=10)
    recipe = uniform(*preset("rtn", group_size=16))
    report = quantize_checkpoint(tiny, tmp_path / "out", recipe, unchecked=True)
    assert np.isfinite(report.seconds)
    assert (tmp_path / "out").is_dir()
