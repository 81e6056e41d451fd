"""Logits against transformers, for every family; skipped where torch or transformers is missing.

They may live in another environment: JAXQ_TORCH_PYTHON names its interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models import checkpoints
from tests.models.running import TOKENS, forward, relative_error

PYTHON = os.environ.get("JAXQ_TORCH_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """name -> transformers' logits, of one run of the other program."""
    probe = [PYTHON, "-c", "import torch, transformers"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers; set JAXQ_TORCH_PYTHON")
    root = tmp_path_factory.mktemp("transformers")
    for name, raw in checkpoints.CONFIGS.items():
        checkpoints.write(root / name, raw)
        np.save(root / name / "tokens.npy", TOKENS)
    program = Path(__file__).with_name("torch_logits.py")
    folders = [str(root / name) for name in checkpoints.CONFIGS]
    done = subprocess.run(
        [PYTHON, str(program), *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: np.load(root / name / "logits.npy") for name in checkpoints.CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_logits_agree_with_transformers(reference, load, name):
    model, params, _, _ = load(name)
    assert relative_error(forward(model, params, TOKENS), reference[name].astype(np.float64)) < 2e-5
