"""Tests, in folders that mirror the source; `tests.oracles` holds slow, obvious NumPy versions."""
