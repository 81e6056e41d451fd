"""Each method is one program per shape, and a program does not grow with the weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jq import packing
from jq.methods.gptq import GPTQ, factor_hessian, gptq_quantize, gptq_solve
from jq.methods.rtn import rtn_quantize
from jq.spec import FP8, QuantSpec
from tests.jq import cases, jaxprs, problems
from tests.jq.methods.test_gptq import quantize

G16, ZERO = QuantSpec("int4", 16), QuantSpec("int3", 16, symmetric=False)
CONFIGS = [
    GPTQ(),
    GPTQ(desc_act=True, clip="mse"),
    GPTQ(desc_act=True, static_groups=True, clip="output"),
    GPTQ(act_group_aware=True),
]


def shapes(k: int, n: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((k, n), (k, k)))


def test_gptq_compiles_once_for_each_shape():
    """The factor once for each number of inputs, the solve once for each shape of the weight."""

    def programs():
        return factor_hessian._cache_size(), gptq_solve._cache_size()

    quantize(problems.weights(64, 12), problems.gram(64), G16, GPTQ())
    factors, solves = programs()
    for seed in range(3):
        # Equal options made anew, other numbers, statistics that fail: the same program.
        w, gram = problems.weights(64, 12, seed), problems.gram(64, seed=seed)
        quantize(w, gram if seed else gram * np.nan, QuantSpec("int4", 16), GPTQ())
    assert programs() == (factors, solves)
    quantize(problems.weights(64, 6), problems.gram(64), G16, GPTQ())
    assert programs() == (factors, solves + 1)


def test_rtn_compiles_once_for_each_shape():
    rtn_quantize(problems.weights(64, 12), G16)
    before = rtn_quantize._cache_size()
    for seed in range(3):
        rtn_quantize(problems.weights(64, 12, seed), QuantSpec("int4", 16))
    assert rtn_quantize._cache_size() == before
    rtn_quantize(problems.weights(80, 12), G16)
    assert rtn_quantize._cache_size() == before + 1


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_program_of_gptq_does_not_grow(config):
    solve = functools.partial(gptq_quantize, spec=G16, config=config)
    # More inputs than a block has: a single block has no others to pull it.
    small = jaxprs.size(solve, *shapes(256, 8))
    assert small == jaxprs.size(solve, *shapes(512, 24))
    # Nor when there are several panels of earlier errors.
    large = jaxprs.size(solve, *shapes(2048, 8))
    assert large == jaxprs.size(solve, *shapes(4096, 14336))
    assert small <= large < 1000
    assert jaxprs.size(solve, *shapes(32, 8)) <= small


@pytest.mark.parametrize("clip", ["none", "mse", "output"])
@pytest.mark.parametrize("spec", [G16, ZERO, QuantSpec(FP8, 16, granularity="block")])
def test_the_program_of_rounding_does_not_grow(spec, clip):
    def solve(w, gram):
        return rtn_quantize(w, spec, clip, gram).to_qtensor(spec)

    small = jaxprs.size(solve, *shapes(32, 16))
    assert small == jaxprs.size(solve, *shapes(4096, 8192)) < 400


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_program_of_unpacking_does_not_grow(bits):
    def round_trip(codes):
        return packing.unpack(packing.pack(codes, bits), bits, codes.shape[0])

    sizes = [
        jaxprs.size(round_trip, jax.ShapeDtypeStruct((k, k), jnp.uint8)) for k in (8, 64, 4096)
    ]
    assert sizes[0] == sizes[1] == sizes[2] < 150


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_product_is_cut_to_tf32(config):
    """On a GPU float32 products are, unless they ask otherwise, and codes would follow."""
    solve = functools.partial(gptq_quantize, spec=G16, config=config)
    found = jaxprs.dots(solve, *shapes(32, 8))
    assert len(found) >= 2
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert {precision for _, _, precision in found} == {highest}


def test_dequantizing_does_not_unroll_over_groups():
    sizes = [
        jaxprs.size(lambda w: w.dequantize(), cases.weight("int3 g32 zero", k, 16))
        for k in (32, 64, 256)
    ]
    assert sizes[0] == sizes[1] == sizes[2]
