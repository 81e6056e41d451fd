"""Compile kernels without a GPU, and say what the assembler made of them.

    python tests/pallas_kernels/sass.py [--suite NAME] [--match TEXT]... [--dump FOLDER]

prints one JSON object per kernel of a suite, a module of this folder with

    ALL: variants, each with a `name`, `lowering()` -> (function, shapes of its arguments), and
      `opcode`, the tensor cores' instruction that its innermost loop is known by, or None.
    CAPABILITY: (major, minor) to compile for; a process compiles for one.
    FORBIDDEN: opcodes that must not appear, if not those of this module.

Needs jax with jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-cuda-nvdisasm (see
scripts/sass_check).  Nothing runs: XLA's compile-only client, Mosaic and ptxas make the code.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from jax.experimental import topologies

TARGET = """
gpu_device_info {{
  threads_per_warp: 32 core_count: {cores} device_memory_size: 85899345920
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
}}
"""
# Multiprocessors of an H200, an A100, an RTX 3090 and an RTX 4090.
CORES = {(9, 0): 132, (8, 0): 108, (8, 6): 82, (8, 9): 128}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
FORBIDDEN = ("LDL", "STL", "I2F")
SLOW_IN_LOOP = ("I2F", "I2FP", "F2F", "SHFL", "STS", "MUFU")


@dataclasses.dataclass
class Report:
    """Of one kernel.

    registers: per thread, as assembled.  spills: bytes stored or loaded.  stack: bytes.
    shared: bytes.  warnings: the assembler's that name lost performance.
    forbidden: local memory, and what does not belong into the loop, if found.
    tensor: instructions of the tensor cores.
    drains: waits in the loop for all of them, which let nothing overlap.
    slots: instructions of the innermost loop with those, for every four of them: per 64 x 64 tile
      of the weight for int4, per 64 rows or columns and 128 inputs for 8-bit codes on Hopper.
    """

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    warnings: list[str]
    forbidden: list[str]
    tensor: int
    drains: int
    slots: float


def use_wheels_tools() -> None:
    """ptxas and nvdisasm of the wheels, not of a toolkit that happens to be installed."""
    import nvidia

    for path in nvidia.__path__:
        root = os.path.join(path, "cu13")
        if os.path.exists(os.path.join(root, "bin", "ptxas")):
            os.environ["PATH"] = os.path.join(root, "bin") + os.pathsep + os.environ["PATH"]
            os.environ["MOSAIC_GPU_CUDA_ROOT"] = root
            return
    raise FileNotFoundError("nvidia/cu13/bin/ptxas: install nvidia-cuda-nvcc")


def compile_only_device(capability: tuple[int, int] = (9, 0)):
    """A device of a compute capability that can be compiled for."""
    major, minor = capability
    extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    config = TARGET.format(cores=CORES[capability], major=major, minor=minor, extension=extension)
    target = topologies.get_topology_desc("", "cuda", target_config=config, topology="1x1x1")
    return target.devices[0]


def compile_kernel(function, arguments, device) -> dict[str, str]:
    """The dumps of the one kernel in function(*arguments), by suffix."""
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        # Mosaic asks the default device, not the arguments', what to compile for.
        with jax.default_device(device):
            jax.jit(function).trace(*arguments).lower().compile()
        logs = glob.glob(f"{folder}/*.ptxas")
        assert len(logs) == 1, f"expected one kernel, found {logs}"
        stem = logs[0].removesuffix(".ptxas")
        suffixes = ("ptxas", "sass_ctrl", "resources.txt", "ptx")
        return {s: pathlib.Path(f"{stem}.{s}").read_text() for s in suffixes}


def count(sass: str) -> collections.Counter:
    """Instructions by opcode, without its modifiers."""
    return collections.Counter(INSTRUCTION.findall(sass))


def innermost_loop(sass: str, opcode: str) -> str:
    """The shortest loop that holds the opcode."""
    lines = sass.splitlines()
    labels = {
        m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))
    }
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        if target and labels.get(target.group(1), end) < end:
            loops.append("\n".join(lines[labels[target.group(1)] : end + 1]))
    loops = [loop for loop in loops if count(loop)[opcode]]
    assert loops, f"no loop with {opcode}"
    return min(loops, key=len)


def inspect(
    name: str, dumps: dict[str, str], opcode: str | None = "HGMMA", unwanted=FORBIDDEN
) -> Report:
    log, sass = dumps["ptxas"], dumps["sass_ctrl"]
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    opcodes, text = count(sass), innermost_loop(sass, opcode) if opcode else ""
    loop = count(text)
    return Report(
        name=name,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spills=int(spills.group(2)) + int(spills.group(3)),
        stack=int(spills.group(1)),
        shared=int(re.search(r"smem_scratch_bytes=(\d+)", dumps["resources.txt"]).group(1)),
        warnings=[line for line in log.splitlines() if re.search(r"C75\d\d", line)],
        forbidden=[name for name in unwanted if opcodes[name]]
        + [f"{name} in the loop" for name in SLOW_IN_LOOP if loop[name]],
        tensor=opcodes[opcode] if opcode else 0,
        drains=len(re.findall(r"DEPBAR\.LE gsb0, 0x0\b", text)),
        slots=4 * loop.total() / loop[opcode] if opcode else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="variants", help="module of this folder")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th variant")
    parser.add_argument("--match", action="append", help="only variants whose name contains this")
    parser.add_argument("--dump", help="folder to keep the SASS in")
    args = parser.parse_args()
    suite = importlib.import_module(f"tests.pallas_kernels.{args.suite}")
    use_wheels_tools()
    device = compile_only_device(suite.CAPABILITY)
    unwanted = getattr(suite, "FORBIDDEN", FORBIDDEN)
    for variant in suite.ALL[:: args.every]:
        if args.match and not any(text in variant.name for text in args.match):
            continue
        dumps = compile_kernel(*variant.lowering(), device)
        if args.dump:
            pathlib.Path(args.dump, f"{variant.name}.sass").write_text(dumps["sass_ctrl"])
            pathlib.Path(args.dump, f"{variant.name}.ptx").write_text(dumps["ptx"])
        report = inspect(variant.name, dumps, variant.opcode, unwanted)
        print(json.dumps(dataclasses.asdict(report)), flush=True)


if __name__ == "__main__":
    main()
