"""Chunks of equal length."""

import pytest

from jq.chunks import largest_divisor


@pytest.mark.parametrize(
    ("size", "limit", "largest"),
    [(12, 5, 4), (12, 12, 12), (12, 100, 12), (7, 6, 1), (1, 1, 1), (4096, 1000, 512)],
)
def test_largest_divisor(size, limit, largest):
    assert largest_divisor(size, limit) == largest
