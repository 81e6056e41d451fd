"""Fixtures of the tests of tasks."""

import importlib.util

import pytest

from tests.jq.tasks import tiny

HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """(model, parameters, tokenizer)."""
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of tasks; skips where the harness is missing."""
    if not HARNESS:
        pytest.skip("needs lm-evaluation-harness: pip install -e '.[tasks]'")
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """No network, and data sets kept in a folder of the tests."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
