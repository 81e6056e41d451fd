"""Machine code of the kernels as each supported JAX compiles it, and the bounds recorded for it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSIONS = ("0.11", "0.12")


def compiler(version: str) -> pathlib.Path:
    return ROOT / f".venv-sass-{version}" / "bin" / "python"


def printed(version: str, program: str, *arguments: str) -> dict[str, dict]:
    """Variant's name -> what a program of this folder prints of it; skips without a compiler."""
    if os.environ.get("JAXQ_NO_SASS") == "1" or not compiler(version).exists():
        pytest.skip(f"no compiler of JAX {version}: scripts/sass_check makes it")
    done = subprocess.run(
        [compiler(version), pathlib.Path(__file__).with_name(program), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


def reports(version: str, suite: str) -> dict[str, dict]:
    """Variant's name -> what the assembler made of it (see `sass`)."""
    return printed(version, "sass.py", "--suite", suite)


def check(report: dict, bound: list[float]) -> None:
    """What holds for every kernel: all stays in registers, and no more than was recorded."""
    assert report["spills"] == report["stack"] == 0, report
    assert report["warnings"] == [], "the assembler serialized the tensor cores"
    assert report["forbidden"] == [], report
    registers, slots = bound
    assert report["registers"] <= registers, report
    assert report["slots"] <= slots, report


def bounds_of(name: str) -> pathlib.Path:
    """File with [registers, slots] by variant's name."""
    return pathlib.Path(__file__).with_name(name)


def read(path: pathlib.Path) -> dict[str, list[float]]:
    return json.loads(path.read_text())


def record(path: pathlib.Path, suite: str) -> None:
    """The worst of all versions' figures becomes the bound."""
    found = [reports(version, suite) for version in VERSIONS]
    worst = {
        name: [max(r[name][key] for r in found) for key in ("registers", "slots")]
        for name in found[0]
    }
    lines = (f'  "{name}": {json.dumps(figures)}' for name, figures in worst.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
