"""Checked annotations: what jaxtyping's import hook applies to every function of the package.

The package imports jaxtyping's names under `TYPE_CHECKING` only, so that it runs without jaxtyping
installed. The hook cannot resolve such names, and passes what it cannot resolve. `install`
therefore puts them where a name is looked up last: the same sources, with every shape and dtype
checked.
"""

import builtins
from collections.abc import Callable

import beartype
import jaxtyping

_OTHER_NAMES = ("Array", "ArrayLike", "PRNGKeyArray", "PyTree", "Scalar", "ScalarLike")
# PEP 484: where a float is asked for, an int will do.
_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def jaxtyping_names() -> tuple[str, ...]:
    """Every name of jaxtyping that an annotation of the package may use."""
    dtypes = {
        name
        for name, value in vars(jaxtyping).items()
        if isinstance(value, type) and issubclass(value, jaxtyping.AbstractDtype)
    }
    return (*sorted(dtypes - {"AbstractDtype"}), *_OTHER_NAMES)


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked; constructors as they are.

    JAX rebuilds pytrees from leaves of any type (tracers, shapes, None), and the constructor of a
    configuration raises the library's own errors, which tests have to see.
    """
    return function if function.__name__ == "__init__" else _CHECK(function)


def install(package: str) -> None:
    """Check the annotations of `package`, which must not have been imported yet."""
    for name in jaxtyping_names():
        setattr(builtins, name, getattr(jaxtyping, name))
    jaxtyping.install_import_hook(package, f"{__name__}.check")
