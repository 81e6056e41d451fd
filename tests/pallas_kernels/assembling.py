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


def reports(version: str, suite: str) -> dict[str, dict]:
    """Variant's name -> what the assembler made of it (see `sass`)."""
    program = ROOT / "tests" / "pallas_kernels" / "sass.py"
    done = subprocess.run(
        [compiler(version), program, "--suite", suite],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


def reports_or_skip(version: str, suite: str) -> dict[str, dict]:
    if os.environ.get("JAXQ_NO_SASS") == "1" or not compiler(version).exists():
        pytest.skip(f"no compiler of JAX {version}: scripts/sass_check makes it")
    return reports(version, suite)


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
