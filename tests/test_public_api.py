"""`import jq`: what it offers, that it costs nothing, and that its example runs."""

import ast
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jq
from tests.models import checkpoints
from tests.test_imports import LEFT_OUT, run_without

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "jq" / "__init__.py").read_text()
MODULES = {"calib", "distributed", "errors", "models"}
# Names that need more than JAX and NumPy: models are Flax modules, checkpoints need more.
NEED_FLAX = {"collect", "generate", "load", "quantize_checkpoint", "quantized_dense", "save"}


def fresh(body: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", body],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_that_tools_see_are_the_names_there_are():
    """Type checkers read imports that never run; the table is what runs."""
    seen = {}
    for block in ast.walk(ast.parse(SOURCE)):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for statement in block.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    assert alias.asname == alias.name  # re-exported
                    seen[alias.name] = statement.module
    assert seen == jq._MODULE_OF
    assert jq.__all__ == sorted(seen)
    assert set(jq.__all__) <= set(dir(jq))


@pytest.mark.parametrize("name", jq.__all__)
def test_every_name_is_there(name):
    value = getattr(jq, name)
    assert isinstance(value, types.ModuleType) == (name in MODULES)
    if name != "Recipe":
        assert inspect.getdoc(value)
        assert name.lower() in getattr(value, "__name__", name).lower()


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = jq.quantise


def test_importing_imports_nothing():
    loaded = fresh("import sys, jq; print([m for m in sys.modules if m in ('jax', 'numpy')])")
    assert loaded == "[]"


def test_the_core_needs_jax_alone():
    names = sorted(set(jq.__all__) - NEED_FLAX)
    done = run_without(LEFT_OUT, f"import jq\nprint([getattr(jq, n) for n in {names}] != [])")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    for name in sorted(NEED_FLAX):
        assert run_without(LEFT_OUT, f"import jq\njq.{name}").returncode == 1, name


@pytest.mark.parametrize(
    "before",
    [
        "import jq",
        "import jq.evaluate",
        "import jq.evaluate.statistics, jq.oneshot, jq.calib.collect, jq.models.generation",
        "from jq.evaluate import perplexity",
        "import jq; jq.evaluate; import jq.evaluate.run",
    ],
)
def test_functions_are_functions_whatever_was_imported_before(before):
    body = f"""
{before}
import jq, types
from jq import evaluate
from jq.models import generate
functions = [jq.evaluate, evaluate, jq.quantize, jq.collect, jq.generate, generate]
from jq.evaluate import evaluate as again, statistics
from jq.models import generate
print(all(isinstance(f, types.FunctionType) for f in [*functions, generate]))
print(again is evaluate, statistics.__name__, jq.errors.__name__, jq.models.__name__)
"""
    lines = fresh(body).splitlines()
    assert lines == ["True", "True jq.evaluate.statistics jq.errors jq.models"]


@pytest.mark.parametrize("package", ["jq", "jq.models", "jq.calib", "jq.checkpoint"])
def test_no_name_is_also_a_module(package):
    """A module of the same name would hide it, once something imports the module."""
    module = sys.modules.get(package) or __import__(package, fromlist=["*"])
    folder = Path(module.__path__[0])
    inside = {p.stem for p in folder.glob("*.py")} | {
        p.parent.name for p in folder.glob("*/__init__.py")
    }
    assert inside
    allowed = MODULES | {"evaluate", "prepare"} if package == "jq" else set()
    assert set(module.__all__) & inside <= allowed


def example() -> str:
    """The program in the docstring."""
    lines = jq.__doc__.splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = checkpoints.CONFIGS["llama3"] | {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
    }
    checkpoints.write(tmp_path / "path" / "to" / "model", raw)
    rng = np.random.default_rng(0)
    names = {
        "tokens": rng.integers(0, 64, (2, 40), dtype=np.int32),
        "held_out": rng.integers(0, 64, 300),
    }
    assert example().startswith("import jq\n")
    exec(compile(example(), "jq.__doc__", "exec"), names)
    assert names["result"].kl.value > 0
    linears = [linear for block in names["reports"] for linear in block.linears]
    assert {linear.method.split("(")[0] for linear in linears} == {"GPTQ"}
    assert len(linears) == 7
    _, params = jq.load("model-int4")
    assert json.loads((tmp_path / "model-int4" / "config.json").read_text())["hidden_size"] == 128
    assert isinstance(params["layers_0"]["mlp"]["up_proj"]["kernel"], jq.QTensor)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(names["small"]), strict=True):
        np.testing.assert_array_equal(left, right)
