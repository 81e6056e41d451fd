"""Looking into programs: every equation of a jaxpr, those of its loops and calls included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, depth first.  Takes a ClosedJaxpr or a Jaxpr."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def dots(function, *args) -> list[tuple[str, str, Any]]:
    """(dtype of the left operand, of the right one, precision) of every dot_general."""
    program = jax.make_jaxpr(function)(*args)
    return [
        (*(str(v.aval.dtype) for v in e.invars), e.params["precision"])
        for e in equations(program)
        if e.primitive.name == "dot_general"
    ]


def size(function, *args) -> int:
    """Number of equations."""
    return sum(1 for _ in equations(jax.make_jaxpr(function)(*args)))
