"""Slash-separated paths into nested parameter dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at "a/b/c".  Raises KeyError with the whole path."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise KeyError(path)
        node = node[key]
    return node


def has(tree: Mapping[str, Any], path: str) -> bool:
    """Whether `get` would find something."""
    try:
        get(tree, path)
    except KeyError:
        return False
    return True


def replace(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one entry set; untouched branches are shared."""
    head, _, rest = path.partition("/")
    out = dict(tree)
    out[head] = replace(tree.get(head, {}), rest, value) if rest else value
    return out


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in order; a leaf is whatever is not a mapping, QTensors included."""
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, value
