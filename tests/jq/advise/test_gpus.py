"""The table of GPUs: what holds for all of them, whatever a data sheet's footnotes say."""

import pytest

from jq.gpus import GPUS


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_rates_fit_together(gpu):
    """Halving the bits doubles the rate, within what sheets round; sparse numbers would not fit."""
    half = gpu.rate("16-bit")
    assert half == 1e12 * gpu.half_tflops
    if gpu.has("fp8"):
        assert gpu.rate("fp8") == pytest.approx(2 * half, rel=0.015)
    if gpu.has("int8"):
        # GeForce cards multiply 16-bit numbers at half the rate when they sum in float32.
        factor = 4 if gpu.name.startswith("rtx-") and "a6000" not in gpu.name else 2
        assert gpu.rate("int8") == pytest.approx(factor * half, rel=0.015)
    assert bool(gpu.eight_bit_tops) == gpu.has("int8")


def test_every_number_has_a_source():
    assert all(gpu.source.startswith("NVIDIA ") for gpu in GPUS.values())
