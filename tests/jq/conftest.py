"""Fixtures of the core's tests."""

from tests.calib.conftest import fast_compiles

__all__ = ["fast_compiles"]
