"""What every test runs under: the CPU, checked annotations, strict promotion, kept programs.

Mixed dtypes and mixed ranks raise: a silent cast to float32 or a broadcast over a wrong axis is a
bug far more often than a wish. A test that has to run foreign code which mixes them says so with
`@pytest.mark.loose_promotion`. Warnings are errors (pyproject.toml).
"""

import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import pytest

from tests import checking

checking.install("jq")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started the tests in the background; those of interruptions send the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time goes into compiling: what one worker, or an earlier run, has compiled is kept.
COMPILED = Path(__file__).parents[1] / ".pytest_cache/jax"
MAX_COMPILED_BYTES = 2**30
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker runs whole files, and the last ones should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Forget the programs that were compiled first where the cache has become too large.

    JAX can bound it too, but then looks at every file, under a lock, whenever it adds one.
    """
    if hasattr(session.config, "workerinput") or not COMPILED.is_dir():
        return  # one process looks after it
    files = sorted(
        (file for file in COMPILED.iterdir() if file.is_file()), key=lambda f: f.stat().st_mtime
    )
    excess = sum(file.stat().st_size for file in files) - MAX_COMPILED_BYTES
    for file in files:
        if excess <= 0:
            return
        excess -= file.stat().st_size
        file.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _promotion(request: pytest.FixtureRequest):
    """Strict promotion, or JAX's own rules for a test marked `loose_promotion`."""
    if request.node.get_closest_marker("loose_promotion") is None:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def fast_compiles():
    """Programs that compile in half the time and run slower: tests run each but once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
