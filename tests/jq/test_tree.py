"""Slash-separated paths."""

import pytest

from jq import tree

TREE = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


def test_get_and_has():
    assert tree.get(TREE, "a/b/c") == 1
    assert tree.get(TREE, "a/b") == {"c": 1}
    assert tree.has(TREE, "a/d")
    for missing in ("a/x", "e/f", "a/b/c/d", "x", ""):
        assert not tree.has(TREE, missing)
        with pytest.raises(KeyError, match=f"'{missing}'"):
            tree.get(TREE, missing)


def test_replace_copies_only_the_branch():
    new = tree.replace(TREE, "a/b/c", 9)
    assert new == {"a": {"b": {"c": 9}, "d": 2}, "e": 3}
    assert TREE["a"]["b"]["c"] == 1
    assert tree.replace(TREE, "f/g", 1)["f"] == {"g": 1}
    assert tree.replace({"x": TREE["a"], "y": TREE["a"]}, "x/d", 0)["y"] is TREE["a"]


def test_leaves_are_in_order():
    assert list(tree.leaves(TREE)) == [("a/b/c", 1), ("a/d", 2), ("e", 3)]
    assert list(tree.leaves(TREE["a"], "a")) == [("a/b/c", 1), ("a/d", 2)]
