"""Exit codes, the overview, signals, and the installed command."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jq.cli
from jq.cli import COMMANDS, progress
from jq.cli import main as run_main
from jq.errors import SpecError


def fresh(*arguments, **options):
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_the_overview_names_every_command(call):
    done = call("--help")
    assert done.code == 0
    assert all(re.search(rf"^  {name}  +\w", done.out, re.M) for name in COMMANDS)
    bare = call()
    assert (bare.code, bare.out) == (2, done.out)


def test_every_command_is_a_module_with_help(call):
    for name in COMMANDS:
        done = call(name, "--help")
        assert (done.code, done.err) == (0, "")
        assert f"usage: jaxq {name}" in done.out


def test_the_overview_imports_nothing_heavy():
    heavy = ("jax", "numpy", "flax", "tyro", "rich")
    program = f"import jq.cli, sys; jq.cli.main(['--help']); print(set(sys.modules) & {set(heavy)})"
    assert fresh("-c", program).stdout.splitlines()[-1] == "set()"


def test_an_unknown_command(call):
    assert call("quantise").refusal.startswith("'quantise' is no command; commands: quantize,")


def test_the_version(call):
    done = call("--version")
    assert done.code == 0
    assert re.fullmatch(r"jaxq \d+\.\d+\.\d+\n", done.out)


def test_methods_lists_every_preset(call):
    from jq.presets import PRESETS

    done = call("methods")
    assert done.code == 0
    assert all(re.search(rf"^{name} ", done.out, re.M) for name in PRESETS)


def fails_with(monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(jq.cli, "_dispatch", fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SpecError("one\nline"), 2, "jaxq: error: one line\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "jaxq: error: a.txt: No such file\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: oh"), 1, "jaxq: error: the device is out of memory"),
        (KeyboardInterrupt(), 130, "jaxq: error: interrupted"),
    ],
)
def test_errors_have_exit_codes(call, monkeypatch, error, code, message):
    fails_with(monkeypatch, error)
    done = call("inspect")
    assert done.code == code
    assert done.err.startswith(message)


def test_bugs_keep_their_traceback(monkeypatch):
    fails_with(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(["inspect"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_half_written(call, monkeypatch, tiny, tmp_path, number, code):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def show(self, done, total, text=""):
        seen.append(any(tmp_path.iterdir()))
        if done == 6:  # one block is written, the other one begun
            os.kill(os.getpid(), number)

    monkeypatch.setattr(progress.Meter, "show", show)
    done = call("quantize", tiny, "--out", tmp_path / "q", "--method", "int8")
    assert done.code == code
    assert "nothing half-written was left" in done.err
    assert "finished blocks are kept: the same command goes on from there" in done.err
    assert len(seen) == 6
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == [".q.journal"]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    done = call("quantize", tiny, "--out", tmp_path / "q", "--method", "int8")
    assert done.code == 0
    assert "1 of 2 blocks were finished by an earlier run" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_signal_waits_for_the_commit(call, monkeypatch, tiny, tmp_path):
    from jq.checkpoint import files

    publish = files.publish

    def interrupted(partial, target):
        os.kill(os.getpid(), signal.SIGINT)
        publish(partial, target)

    monkeypatch.setattr(files, "publish", interrupted)
    done = call("quantize", tiny, "--out", tmp_path / "q", "--method", "int8")
    assert done.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    assert call("inspect", tmp_path / "q").code == 0


def test_the_installed_command_writes_into_pipes(int8):
    command = Path(sys.executable).with_name("jaxq")
    done = subprocess.run(
        f"{command} inspect {int8} | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout.split()[:3] == ["tensor", "shape", "dtype"]
    assert done.stderr == ""


def test_the_module_is_the_command(tmp_path):
    done = fresh("-m", "jq", "inspect", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("jaxq: error: nowhere does not exist")
    assert len(done.stderr.splitlines()) == 1
