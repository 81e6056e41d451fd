"""What the machine has: memory of the device and the host, disk, and rates; the check of a run."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jq.errors import JaxqError, OutputError, ResourceError
from jq.requirements.memory import STATES, Requirements
from jq.requirements.workload import Run

# Python, JAX and the compiler, beside all arrays.
PROCESS_BYTES = 500_000_000
_MEMORY_INFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bytes that are free; None where the machine does not tell.

    device: None as well where the device computes in host memory.
    own_memory: whether the device has memory of its own.
    kind: of the device.
    """

    device: int | None
    host: int | None
    disk: int | None
    own_memory: bool = True
    kind: str = "device"


def machine(folder: Path) -> Machine:
    """What there is here, for a run that writes to `folder`, which need not exist."""
    device = jax.local_devices()[0]
    return Machine(
        device=_device_bytes(device),
        host=host_bytes(),
        disk=_disk_bytes(folder),
        own_memory=device.platform != "cpu",
        kind=device.device_kind,
    )


def host_bytes(memory_info: Path = _MEMORY_INFO, cgroup: Path = _CGROUP) -> int | None:
    """Host memory that can be had without swapping: of the machine, or less where the process is
    confined (cgroup v2).  None where neither is told."""
    free = []
    if memory_info.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", memory_info.read_text())
        free += [int(found.group(1)) * 1024] if found else []
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        statistics = cgroup / "memory.stat"
        text = statistics.read_text() if statistics.is_file() else ""
        found = re.search(r"^inactive_file (\d+)$", text, re.M)  # given back when asked for
        free.append(limit - used + (int(found.group(1)) if found else 0))
    return min(free, default=None)


def _number(file: Path) -> int | None:
    """The number a file holds; None without the file, or for "max"."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _device_bytes(device: Any) -> int | None:
    told = device.memory_stats() if device.platform != "cpu" else None
    if not told or "bytes_limit" not in told:
        return None
    return told["bytes_limit"] - told.get("bytes_in_use", 0)


def _disk_bytes(folder: Path) -> int | None:
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        return shutil.disk_usage(parent).free
    except OSError:
        return None


def check(
    run: Run, needed: Requirements, there: Machine, folder: Path, *, on_disk: int = 0
) -> None:
    """Refuse a run that does not fit.

    Args:
      run, needed: the run and what it needs.
      there: what is free.
      folder: where the output goes, for the message.
      on_disk: bytes that an unfinished run has written there already.
    Raises: ResourceError for memory, OutputError for disk, with both numbers and the way out.
    """
    error = problem(run, needed, there, folder, on_disk)
    if error is not None:
        raise error


def problem(
    run: Run, needed: Requirements, there: Machine, folder: Path, on_disk: int = 0
) -> JaxqError | None:
    """What `check` raises."""
    if there.own_memory and there.device is not None and needed.device > there.device:
        return ResourceError(
            f"{there.kind}: a block needs {size(needed.device)} of memory "
            f"({_listed(needed.device_parts)}) and {size(there.device)} are free: "
            f"{_way_out(run, needed.device_parts)}"
        )
    parts = needed.host_parts if there.own_memory else needed.shared_parts
    host = sum(parts.values()) + PROCESS_BYTES
    if there.host is not None and host > there.host:
        return ResourceError(
            f"host memory: {size(host)} are needed ({_listed(parts)}) and {size(there.host)} are "
            f"free: {_way_out(run, parts, host=True)}"
        )
    left = max(needed.disk - on_disk, 0)
    if there.disk is not None and left > there.disk:
        return OutputError(
            f"{folder}: output and journal need {size(left)} and {size(there.disk)} are free: "
            "choose a folder on another disk, or make room"
        )
    return None


def size(count: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _listed(parts: Mapping[str, int]) -> str:
    """The parts that matter, the largest first."""
    order = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(count)}" for name, count in order[:3] if count)


def _way_out(run: Run, parts: Mapping[str, int], *, host: bool = False) -> str:
    ways = []
    largest = max(parts, key=lambda name: parts[name])
    if run.calibrates and STATES in parts:
        if not run.offload and not host:
            ways.append("keep hidden states in host memory (--offload)")
        elif run.offload and not host and run.batch_size > 1:
            ways.append("a smaller --batch-size")
        if host or (largest == STATES and not run.offload):
            ways.append("fewer or shorter samples (--calib-samples, --calib-seqlen)")
    ways.append("a machine with more host memory" if host else "a device with more memory")
    return ", or ".join(ways)
