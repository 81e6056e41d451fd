"""What every test runs under: the CPU, checked annotations and strict promotion.

Mixed dtypes and mixed ranks raise: a silent cast to float32 or a broadcast over a wrong axis is a
bug far more often than a wish. A test that has to run foreign code which mixes them says so with
`@pytest.mark.loose_promotion`. Warnings are errors (pyproject.toml).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import pytest

from tests import checking

checking.install("jq")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _promotion(request: pytest.FixtureRequest):
    """Strict promotion, or JAX's own rules for a test marked `loose_promotion`."""
    if request.node.get_closest_marker("loose_promotion") is None:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
