"""Linears of other tools' files, for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jq.formats.gptq import GPTQScheme
from jq.spec import ActivationSpec
from tests.oracles import packed_files as oracle

SHAPE = 64, 40
INT8 = ActivationSpec("int8")
FLOAT8 = ActivationSpec("float8_e4m3fn")


def on_device(w):
    return jax.tree.map(jnp.asarray, w)


def assert_weight(w, want):
    """Codes and zeros are small integers, so a weight is one float32 product."""
    got = np.asarray(on_device(w).dequantize())
    np.testing.assert_array_max_ulp(got, want.astype(np.float32), 1)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, strict=True)
        assert got[name].flags.c_contiguous


def gptq_case(bits=4, group_size=16, version=1, **options):
    linear = oracle.random_linear(bits, *SHAPE, group_size, **options)
    symmetric, order = options.get("symmetric", False), options.get("act_order", False)
    form = "gptq" if version == 1 else "gptq_v2"
    scheme = GPTQScheme(bits, group_size, symmetric, order, form)
    return linear, oracle.gptq(linear, version), scheme
