"""Who may import whom, read from the sources; and what `import jq` needs."""

import ast
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("models", "calib", "pallas_kernels")
# The command line and the calls that put a whole model together stand above everything else.
ABOVE = (
    *("jq.cli", "jq.__main__", "jq.api", "jq.pipeline", "jq.journal", "jq.formats"),
    "jq.tasks",
    *("jq.advise", "jq.bench", "jq.compare", "jq.requirements.of_checkpoint"),
)
# Beside JAX and the standard library, nothing may be needed to import the package.
LEFT_OUT = (
    *("flax", "optax", "orbax", "datasets", "safetensors", "tokenizers", "transformers"),
    *("tyro", "rich", "matplotlib", "lm_eval", "torch", "jaxtyping", "beartype"),
)

IMPORTERS = ("import_module", "__import__")


def part_of(module: str) -> str:
    """Which of the parts that have a rule a dotted module name of the package belongs to."""
    # The package's own front offers names of every part, each imported when it is asked for.
    if module == "jq" or any(module == name or module.startswith(name + ".") for name in ABOVE):
        return "cli"
    second = module.partition(".")[2].partition(".")[0]
    return second if second in LINKED else "core"


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Line and dotted name of everything a module imports, at any depth, for types or for real.

    `from a import b` counts as `a.b`, since b may be a module; relative names are resolved.
    """
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
            found += [
                (node.lineno, name.value)
                for name in node.args[:1]
                if isinstance(name, ast.Constant) and isinstance(name.value, str)
            ]
    return found


def refusal(importer: str, name: str) -> str | None:
    """Why the module `importer` may not import `name`, or None where it may."""
    top = name.split(".")[0]
    if top in LINKED:
        return f"{top} goes by the name jq.{top}"
    if importer.split(".")[0] in ("tests", "scripts"):
        return None
    if top in ("tests", "scripts"):
        return f"the package knows no {top}"
    source = part_of(importer)
    if source == "cli":
        return None
    if source == "pallas_kernels":
        own = name == "jq.pallas_kernels" or name.startswith("jq.pallas_kernels.")
        # numpy comes with JAX; jaxtyping's names are for types only (test_typing sees to that).
        known = {"jax", "jaxlib", "numpy", "jaxtyping"} | sys.stdlib_module_names
        return None if own or top in known else "kernels know JAX and nothing else"
    if top != "jq":
        return None
    target = part_of(name)
    if target == "cli":
        return "the command line stands above the library"
    if target == "pallas_kernels" and not importer.startswith("jq.kernels."):
        return "only jq.kernels chooses kernels"
    if target in ("models", "calib") and source != target:
        return f"{source} knows no {target}"
    return None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of a module that the rules refuse."""
    return [
        f"{module}:{line}: {name}: {why}"
        for line, name in imported(source, module, is_package)
        if (why := refusal(module, name))
    ]


def sources() -> list[tuple[str, bool, Path]]:
    """Dotted name, whether it is a package, and path of every Python file of the repository."""
    found = []
    for folder in ("jq", *LINKED, "tests", "scripts"):
        prefix = ("jq",) if folder in LINKED else ()
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            found.append((".".join(parts[:-1] if is_package else parts), is_package, path))
    return found


def test_sources_keep_to_the_rules():
    files = sources()
    assert {"jq", "jq.matmul", *(f"jq.{name}" for name in LINKED)} <= {name for name, *_ in files}
    found = []
    for module, is_package, path in files:
        found += violations(path.read_text(), module, is_package)
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jq.gptq", "import models"),
        ("jq.gptq", "from calib.stats import gram"),
        ("tests.test_x", "import pallas_kernels.reference"),
        ("scripts.demo", "from models import Decoder"),
        ("jq.gptq", "from jq.pallas_kernels import reference"),
        ("jq.gptq", "from jq import pallas_kernels"),
        ("jq.matmul", "from jq.pallas_kernels import reference"),
        ("jq.gptq", "from . import models"),
        ("jq.gptq", "def f():\n    import jq.calib"),
        ("jq.gptq", "importlib.import_module('jq.models.decoder')"),
        ("jq.gptq", "from jq.cli import main"),
        ("jq.gptq", "import jq"),
        ("jq.gptq", "from tests.oracles import gptq"),
        ("jq.models.decoder", "from jq.calib import stats"),
        ("jq.models.decoder", "from jq import pallas_kernels"),
        ("jq.models.decoder", "from ..calib import stats"),
        ("jq.calib.driver", "from jq.models.decoder import Decoder"),
        ("jq.pallas_kernels.w4a16", "import flax"),
        ("jq.pallas_kernels.w4a16", "from jq.packing import pack"),
        ("jq.pallas_kernels.w4a16", "from .. import qtensor"),
        ("jq.matmul", "from jq.models import Decoder"),
    ],
)
def test_made_up_breaches_are_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jq.kernels.choice", "from jq.pallas_kernels import reference"),
        ("jq.gptq", "import optax\nfrom jq import grid"),
        ("jq.cli.main", "from jq.models import Decoder\nimport jq.calib"),
        ("jq.models.decoder", "import flax.linen as nn\nfrom jq.matmul import qmatmul"),
        ("jq.models.decoder", "from . import rope\nfrom jq.models.rope import RopeConfig"),
        ("jq.calib.driver", "from jq.blockwise import BlockwiseModel"),
        ("jq.pallas_kernels.w4a16", "import functools\nfrom jax.experimental import pallas"),
        ("jq.pallas_kernels.w4a16", "from . import reference"),
        ("tests.test_x", "from jq.models import Decoder\nfrom jq.calib import stats"),
    ],
)
def test_allowed_imports_pass(module, source):
    assert violations(source, module) == []


def test_relative_names_in_a_package_resolve_to_itself():
    assert imported("from . import rope", "jq.models", True) == [(1, "jq.models.rope")]
    assert imported("from .rope import f", "jq.models.decoder", False) == [(1, "jq.models.rope.f")]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_type_checked(name):
    assert (ROOT / "jq" / name).readlink() == Path("..") / name
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert f"jq/{name}" in settings["include"]  # pyright skips a link that is not named


def run_without(left_out: tuple[str, ...], body: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process in which importing any of `left_out` raises."""
    program = f"""
    import sys

    class Blocker:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] in {left_out!r}:
                raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

    sys.meta_path.insert(0, Blocker)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program) + textwrap.dedent(body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", LINKED)
def test_linked_packages_refuse_their_bare_names(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"jq.{name}" in done.stderr


def test_import_needs_jax_alone():
    done = run_without(LEFT_OUT, "import jq, jq.matmul, jq.pallas_kernels\nprint(jq.__name__)")
    assert (done.returncode, done.stdout) == (0, "jq\n"), done.stderr


def test_every_kernel_imports_with_jax_alone():
    body = """
    import importlib, pkgutil
    import jq.pallas_kernels as kernels

    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
    """
    done = run_without(LEFT_OUT, body)
    assert done.returncode == 0, done.stderr
    assert "jq.pallas_kernels.reference" in done.stdout.split()


def test_the_blocker_blocks():
    done = run_without(LEFT_OUT, "import flax")
    assert done.returncode == 1
    assert "blocked: flax" in done.stderr
