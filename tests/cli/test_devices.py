"""`--devices`: refused before anything is read."""

import jax
import pytest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("two", "--devices two is neither a number nor all"),
        ("0", "0 devices are asked for"),
        (str(len(jax.local_devices()) + 1), f"this process has {len(jax.local_devices())} (cpu)"),
    ],
)
def test_what_is_not_there_is_refused(given, said, call, tmp_path):
    out = tmp_path / "made"
    assert said in call("quantize", "demo", "--out", out, "--devices", given).refusal
    assert not out.exists()
