"""Texts to calibrate or evaluate on: local files, `datasets`' file formats, hub datasets.

Documents are joined with a blank line, as the GPTQ paper does with WikiText-2.  Nothing is ever
unpickled or executed: a dataset that needs its own code is refused by `datasets`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jq.errors import CalibrationError

SEPARATOR = "\n\n"
TEXT_SUFFIXES = (".txt", ".jsonl")
# Read through `datasets`, by the name of its loader.
TABLE_SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub: its name, configuration, split and, if only some of its
    files are meant, these."""

    name: str
    config: str | None = None
    split: str = "train"
    files: str | None = None


# For calibration, and for evaluation: the data of LMDeploy's names, where they live today.
ALIASES = {
    "wikitext2": (
        HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ),
    "c4": (
        HubDataset("allenai/c4", files="en/c4-train.00000-of-01024.json.gz"),
        HubDataset(
            "allenai/c4", split="validation", files="en/c4-validation.00000-of-00008.json.gz"
        ),
    ),
    "pile": (
        HubDataset("mit-han-lab/pile-val-backup", split="validation"),
        HubDataset("mit-han-lab/pile-val-backup", split="validation"),
    ),
}
ALIASES["pileval"] = ALIASES["pile"]


def read_text(
    source: str | Path, *, field: str = "text", evaluation: bool = False, max_chars: int
) -> str:
    """The text of a source, its documents joined with a blank line.

    Args:
        source: as `jq.calib.config.CalibrationConfig.calib_dataset` (but for .npy).
        field: of the records that hold the text.
        evaluation: choose the evaluation split of an alias ("wikitext2": test).
        max_chars: stop reading a dataset after the document that passes this many characters;
            .txt and .jsonl files are read whole.

    Raises: CalibrationError for a missing, malformed, unknown or empty source, and for a hub
        dataset that cannot be reached.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if str(source) in ALIASES:
        text = _hub_text(ALIASES[str(source)][evaluation], field, max_chars)
    elif suffix == ".txt":
        text = _read_utf8(path)
    elif suffix == ".jsonl":
        text = SEPARATOR.join(_jsonl(path, field))
    elif suffix in TABLE_SUFFIXES:
        text = _table_text(path, TABLE_SUFFIXES[suffix], field, max_chars)
    elif path.exists():
        kinds = ", ".join((*TEXT_SUFFIXES, ".npy", *TABLE_SUFFIXES))
        raise CalibrationError(f"{path} is none of the kinds that can be read: {kinds}")
    else:
        text = _hub_text(parse_hub_name(str(source)), field, max_chars)
    if not text.strip():
        raise CalibrationError(f"{source} holds no text")
    return text


def parse_hub_name(source: str) -> HubDataset:
    """ "name", "name:config", "name:config:split" or "name::split" -> HubDataset."""
    name, config, split = [*source.split(":"), "", ""][:3]
    if source.count(":") > 2 or not name:
        raise CalibrationError(
            f"{source!r} is no dataset; give a file, {', '.join(ALIASES)} or name:config:split"
        )
    return HubDataset(name, config or None, split or "train")


def require_file(path: Path) -> None:
    """Raise CalibrationError unless `path` is a file."""
    if not path.is_file():
        why = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CalibrationError(f"{path} {why}")


def _read_utf8(path: Path) -> str:
    require_file(path)
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    # Only "\n" ends a record: JSON strings may hold other line separators.
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error
        yield _field(record, field, f"{path}, line {number}")


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, Mapping):
        raise CalibrationError(f"{where} is a {type(record).__name__}, not a record with fields")
    text = record.get(field)
    if not isinstance(text, str):
        have = f"is a {type(text).__name__}" if field in record else "is missing"
        raise CalibrationError(
            f"{where}: field {field!r} {have}, text is wanted; fields: {', '.join(record)}"
        )
    return text


def _table_text(path: Path, loader: str, field: str, max_chars: int) -> str:
    require_file(path)

    def rows() -> Iterable[Any]:
        from datasets import load_dataset

        return load_dataset(loader, data_files=str(path), split="train", streaming=True)

    return _collect(rows, field, max_chars, str(path), "the file cannot be read")


def _hub_text(dataset: HubDataset, field: str, max_chars: int) -> str:
    def rows() -> Iterable[Any]:
        from datasets import load_dataset

        files = None if dataset.files is None else {dataset.split: dataset.files}
        return load_dataset(
            dataset.name, dataset.config, data_files=files, split=dataset.split, streaming=True
        )

    where = f"{dataset.name} ({dataset.config or 'default'}, {dataset.split})"
    wrong = "no such local file, and the dataset cannot be read from the Hugging Face hub"
    return _collect(rows, field, max_chars, where, wrong)


def _collect(
    rows: Callable[[], Iterable[Any]], field: str, max_chars: int, where: str, wrong: str
) -> str:
    """Join rows until there are max_chars characters; every failure of `datasets` is one error."""
    texts: list[str] = []
    size = 0
    try:
        for number, row in enumerate(rows()):
            texts.append(_field(row, field, f"{where}, row {number}"))
            size += len(texts[-1])
            if size >= max_chars:
                break
    except CalibrationError:
        raise
    except Exception as error:  # `datasets` lets through those of its many network and file layers
        reason = str(error).strip().split("\n")[0] or "no reason given"
        raise CalibrationError(
            f"{where}: {wrong} ({type(error).__name__}: {reason}); without a connection use a"
            " local .txt, .jsonl or .npy file"
        ) from error
    return SEPARATOR.join(texts)
