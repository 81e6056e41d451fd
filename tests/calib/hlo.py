"""The collectives of compiled programs, read from their text."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from typing import Any

import jax

_OPERATION = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

Found = Counter[tuple[str, int]]


def collectives(text: str) -> Found:
    """(kind, bytes of the result) of every collective of a program, arrays one by one."""
    found: Found = Counter()
    for result, kind in _OPERATION.findall(text):
        for bits, shape in _ARRAY.findall(result):
            count = math.prod(int(n) for n in shape.split(",") if n)
            found[kind, count * int(bits or 8) // 8] += 1
    return found


class Recorder:
    """Runs jitted programs of a module and counts what every call exchanges.

    programs: names of the programs -> their static arguments.
    """

    def __init__(self, patch: Any, module: Any, programs: dict[str, set[str]]) -> None:
        self.found: Found = Counter()
        self._compiled: dict[Any, tuple[Any, Found]] = {}
        for name, static in programs.items():
            patch.setattr(module, name, self._recorded(getattr(module, name), name, static))

    def _recorded(self, program: Any, name: str, static: set[str]) -> Any:
        signature = inspect.signature(program)

        def call(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options).arguments
            fixed = {k: v for k, v in given.items() if k in static}
            arrays = {k: v for k, v in given.items() if k not in static}
            leaves, structure = jax.tree.flatten(arrays)
            shapes = tuple((a.shape, a.dtype, a.sharding) for a in leaves)
            key = name, tuple(sorted(fixed.items(), key=str)), structure, shapes
            if key not in self._compiled:
                compiled = program.lower(*args, **options).compile()
                self._compiled[key] = compiled, collectives(compiled.as_text())
            compiled, exchanged = self._compiled[key]
            self.found.update(exchanged)
            return compiled(
                *(
                    a
                    for a, name in zip(args, signature.parameters, strict=False)
                    if name not in static
                ),
                **{k: v for k, v in options.items() if k not in static},
            )

        return call
