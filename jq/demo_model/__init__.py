"""A small language model of Python's documentation, shipped for demonstrations and tests.

README.md beside this file says what it is and how it was made.
"""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The folder of the model: Hugging Face layout, with `evaluation.txt` and `calibration.txt`."""
    return Path(__file__).resolve().parent
