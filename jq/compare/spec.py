"""What all arms of a comparison have in common, frozen, and its hash.

Results made under different specs answer different questions: they are never put in one table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jq.errors import ModelError, OutputError

_CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class ComparisonSpec:
    """Everything but the method.  All values are JSON values.

    Attributes:
        model: name, and the sha256 of its files.
        numbers: format of the weight-only arms, linears left out.
        calibration: where the tokens came from, how they were chosen, their sha256; None without.
        evaluation: the same of the text measured on; seq_len, windows, words per token.
        timing: batch sizes, prompt length, steps; None when nothing is timed.
        tasks: by name; of the harness's also its version, the metric, the items' digest.
        batch_size: windows that run at once, in calibration and in evaluation.
        versions: of jaxq, jax, jaxlib, numpy and Python.
        device: what it ran on; "used" where several devices shared the work.
    """

    model: Mapping[str, Any]
    numbers: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    evaluation: Mapping[str, Any]
    timing: Mapping[str, Any] | None
    tasks: Mapping[str, Any]
    batch_size: int
    versions: Mapping[str, str]
    device: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the sorted JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_same(self, other: Mapping[str, Any], where: str) -> None:
        """Raise OutputError, naming what differs, unless `other` (of `to_dict`) is this spec."""
        found = differences(other, self.to_dict())
        if found:
            shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if found[4:] else "")
            raise OutputError(
                f"{where} holds a comparison under another spec, and the two make no table "
                f"together: {shown}. Choose another folder, or repeat the former call"
            )


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """ "evaluation.seq_len was 512, is 256", for every value that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            text
            for key in keys
            for text in differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if before == now else [f"{path} was {_short(before)}, is {_short(now)}"]


def model_digest(
    folder: Path, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Name and sha256 of a model folder: of its config, tokenizer and weights.

    progress: called with (bytes read, bytes in all, file).
    Raises: ModelError for a folder without weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} has no .safetensors files; give a Hugging Face model folder")
    others = [folder / name for name in ("config.json", "tokenizer.json")]
    files = [path for path in (*others, *weights) if path.is_file()]
    total, done = sum(path.stat().st_size for path in files), 0
    sha = hashlib.sha256()
    for path in files:
        sha.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total, path.name)
    return {"name": folder.resolve().name, "sha256": sha.hexdigest()}


def versions() -> dict[str, str]:
    """Of what has a say in results."""
    names = ("jaxq", "jax", "jaxlib", "numpy")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def device_facts() -> dict[str, Any]:
    """What JAX computes on in this process, as far as results or timings depend on it; starts
    JAX's backend."""
    import jax

    devices = jax.devices()
    facts: dict[str, Any] = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "matmul_precision": jax.config.jax_default_matmul_precision,
    }
    if devices[0].platform == "cpu":
        facts |= {"kind": _processor(), "cores": usable_cores()}
    return facts


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-12:]
