"""Stages in processes of their own: their answers, their errors and their deaths."""

import contextlib
import os
import sys
import textwrap
import time

import pytest

from jq.compare.spec import device_facts
from jq.compare.stages import Job
from jq.compare.worker import ArmError, describe, device_apart, run_apart
from tests.jq.compare.made_up import NUMBERS, find_arms


@pytest.fixture
def job(tmp_path):
    arm = find_arms(["rtn"], NUMBERS)[1]
    return Job("make", arm, tmp_path / "none", tmp_path, None, None, 1, 32, None)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Let a shell script play the child."""

    def install(script):
        path = tmp_path / "child"
        path.write_text("#!/bin/sh\ncat > /dev/null\n" + textwrap.dedent(script))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def test_answers_and_progress_arrive(child, job, tmp_path):
    child("""
        echo to-the-log >&2
        echo '{"done": 1, "total": 2, "text": "half"}'
        echo '{"result": {"seconds": 3}}'
    """)
    steps = []
    told = run_apart(job, tmp_path / "log", lambda *step: steps.append(step))
    assert (told, steps) == ({"seconds": 3}, [(1, 2, "half")])
    assert (tmp_path / "log").read_text() == "to-the-log\n"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("""echo '{"error": "NonFiniteError: layers_0"}'; exit 1""", "^NonFiniteError: layers_0$"),
        ("kill -9 $$", "was killed, most likely for want of memory; it said nothing$"),
        ("echo oh >&2; kill -9 $$", "was killed, most likely for want of memory; see log$"),
        ("kill -11 $$", "died of SIGSEGV"),
        ("exit 3", "ended with code 3 and no result"),
    ],
)
def test_whatever_goes_wrong_is_told(child, job, tmp_path, script, text):
    child(script)
    with pytest.raises(ArmError, match=text):
        run_apart(job, tmp_path / "log", lambda *step: None)


def test_an_interrupt_ends_the_child(child, job, tmp_path):
    child("""
        echo $$ > "$(dirname "$0")/pid"
        echo '{"done": 0, "total": 1, "text": ""}'
        exec sleep 60
    """)

    def interrupt(*_):
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_apart(job, tmp_path / "log", interrupt)
    assert time.perf_counter() - began < 15
    with pytest.raises(ProcessLookupError), contextlib.suppress(PermissionError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_errors_take_one_line():
    assert describe(ValueError("one\n  two")) == "ValueError: one two"
    assert describe(KeyError()) == "KeyError: no message"
    text = describe(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"))
    assert text.startswith("RuntimeError: the device is out of memory: RESOURCE_EXHAUSTED")
    assert len(describe(ValueError("x" * 5000))) == 600


@pytest.mark.slow
def test_a_real_child_tells_of_its_device_and_its_errors(job, tmp_path):
    assert device_apart(tmp_path / "log") == device_facts()
    with pytest.raises(ArmError, match=r"ModelError: .*none"):
        run_apart(job, tmp_path / "log", lambda *step: None)
    assert "Traceback" in (tmp_path / "log").read_text()
