"""The built distributions hold the linked folders as packages, and work away from the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("models", "calib", "pallas_kernels")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the checkout on any path; its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(folder: str) -> set[str]:
    """Python files under a folder of the checkout, relative to it."""
    top = ROOT / folder
    return {path.relative_to(top).as_posix() for path in top.rglob("*.py")}


def expected_modules() -> set[str]:
    """Every Python file of the package, as a path in the wheel."""
    linked = {f"jq/{folder}/{path}" for folder in LINKED for path in sources(folder)}
    return linked | {f"jq/{path}" for path in sources("jq")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, of a copy of the checkout."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("jq", *LINKED):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_sdist_holds_files_not_links(distributions):
    with tarfile.open(distributions[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert expected_modules() <= members.keys()
    assert all(member.isfile() or member.isdir() for member in members.values())


def test_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == expected_modules()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"jq", "jaxq"}
    data = {
        f"jq/{path.relative_to(ROOT / 'jq').as_posix()}"
        for folder in ("data", "demo_model")
        for path in (ROOT / "jq" / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data <= names


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """`bin` of a new environment with the wheel and, by reference, the packages it depends on."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, cwd=environment)
    scripts = environment / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps")
    run(*pip, distributions[1], cwd=environment)
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment
    )
    # A .pth adds the folder behind the environment's own and reads none of its .pth files, so the
    # checkout's editable install stays unseen.
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_installed_packages_import(installed, tmp_path):
    program = "\n".join(
        [
            "import jq",
            *(f"import jq.{name}; print(jq.{name}.__file__)" for name in LINKED),
            "import importlib.metadata; print(importlib.metadata.version('jaxq'))",
        ]
    )
    *files, version = run(installed / "python", "-c", program, cwd=tmp_path).split()
    assert [Path(file).parent.name for file in files] == list(LINKED)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert version == "0.1.0"


def test_every_installed_module_imports(installed, tmp_path):
    program = """
import importlib, pkgutil, jq
for module in pkgutil.walk_packages(jq.__path__, "jq."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    names = set(run(installed / "python", "-c", program, cwd=tmp_path).split())
    assert {f"jq.{name}" for name in LINKED} < names


def test_bare_names_are_not_installed(installed, tmp_path):
    program = (
        "import importlib.util as u; print([u.find_spec(n) is None for n in " + repr(LINKED) + "])"
    )
    assert run(installed / "python", "-c", program, cwd=tmp_path).strip() == str([True] * 3)


def test_installed_command_helps(installed, tmp_path):
    assert "usage" in run(installed / "jaxq", "--help", cwd=tmp_path).lower()
