"""The library's frozen dataclasses as command-line options.

The options of a method are the fields of its class, with its defaults, and their help is what its
docstring says; there is no second list to keep.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import tyro

from jq.errors import SpecError

CONFIG = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.UseAppendAction,
)


def parse(options: Any, command: str, description: str, arguments: Sequence[str]) -> Any:
    """Parse arguments into an instance of a dataclass; raises SystemExit as tyro does."""
    _leave_none_unsaid(options)
    return tyro.cli(
        options,
        prog=f"jaxq {command}",
        description=description,
        args=arguments,
        config=CONFIG,
    )


def _leave_none_unsaid(options: Any) -> None:
    """Let the help of options that are None unless given not speak of it, as in "{None}|INT
    (default: None)": what that means is for their own texts to say."""
    plain = typing.get_type_hints(options)
    whole = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        name = field.name
        if dataclasses.is_dataclass(plain[name]):
            _leave_none_unsaid(plain[name])
        elif field.default is None:
            told = getattr(whole[name], "__metadata__", ())
            named = any(getattr(one, "metavar", None) for one in told)
            unsaid = tyro.conf.arg(
                metavar=None if named else _metavar(plain[name]), help_behavior_hint=""
            )
            options.__annotations__[name] = Annotated[whole[name], unsaid]


def _metavar(hint: Any) -> str | None:
    """How help writes a type, without its None; None for unions of more."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if len(kinds) != 1:
        return None
    choices = typing.get_args(kinds[0])
    return f"{{{','.join(choices)}}}" if choices else kinds[0].__name__.upper()


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of an option that decides which other options there are; None if not given."""
    for i, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def split_names(values: Sequence[str]) -> tuple[str, ...]:
    """Names between commas of an option that may be given again, each once."""
    names = (part.strip() for value in values for part in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def split_counts(text: str, flag: str) -> tuple[int, ...]:
    """Counts of 1 or more between commas, each once.

    Raises: SpecError, naming the option, for anything else.
    """
    parts = split_names([text])
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SpecError(f"{flag} {text!r}: give numbers of 1 or more, like 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def options_class(defaults: Any, changes: Mapping[str, Any] = MappingProxyType({})) -> type:
    """The options that stand for a frozen dataclass, as a dataclass for `parse`.

    defaults: an instance; its values are the defaults, its class's docstring is the help. Nested
      dataclasses become nested ones.
    changes: field -> (type, default, metavar) where the command line's differ.
    """
    kind = type(defaults)
    hints = typing.get_type_hints(kind)
    texts = field_help(kind)
    fields = []
    for field in dataclasses.fields(kind):
        name, value = field.name, getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            nested = options_class(value)
            fields.append((name, nested, dataclasses.field(default_factory=nested)))
            continue
        hint, value, metavar = changes.get(name, (hints[name], value, None))
        annotated = Annotated[hint, tyro.conf.arg(help=texts[name], metavar=metavar)]
        fields.append((name, annotated, dataclasses.field(default=value)))
    # In this module's namespace, as tyro looks types up by it.
    return dataclasses.make_dataclass(
        f"{kind.__name__}Options",
        fields,
        frozen=True,
        namespace={"__doc__": "", "__module__": __name__},
    )


def rebuild(defaults: Any, options: Any) -> Any:
    """`defaults` with the values of an instance of `options_class(defaults)`.

    The class's own checks run here, and raise its own errors.
    """
    values = {}
    for field in dataclasses.fields(options):
        value, default = getattr(options, field.name), getattr(defaults, field.name)
        values[field.name] = rebuild(default, value) if dataclasses.is_dataclass(value) else value
    return dataclasses.replace(defaults, **values)


def field_help(kind: type) -> dict[str, str]:
    """What a class's docstring says of each field ("name: text" or "one, two: text", with
    continuation lines indented further)."""
    names = {field.name for field in dataclasses.fields(kind)}
    texts = dict.fromkeys(names, "")
    current: tuple[str, ...] = ()
    for line in (kind.__doc__ or "").splitlines():
        start = re.match(r"\s*(\w+(?:, \w+)*): (.*)", line)
        if start and set(keys := start.group(1).split(", ")) <= names:
            current = tuple(keys)
            for key in current:
                texts[key] = start.group(2).strip()
        elif not line.strip():
            current = ()
        else:
            for key in current:
                texts[key] += " " + line.strip()
    return texts
