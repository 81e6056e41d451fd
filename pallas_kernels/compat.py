"""What the kernels take from JAX beyond its stable API, in one place, for jax >= 0.11.2, < 0.13.

Everything used here is spelled alike in 0.11.2 and 0.12, but for `store_to_global`; what else is
not (loads that take an index, `transpose_ref`) the kernels do not use.
"""

from __future__ import annotations

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector

__all__ = [
    "COLUMNS",
    "CORES",
    "FRAGMENT",
    "ROWS",
    "WORDS",
    "arith",
    "core_count",
    "fragmented_array",
    "interpreter",
    "ir",
    "llvm",
    "memref",
    "mgpu",
    "nvvm",
    "pl",
    "plgpu",
    "store_to_global",
    "swizzled",
    "vector",
]

# Streaming multiprocessors of an H100 or H200 (SXM): assumed where the device does not tell.
CORES = 132

# Register layouts of a warpgroup: the packed words of a tile, four per thread; the A operand (and
# accumulator) of wgmma; a value for each of that operand's rows; and of its columns.
WORDS = plgpu.Layout.WG_STRIDED((4, 128), vec_size=4)
FRAGMENT = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def core_count() -> int:
    """Streaming multiprocessors of the device that is being compiled for."""
    return getattr(jax.extend.backend.get_default_device(), "core_count", None) or CORES


def interpreter(interpret: bool):
    """The value of `plgpu.kernel`'s `interpret`: Mosaic's own interpreter, which detects races."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None


def swizzled(shape: tuple[int, ...], dtype, swizzle: int = 128):
    """Shared memory in the tiled and swizzled order that wgmma and bank-free copies want."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def store_to_global(destination, values) -> None:
    """Registers to global memory, in a layout that need not fill whole cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(destination, values, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:  # jax 0.11
        destination[...] = values
