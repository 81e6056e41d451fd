"""What every test runs under: the CPU, checked annotations and strict promotion.

Annotations. The package imports jaxtyping's names under `TYPE_CHECKING` only, so that it runs
without jaxtyping installed. A checker cannot resolve such names, and passes them silently. Here
they are put where a name is looked up last, before jaxtyping's import hook wraps every function
of the package in beartype: the same sources, with every shape and dtype checked.

Promotion. Mixed dtypes and mixed ranks raise: a silent cast to float32 or a broadcast over a
wrong axis is a bug far more often than a wish. A test that has to run foreign code which mixes
them says so with `@pytest.mark.loose_promotion`.

Everything is set before the first import of the package, hence the order of this file.
"""

import builtins
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# int is a float where a float is asked for, as PEP 484 says.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

_OTHER_NAMES = ("Array", "ArrayLike", "PRNGKeyArray", "PyTree", "Scalar", "ScalarLike")


def jaxtyping_names() -> tuple[str, ...]:
    """Every name of jaxtyping that an annotation of the package may use."""
    dtypes = (
        name
        for name, value in vars(jaxtyping).items()
        if isinstance(value, type) and issubclass(value, jaxtyping.AbstractDtype)
    )
    return (*sorted(set(dtypes) - {"AbstractDtype"}), *_OTHER_NAMES)


for _name in jaxtyping_names():
    setattr(builtins, _name, getattr(jaxtyping, _name))
jaxtyping.install_import_hook("jq", TYPECHECKER)

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
