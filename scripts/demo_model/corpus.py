"""Text that every Python installation carries: language topics and the library's docstrings.

The standard library's sources are parsed, never imported, and laid out as `help()` does.  The
result depends on the installed Python alone: documents are ordered and split by digests of their
names.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Tests, bundled packages and programs; sources that differ from machine to machine.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    | {"ensurepip", "pydoc_data", "__pycache__", "lib-dynload", "__phello__"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars", "__hello__")

# Two documents are "the same text" somewhere where they share a run of this many words.
RUN = 10
MIN_DOCUMENT = 200
MIN_HELD_OUT = 60_000

_WORD = re.compile(r"\w+")
_PARAGRAPHS = re.compile(r"\n\s*\n")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Document(NamedTuple):
    """One topic or module: "topic/for", "module/json.decoder"."""

    name: str
    text: str


class Split(NamedTuple):
    """Documents to train on and documents held out; no run of `RUN` words is in both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def build(held_out: float = 0.05, min_held_out: int = MIN_HELD_OUT) -> Split:
    """The corpus of this Python, split.

    Args:
        held_out: share of the characters held out.
        min_held_out: at least this many characters are.
    """
    documents = [*topics(), *builtin_documents(), *library_documents(stdlib_folder())]
    return split(deduplicate(documents), held_out, min_held_out)


def stdlib_folder() -> Path:
    """Where the standard library's sources are, in a virtual environment too."""
    return Path(sysconfig.get_path("stdlib"))


def topics() -> list[Document]:
    """What `help("for")` and its like show."""
    import pydoc_data.topics

    table: Mapping[str, str] = pydoc_data.topics.topics
    return [Document(f"topic/{name}", _clean(table[name])) for name in sorted(table)]


def builtin_documents() -> list[Document]:
    """Docstrings of the built-in functions, classes and their methods."""
    out = []
    for name, value in sorted(vars(builtins).items()):
        # Other things may have been put there (`exit` by site, names by tools).
        if getattr(value, "__module__", None) != "builtins" or not callable(value):
            continue
        seen: set[str] = set()
        lines = _entry(name, _signature(value), inspect.getdoc(value), 0, seen)
        for method, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
            lines += _entry(method, _signature(member), _own_doc(member), 4, seen)
        if lines:
            out.append(Document(f"builtin/{name}", "\n".join(lines)))
    return out


def library_documents(root: Path) -> list[Document]:
    """One document per module of the standard library that has docstrings, in order of its path."""
    seen: set[str] = set()
    out = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if any(p in SKIPPED_FOLDERS or p.startswith(SKIPPED_PREFIXES) for p in parts):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        text = module_text(name, file.read_bytes(), seen)
        if text:
            out.append(Document(f"module/{name}", text))
    return out


def module_text(name: str, source: bytes, seen: set[str]) -> str:
    """A module's docstrings as `help()` lays them out; those in `seen` (kept up to date) left out.

    Empty where there are none, or where the source is not of this Python's syntax.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    lines = _paragraph(ast.get_docstring(tree), 0, seen)
    if lines:
        lines.append("")
    lines += _members(tree, 0, seen)
    return _clean("\n".join([f"Help on module {name}:", "", *lines])) if lines else ""


def _members(node: ast.AST, indent: int, seen: set[str]) -> list[str]:
    lines: list[str] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            title = f"({bases})" if bases else ""
            own = _entry(f"class {child.name}", title, ast.get_docstring(child), indent, seen)
            members = _members(child, indent + 4, seen)
            if members and not own:
                own = [" " * indent + f"class {child.name}{title}", ""]
            lines += own + members
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = f"({ast.unparse(child.args)})"
            lines += _entry(child.name, arguments, ast.get_docstring(child), indent, seen)
        elif isinstance(child, ast.If | ast.Try):
            lines += _members(child, indent, seen)
    return lines


def _entry(name: str, signature: str, doc: str | None, indent: int, seen: set[str]) -> list[str]:
    body = _paragraph(doc, indent + 4, seen)
    return [" " * indent + name + signature, *body, ""] if body else []


def _paragraph(doc: str | None, indent: int, seen: set[str]) -> list[str]:
    """The docstring's indented lines; none where it is empty or was seen before."""
    key = " ".join((doc or "").split())
    if not key or key in seen:
        return []
    seen.add(key)
    return [(" " * indent + line).rstrip() for line in _clean(doc or "").splitlines()]


def _own_doc(member: object) -> str | None:
    doc = getattr(member, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else None


def _signature(value: object) -> str:
    text = getattr(value, "__text_signature__", None)
    return text.replace("$", "") if isinstance(text, str) else ""


def _clean(text: str) -> str:
    lines = [line.rstrip() for line in text.expandtabs(8).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def runs(paragraph: str) -> set[str]:
    """All runs of `RUN` words; of a shorter paragraph, none."""
    words = _WORD.findall(paragraph.lower())
    return {" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Drop paragraphs that say what a longer document says already, then documents mostly dropped.

    The topics hold one another (`specialnames` has all of `customization`).
    """
    seen: set[str] = set()
    kept = {}
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        paragraphs = _PARAGRAPHS.split(document.text)
        own = [runs(p) for p in paragraphs]
        fresh = [p for p, r in zip(paragraphs, own, strict=True) if not r or not r <= seen]
        seen.update(*own)
        text = "\n\n".join(fresh)
        if len(text) >= max(MIN_DOCUMENT, len(document.text) // 2):
            kept[document.name] = Document(document.name, text)
    return [kept[name] for name in sorted(kept)]


def split(documents: Sequence[Document], share: float, minimum: int) -> Split:
    """Hold out whole documents, chosen by the digests of their names.

    Paragraphs of the others that share a run of words with a held-out one are dropped.
    """
    target = max(minimum, int(share * sum(len(d.text) for d in documents)))
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda d: _digest(d.name)):
        # No document may be a large part of the evaluation.
        if size < target and len(document.text) <= target // 8:
            chosen.add(document.name)
            size += len(document.text)
    held_out = tuple(d for d in documents if d.name in chosen)
    known = set[str]().union(*(runs(p) for d in held_out for p in _PARAGRAPHS.split(d.text)))
    train = (_without(d, known) for d in documents if d.name not in chosen)
    return Split(tuple(d for d in train if len(d.text) >= MIN_DOCUMENT), held_out)


def sample(documents: Iterable[Document], characters: int) -> list[Document]:
    """The first documents, of which none is more than a tenth of the sample."""
    out: list[Document] = []
    for document in documents:
        room = characters - sum(len(d.text) for d in out)
        if len(document.text) <= min(room, characters // 10):
            out.append(document)
    return out


def joined(documents: Iterable[Document]) -> str:
    """One text, documents separated by blank lines."""
    return "\n\n\n".join(d.text for d in documents) + "\n"


def _without(document: Document, known: set[str]) -> Document:
    kept = [p for p in _PARAGRAPHS.split(document.text) if known.isdisjoint(runs(p))]
    return Document(document.name, "\n\n".join(kept))


def shuffled(documents: Iterable[Document]) -> list[Document]:
    """In the order of the digests of their names: topics and modules mixed, the same every time."""
    return sorted(documents, key=lambda d: _digest(d.name))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
