"""Without a GPU: every variant as far as it goes here.

With JAX's CUDA packages installed that is machine code for compute capability 9.0; without them,
the program that would be compiled there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jq.pallas_kernels.w4a16 import w4a16
from jq.pallas_kernels.w8a8 import w8a8
from scripts.gpu import candidates, candidates8
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.correctness8 import FORMATS
from scripts.gpu.problems import Problem, device_weight, of_item, to_item
from scripts.gpu.problems8 import Problem8, device_problem8, of_item8, to_item8

# What the compiler wants to know of an H200.
_TARGET = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}"""


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every format with few and many rows, then every config."""
    problems = [
        Problem(m, 2048, 1024, group, symmetric, dtype)
        for m in (16, 512)
        for dtype in ("bfloat16", "float16")
        for symmetric in (True, False)
        for group in (128, 64, 32, -1)
    ]
    tried = candidates.every_config()
    problems8 = [
        Problem8(m, 2048, 1024, dtype, block, bias)
        for m in (16, 512)
        for dtype, block in FORMATS
        for bias in (False, True)
    ]
    tried8 = candidates8.every_config()
    return [
        *map(to_item, problems),
        *map(to_item8, problems8),
        *(to_item(p, f"{c.name} ", config=config_json(c)) for p, c in tried),
        *(to_item8(p, f"{c.name} ", config=config_json(c)) for p, c in tried8),
    ]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compile or lower one."""
    product, arguments = _product8(item) if "problem8" in item else _product(item)
    device = target()
    if isinstance(device, str):
        text = jax.export.export(product, platforms=["cuda"])(*arguments).mlir_module()
        return {"level": "lowered", "why": device, "kernel": "mosaic" in text}
    whole = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments
    )
    with jax.default_device(device):  # the kernels are lowered for the default device
        text = product.lower(*arguments).compile().as_text() or ""
    return {"level": "machine code", "kernel": "mosaic" in text}


def _product(item: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """(function, shapes of its arguments) of an int4 problem."""
    p = of_item(item)
    weight, x = jax.eval_shape(lambda: device_weight(p, 0))
    return jax.jit(functools.partial(w4a16, config=config_of(item.get("config")))), (x, weight)


def _product8(item: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The same of an 8-bit one."""
    p, config = of_item8(item), config_of(item.get("config"))
    bias = jax.ShapeDtypeStruct((p.n,), jnp.dtype(p.out)) if p.bias else None

    def product(x, x_scale, weight, bias):
        return w8a8(x, x_scale, weight, bias=bias, out_dtype=p.out, config=config)

    return jax.jit(product), (*jax.eval_shape(lambda: device_problem8(p, 0)), bias)


def _find_assembler() -> None:
    """Put the ptxas that was installed beside JAX, where there is one, first on the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        programs = Path(folder, "cu13", "bin")
        if (programs / "ptxas").exists():
            os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"


@functools.cache
def target() -> Any:
    """A device to compile for, or why there is none."""
    try:
        from jax.experimental import topologies

        _find_assembler()
        found = topologies.get_topology_desc("", "cuda", target_config=_TARGET, topology="1x1x1")
        return found.devices[0]
    except Exception as error:
        return f"no CUDA compiler here ({type(error).__name__}: {error})"[:300]
