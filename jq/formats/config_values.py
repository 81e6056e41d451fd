"""Reading single entries of a `quantization_config`; ModelError names the entry and its value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jq.errors import ModelError, SpecError


def entry(raw: Mapping[str, Any], keys: Sequence[str], default: Any) -> Any:
    """The value of the first of the keys that is there and not null."""
    return next((raw[key] for key in keys if raw.get(key) is not None), default)


def integer(value: Any, name: str) -> int:
    """An integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"{name} must be an integer, got {value!r}")
    return value


def flag(value: Any, name: str) -> bool:
    """A truth value."""
    if not isinstance(value, bool):
        raise ModelError(f"{name} must be true or false, got {value!r}")
    return value


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise ModelError(f"{name} must be an object, got {value!r}")
    return value


def names(value: Any, name: str) -> tuple[str, ...]:
    """A list of names, or of such lists."""
    if not isinstance(value, list):
        raise ModelError(f"{name} must be a list of names, got {value!r}")
    flat: list[Any] = []
    for item in value:
        flat += item if isinstance(item, list) else [item]
    for item in flat:
        if not isinstance(item, str):
            raise ModelError(f"{name} must hold names, got {item!r}")
    return tuple(flat)


def choice(value: Any, known: Sequence[Any], name: str) -> None:
    """Raise ModelError unless the value is one of the known ones."""
    if value not in known:
        raise ModelError(
            f"{name} {value!r} cannot be read; known: {', '.join(str(k) for k in known)}"
        )


def pattern(text: str, name: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ModelError(f"{name}: no regular expression: {error}") from error


def scheme[T](make: Callable[..., T], where: str, **fields: Any) -> T:
    """Make a scheme, whose refusals become ModelErrors that say where it was described."""
    try:
        return make(**fields)
    except SpecError as error:
        raise ModelError(f"{where}: {error}") from error
