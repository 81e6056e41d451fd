"""Chunks of equal length, since every length is a program of its own."""

from __future__ import annotations


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is no larger than `limit`; both are at least 1."""
    return max(d for d in range(1, min(size, limit) + 1) if size % d == 0)
