"""CUDA compute capabilities: which GPUs the kernels are for."""

from __future__ import annotations

from typing import Any

from jq.pallas_kernels.ampere.config import CAPABILITIES

HOPPER, ADA = (9, 0), (8, 9)
SERVED = (*CAPABILITIES, HOPPER)


def parse(capability: tuple[int, int] | str) -> tuple[int, int]:
    """(8, 6) of "8.6", as devices spell it."""
    if not isinstance(capability, str):
        return capability
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def told(text: Any) -> tuple[int, int] | None:
    """What a CUDA device says of itself, "8.6", as `parse` has it; None of anything else."""
    if not isinstance(text, str) or not text.replace(".", "").isdigit():
        return None
    return parse(text)


def spell(capability: tuple[int, int]) -> str:
    """ "8.6" of (8, 6)."""
    return ".".join(map(str, capability))


def unserved(capability: tuple[int, int]) -> str | None:
    """Why no product has a kernel for such a device, or None if some have."""
    if capability in SERVED:
        return None
    return (
        "the kernels are for compute capability 8.0, 8.6 (Ampere), 8.9 (Ada) and 9.0 (Hopper), "
        f"not {spell(capability)}"
    )
