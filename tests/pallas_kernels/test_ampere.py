"""The kernels for Ampere and Ada: their schedules, emulated, and the registers of `mma.sync`.

Beside this, test_dequant proves the order of the packed codes in registers, and test_sass looks at
the machine code.  No GPU of these families has run the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import w4a16, w8a8, weight, weight8
from jq.pallas_kernels.ampere import tuning
from jq.pallas_kernels.ampere.config import CAPABILITIES, SHARED_MEMORY, W4Config, W8Config
from jq.pallas_kernels.ampere.w4a16 import w4a16_ampere
from jq.pallas_kernels.ampere.w8a8 import w8a8_ampere
from jq.pallas_kernels.compat import plgpu
from jq.pallas_kernels.config import DecodeConfig
from jq.pallas_kernels.config8 import Decode8Config
from tests.pallas_kernels import emulated, interpreted

# Norm over norm: the product is rounded once, from float32 sums of exact operands.
TOLERANCE = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
ADA = (8, 9)


def norm_error(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


W4_CASES = (
    # One stage, which is all there is; then rows, parts and stages that do not come out even.
    (W4Config(16, 1, 1, 2), 1, 64, 64, None, False, "bfloat16"),
    (W4Config(16, 2, 2, 3, split=3), 19, 640, 128, 64, True, "bfloat16"),
    (W4Config(32, 1, 2, 2), 40, 256, 128, 32, True, "float16"),
    (W4Config(64, 2, 1, 4, split=2), 70, 256, 256, 128, False, "float16"),
    (W4Config(64, 2, 1, 5), 64, 192, 128, None, True, "bfloat16"),
)


@pytest.mark.parametrize("case", W4_CASES, ids=lambda case: case[0].name)
def test_int4_schedule(case):
    config, m, k, n, group_size, zero, dtype = case
    w = interpreted.weight(k, n, group_size, zero, dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(m, k)), dtype)
    with emulated.emulation():
        y = w4a16_ampere(x, w, config=config, compute_capability=(8, 0))
    assert (y.shape, y.dtype) == ((m, n), x.dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(jax.jit(weight.dequantize)(w), np.float64)
    assert norm_error(y, expected) < TOLERANCE[dtype]


def problem8(m, k, n, dtype, block, bias):
    """Random (codes [M, K], scales, weight, bias or None)."""
    rng = np.random.default_rng(m + k)

    def codes(*shape):
        values = rng.integers(-127, 128, shape) if dtype == "int8" else rng.normal(size=shape) * 50
        return jnp.asarray(values, dtype)

    def scales(*shape):
        return jnp.asarray(rng.uniform(0.01, 0.02, shape), jnp.float32)

    w = weight8.w8_weight(codes(k, n), scales(k // 128, n // 128) if block else scales(1, n))
    x_scale = scales(m, k // 128) if block else scales(m, 1)
    return codes(m, k), x_scale, w, jnp.asarray(rng.normal(size=n), "bfloat16") if bias else None


W8_CASES = (
    (W8Config(16, 64, 1, 2), 3, 64, 64, "int8", False, False, "bfloat16"),
    (W8Config(16, 64, 2, 3, split=3), 16, 640, 128, "int8", False, True, "float16"),
    (W8Config(128, 128, 1, 4), 130, 192, 128, "int8", False, True, "bfloat16"),
    (W8Config(64, 64, 4, 2), 64, 512, 128, "float8_e4m3fn", False, False, "float16"),
    (W8Config(32, 128, 1, 3), 32, 192, 128, "float8_e4m3fn", False, True, "bfloat16"),
    (W8Config(64, 128, 2, 3), 70, 384, 256, "float8_e4m3fn", True, True, "bfloat16"),
    (W8Config(16, 64, 4, 2, split=2), 5, 768, 128, "float8_e4m3fn", True, False, "float16"),
)


@pytest.mark.parametrize("case", W8_CASES, ids=lambda case: case[0].name)
def test_eight_bit_schedule(case):
    config, m, k, n, dtype, block, bias, out_dtype = case
    x, x_scale, w, b = problem8(m, k, n, dtype, block, bias)
    options = {"bias": b, "out_dtype": jnp.dtype(out_dtype)}
    with emulated.emulation():
        rows = x_scale if block else x_scale[:, 0]
        y = w8a8_ampere(x, rows, w, **options, config=config, compute_capability=ADA)
    assert (y.shape, y.dtype) == ((m, n), jnp.dtype(out_dtype))
    wide = np.asarray(x_scale, np.float64)
    wide = np.asarray(x, np.float64) * (np.repeat(wide, 128, 1) if block else wide)
    expected = wide @ np.asarray(weight8.dequantize(w), np.float64)
    expected += 0 if b is None else np.asarray(b, np.float64)
    assert norm_error(y, expected) < TOLERANCE[out_dtype]
    if dtype == "int8":
        # Sums are exact, and scaled as the reference scales them.
        np.testing.assert_array_equal(y, w8a8.w8a8_reference(x, x_scale, w, **options))


# The entries


def test_entry_of_int4():
    w = interpreted.weight(128, 64, 64, False, "bfloat16")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 128)), "bfloat16")
    with emulated.emulation():
        y = w4a16.w4a16(x, w, compute_capability=(8, 6))
    assert y.shape == (2, 3, 64)
    assert norm_error(y, np.asarray(w4a16.w4a16_reference(x, w), np.float64)) < 2.0**-8
    with pytest.raises(ValueError, match="interpreter knows none"):
        w4a16.w4a16(x, w, interpret=True, compute_capability=(8, 0))
    with pytest.raises(ValueError, match="another device's kernels"):
        w4a16.w4a16(x, w, config=DecodeConfig(), compute_capability=(8, 0))
    with pytest.raises(ValueError, match="another device's kernels"):
        w4a16.w4a16(x, w, config=W4Config())
    with pytest.raises(ValueError, match=r"not 7\.5"):
        w4a16.w4a16(x, w, compute_capability=(7, 5))


@pytest.mark.parametrize("scalar", [False, True])
def test_entry_of_eight_bits(scalar):
    x, x_scale, w, b = problem8(6, 128, 64, "int8", False, True)
    x, x_scale = x.reshape(2, 3, 128), x_scale.reshape(2, 3, 1)
    if scalar:
        x_scale = x_scale[0, 0, 0]
    with emulated.emulation():
        y = w8a8.w8a8(x, x_scale, w, bias=b, compute_capability=(8, 0))
    np.testing.assert_array_equal(y, w8a8.w8a8_reference(x, x_scale, w, bias=b))
    with pytest.raises(ValueError, match="interpreter knows none"):
        w8a8.w8a8(x, x_scale, w, interpret=True, compute_capability=(8, 0))
    with pytest.raises(ValueError, match="another device's kernels"):
        w8a8.w8a8(x, x_scale, w, config=Decode8Config(), compute_capability=(8, 0))
    with pytest.raises(ValueError, match="another device's kernels"):
        w8a8.w8a8(x, x_scale, w, config=W8Config())


def test_what_is_supported_on_which_device():
    eight = [problem8(1, 128, 128, d, False, False) for d in ("int8", "float8_e4m3fn")]
    for capability in CAPABILITIES:
        assert w8a8.supported8(eight[0][2], 1, capability) is None
    assert w8a8.supported8(eight[1][2], 1, "8.9") is None
    x, x_scale, w, _ = eight[1]
    for capability in ((8, 0), (8, 6)):
        assert "multiply int8" in str(w8a8.supported8(w, 1, capability))
        with pytest.raises(ValueError, match="float8 kernels are for"):
            w8a8.w8a8(x, x_scale, w, compute_capability=capability)


class WithoutBarriers(emulated.Machine):
    """Threads that do not wait for each other."""

    def barrier(self):
        pass


class Impatient(emulated.Machine):
    """Threads that let one copy more be under way."""

    def wait_gmem_to_smem(self, n):
        super().wait_gmem_to_smem(n + 1)


class Forgetful(emulated.Machine):
    """Threads that do not count what is not copied."""

    def commit_nothing(self):
        pass


@pytest.mark.parametrize("machine", [WithoutBarriers, Impatient, Forgetful])
def test_mistakes_would_be_seen(machine):
    x, x_scale, w, _ = problem8(16, 256, 64, "int8", False, False)
    with emulated.emulation(machine), pytest.raises((emulated.Race, AssertionError)):
        w8a8_ampere(x, x_scale[:, 0], w, config=W8Config(16, 64, 1, 3))


# Registers


def places(layout, shape):
    """{(warp, lane, register, position in it): (row, column)} of an array in a tiled layout."""
    warps = [d for d in layout.warp_dims if isinstance(d, int)]  # the rest repeats values
    sizes = layout.tiling.tile_shape(shape)
    registers = layout.registers_shape(shape)
    in_thread = {*warps, *layout.lane_dims, layout.vector_dim}
    lanes = [d for d in layout.lane_dims if isinstance(d, int)]
    found = {}
    for place in np.ndindex(*shape):
        tiled = layout.tiling.tile_indices(place)

        def index(dims, tiled=tiled):
            if not dims:
                return 0
            return int(np.ravel_multi_index([tiled[d] for d in dims], [sizes[d] for d in dims]))

        register = tuple(0 if d in in_thread else tiled[d] for d in range(-len(tiled), 0))
        number = int(np.ravel_multi_index(register, registers))
        found[index(warps), index(lanes), number, tiled[layout.vector_dim]] = place
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("row_warps", [1, 2, 4])
def test_registers_are_those_of_mma(dtype, row_warps):
    """Mosaic's layouts against the PTX manual's figures of mma.m16n8k16 and mma.m16n8k32."""
    pair = 4 // jnp.dtype(dtype).itemsize  # values of a register
    make = functools.partial(lambda operand: operand(jnp.dtype(dtype), m_warps=row_warps).to_mgpu())
    column_warps = 4 // row_warps
    left = places(make(plgpu.Layout.MMA_LHS), (16 * row_warps, 8 * pair))
    right = places(make(plgpu.Layout.MMA_RHS), (8 * pair, 8 * column_warps))
    sums = places(make(plgpu.Layout.MMA_ACC), (16 * row_warps, 8 * column_warps))
    for (warp, lane, register, e), place in left.items():
        g, t = divmod(lane, 4)
        row, half = g + 8 * (register % 2), register // 2
        assert place == (16 * warp + row, pair * t + e + 4 * pair * half)
    for (warp, lane, register, e), place in right.items():
        g, t = divmod(lane, 4)
        assert place == (pair * t + e + 4 * pair * register, 8 * warp + g)
    for (warp, lane, register, e), place in sums.items():
        g, t = divmod(lane, 4)
        row, column = divmod(warp, column_warps)
        assert place == (16 * row + g + 8 * register, 8 * column + 2 * t + e)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("row_warps", [1, 2, 4])
def test_ldmatrix_brings_the_operands(dtype, row_warps):
    """ldmatrix gives lane 4 g + t the t-th four bytes of row g, of eight rows of 16 bytes: of x and
    of the weight as they are stored, the inputs contiguous."""
    size = jnp.dtype(dtype).itemsize
    for operand, shape in (
        (plgpu.Layout.MMA_LHS, (16 * row_warps, 32 // size)),
        (plgpu.Layout.MMA_RHS, (32 // size, 32 // row_warps)),
    ):
        held = places(operand(jnp.dtype(dtype), m_warps=row_warps).to_mgpu(), shape)
        first = {}  # of each warp's register: (row, byte) of lane 0
        for (warp, lane, register, e), place in sorted(held.items()):
            row, k = place if operand is plgpu.Layout.MMA_LHS else place[::-1]
            origin = first.setdefault((warp, register), (row, k * size))
            assert origin[1] % 16 == 0
            assert row == origin[0] + lane // 4
            assert k * size == origin[1] + 4 * (lane % 4) + e * size


# Tile sizes


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shape_gets_tile_sizes(capability):
    for m in (1, 16, 17, 64, 100, 4096):
        for k, n in ((64, 64), (192, 320), (4096, 14336), (28672, 8192)):
            config = tuning.choose_w4(m, k, n, True, capability)
            assert config.shared_bytes() < SHARED_MEMORY[capability]
            assert tuning.unsuitable_w4(config, k, n, capability) is None
            config = tuning.choose_w8(m, k, n, "int8", None, capability)
            assert tuning.unsuitable_w8(config, k, n, "int8", None, capability) is None
            if k % 128 == n % 128 == 0:
                formats = k, n, "float8_e4m3fn", 128, capability
                assert tuning.unsuitable_w8(tuning.choose_w8(m, *formats), *formats) is None


def test_more_shared_memory_than_there_is():
    deep = W4Config(64, 1, 4, 4)
    assert tuning.unsuitable_w4(deep, 4096, 4096, (8, 0)) is None
    assert "8.6 has 101376" in str(tuning.unsuitable_w4(deep, 4096, 4096, (8, 6)))
    with pytest.raises(ValueError, match="take fewer stages"):
        W4Config(64, 2, 4, 8)
    w = interpreted.weight(256, 64, 64, False, "bfloat16")
    with pytest.raises(ValueError, match="bytes of shared memory"):
        w4a16_ampere(jnp.zeros((1, 256), "bfloat16"), w, config=deep, compute_capability=(8, 9))


@pytest.mark.parametrize(
    ("config", "k", "n", "dtype", "block", "reason"),
    [
        (W8Config(128, 128, 1), 128, 128, "float8_e4m3fn", None, "fill the registers"),
        (W8Config(16, 64, 1), 128, 128, "float8_e4m3fn", 128, "128 inputs of a block"),
        (W8Config(16, 128, 1), 128, 192, "int8", None, "N = 192 is no multiple of 128"),
        (W8Config(16, 64, 2), 192, 64, "int8", None, "K = 192 is no multiple of 128"),
        (W8Config(16, 64, 2, split=4), 256, 64, "int8", None, "does not split into 4"),
    ],
)
def test_unsuitable_tile_sizes(config, k, n, dtype, block, reason):
    assert reason in str(tuning.unsuitable_w8(config, k, n, dtype, block, ADA))
