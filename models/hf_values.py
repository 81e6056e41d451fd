"""Reading single entries of Hugging Face JSON files; ModelError names the key and its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; ModelError naming the file where it is missing or malformed."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: {path.parent} is not a Hugging Face model folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id` style entry: null, a number or a list of numbers."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelError(f"token ids must be integers, got {value!r}")
    return tuple(values)


def integer(values: Mapping[str, Any], key: str) -> int:
    """An entry that must be there and an integer."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def number(values: Mapping[str, Any], key: str, default: float) -> float:
    """A number, or the default where the key is missing."""
    value = values.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def flag(values: Mapping[str, Any], key: bool | str) -> bool:
    """A truth value, False where the key is missing; a bool instead of a key is the answer."""
    if isinstance(key, bool):
        return key
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the entries that are null."""
    return {key: value for key, value in values.items() if value is not None}
