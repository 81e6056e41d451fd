"""The folder of a comparison: a spec, tokens, and a file per arm that appears whole or not at all.

OUT/spec.json           the frozen spec and its hash
OUT/tokens.npz          calibration and evaluation tokens
OUT/arms/awq.json       what was measured; awq.made.json: of its making alone
OUT/arms/awq/           the checkpoint; awq.log: what its processes wrote
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq.calib.tokens import CalibrationData
from jq.checkpoint import files
from jq.compare.arms import Arm
from jq.compare.spec import ComparisonSpec
from jq.errors import OutputError

FORMAT = 1
DONE, FAILED = "done", "failed"


class Store:
    """Opens the folder of a comparison, or makes it.

    Raises: OutputError for a folder of something else, or of a comparison under another spec.
    """

    def __init__(self, folder: str | os.PathLike[str], spec: ComparisonSpec) -> None:
        self.folder, self.spec = Path(folder), spec
        self.hash = spec.hash
        file = self.folder / "spec.json"
        if file.is_file():
            known = _read(file)
            spec.check_same(known.get("spec", {}), str(self.folder))
            if known.get("hash") != self.hash:
                raise OutputError(f"{file} was changed by hand: its hash is not that of its spec")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise OutputError(
                f"{self.folder} is not empty and holds no comparison; choose another folder"
            )
        with files.output_errors(self.folder):
            (self.folder / "arms").mkdir(parents=True, exist_ok=True)
        write_json(file, {"hash": self.hash, "spec": spec.to_dict()})

    def checkpoint(self, arm: Arm) -> Path:
        """Where the arm's quantized model is."""
        return self.folder / "arms" / arm.name

    def log(self, arm: Arm) -> Path:
        """Where its processes write."""
        return self.folder / "arms" / f"{arm.name}.log"

    def result(self, arm: Arm) -> dict[str, Any] | None:
        """What was measured of this very arm; None if it is not there, or failed.

        Raises: OutputError for a result of another recipe, or of another spec.
        """
        result = self._load(arm, "json")
        return result if result is not None and result["status"] == DONE else None

    def made(self, arm: Arm) -> dict[str, Any] | None:
        """What its making told, if its checkpoint is still there; raises as `result`."""
        made = self._load(arm, "made.json")
        return made["made"] if made is not None and self.checkpoint(arm).is_dir() else None

    def write_made(self, arm: Arm, made: Mapping[str, Any]) -> None:
        """Keep what the making told, so that a stopped run need not make it again."""
        self._save(arm, "made.json", {"made": dict(made)})

    def write_result(self, arm: Arm, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result, of status `DONE` or `FAILED`; returns it with its hashes."""
        return self._save(arm, "json", result)

    def discard(self, arm: Arm) -> None:
        """Remove the checkpoint, and keep what was measured."""
        shutil.rmtree(self.checkpoint(arm), ignore_errors=True)

    def write_tokens(self, calibration: CalibrationData | None, evaluation: np.ndarray) -> None:
        """Keep the tokens, for the arms and for whoever wants to look."""
        arrays: dict[str, np.ndarray] = {"evaluation": evaluation}
        if calibration is not None:
            arrays["calibration"] = calibration.tokens
            if calibration.mask is not None:
                arrays["mask"] = calibration.mask
        partial = self.folder / ".tokens.npz"
        with files.output_errors(partial):
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
            os.replace(partial, self.folder / "tokens.npz")

    def _load(self, arm: Arm, ending: str) -> dict[str, Any] | None:
        file = self.folder / "arms" / f"{arm.name}.{ending}"
        if not file.is_file():
            return None
        result = _read(file)
        expected = {"format": FORMAT, "spec_hash": self.hash, "arm_hash": arm.hash(self.hash)}
        for key, value in expected.items():
            if result.get(key) != value:
                raise OutputError(
                    f"{file} has {key} {str(result.get(key))[:12]}, this comparison "
                    f"{str(value)[:12]}: results that were made differently are not merged. Choose "
                    "another folder, or remove the file to run the arm again"
                )
        return result

    def _save(self, arm: Arm, ending: str, result: Mapping[str, Any]) -> dict[str, Any]:
        whole = {
            "format": FORMAT,
            "arm": arm.name,
            "spec_hash": self.hash,
            "arm_hash": arm.hash(self.hash),
            **result,
        }
        file = self.folder / "arms" / f"{arm.name}.{ending}"
        write_json(file, whole)
        return _read(file)  # as a later run will find it


def load_tokens(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of tokens.npz: "evaluation", and "calibration" and "mask" where there are."""
    with np.load(folder / "tokens.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all; ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all: synced to the disk under another name, then renamed."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with files.output_errors(path):
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        what = "no JSON object"
    except (ValueError, RecursionError) as error:
        what = str(error)
    raise OutputError(f"{file} is damaged ({what}); remove it to go on without")
