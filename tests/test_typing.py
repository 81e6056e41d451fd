"""The annotations of the package are checked in tests, and cost nothing outside of them."""

import ast
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import jq.packing
from tests import checking

ROOT = Path(__file__).parents[1]
FOLDERS = ("jq", "models", "calib", "pallas_kernels")

MADE_UP = """
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def dot(x: Float[Array, "K N"], y: Float[Array, "N"]) -> Float[Array, "K"]:
    return x @ y


def wrong_result(x: Float[Array, "K N"]) -> Float[Array, "N K"]:
    return x


def scaled(x: Float32[Array, "N"], by: float) -> Float32[Array, "N"]:
    return x * by


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    a: Float[Array, "N"]
    b: Float[Array, "N"]
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A module written as the package's are, imported under the same hook."""
    (tmp_path / "made_up_module.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    with jaxtyping.install_import_hook("made_up_module", "tests.checking.check"):
        yield importlib.import_module("made_up_module")
    del sys.modules["made_up_module"]


def test_right_shapes_pass(made_up):
    assert made_up.dot(jnp.ones((3, 4)), jnp.ones(4)).shape == (3,)
    assert made_up.scaled(jnp.ones(2), 3)[0] == 3  # an int where a float is asked for


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dot", (jnp.ones((3, 4, 5)), jnp.ones(5))),
        ("dot", (jnp.ones((3, 4)), jnp.ones(5))),
        ("wrong_result", (jnp.ones((3, 4)),)),
        ("scaled", (jnp.ones(2, jnp.bfloat16), 2.0)),
        ("scaled", (jnp.ones(2), "2")),
    ],
    ids=["rank", "size", "result", "dtype", "python type"],
)
def test_wrong_ones_raise(made_up, name, arguments):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"made_up_module.{name}"):
        getattr(made_up, name)(*arguments)


def test_pytrees_hold_any_leaf(made_up):
    pair = made_up.Pair(jnp.ones(2), jnp.ones(2))
    assert jax.tree.map(lambda leaf: "leaf", pair).b == "leaf"


def test_the_package_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="packed_size"):
        jq.packing.packed_size("eight", 4)


def test_promotion_is_strict():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.add(jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32))
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.loose_promotion
def test_the_mark_loosens_promotion():
    mixed = jnp.ones((2, 3), jnp.bfloat16) + jnp.ones(3, jnp.float32)
    assert mixed.dtype == jnp.float32


def misuses(source: str) -> list[str]:
    """Imports of jaxtyping that its users' absence would break, or that no test would check."""
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    lazy = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    )
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == "jaxtyping" for alias in node.names):
                found.append(f"line {node.lineno}: import names with `from jaxtyping import`")
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
            if id(node) not in for_types:
                found.append(f"line {node.lineno}: jaxtyping imported outside TYPE_CHECKING")
            if not lazy:
                found.append(f"line {node.lineno}: needs `from __future__ import annotations`")
            for alias in node.names:
                if alias.asname or alias.name not in checking.jaxtyping_names():
                    found.append(f"line {node.lineno}: {alias.name} would not be checked")
    return found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from jaxtyping import Float", 2),
        ("import jaxtyping", 1),
        ("from __future__ import annotations\nfrom jaxtyping import Float", 1),
        (
            "from __future__ import annotations\nif TYPE_CHECKING:\n"
            "    from jaxtyping import Float as F",
            1,
        ),
        (
            "from __future__ import annotations\nif typing.TYPE_CHECKING:\n"
            "    from jaxtyping import Array, Float",
            0,
        ),
    ],
)
def test_the_search_finds_misuses(source, count):
    assert len(misuses(source)) == count


def test_sources_import_jaxtyping_for_types_only():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > len(FOLDERS)
    found = {str(path.relative_to(ROOT)): misuses(path.read_text()) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
