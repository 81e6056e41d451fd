"""Fixtures of the calibration tests."""

import jax
import pytest


@pytest.fixture
def fast_compiles():
    """Programs that compile in half the time and run slower: tests run each but once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
