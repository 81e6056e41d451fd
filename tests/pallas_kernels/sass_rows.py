"""Compile the kernel of `quantize_rows` without a GPU, for one compute capability.

    python tests/pallas_kernels/sass_rows.py 8.9

prints one JSON object per variant; see `sass` for what that needs.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import dataclasses
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax

from jq.pallas_kernels import quantize_rows_kernel as kernel
from tests.pallas_kernels import sass

FP8 = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is quantized.  per_value: instructions that a thread may take for each of its values."""

    codes: str
    shape: tuple[int, int]
    per_value: float
    dtype: str = "bfloat16"
    group: int | None = None
    norm: bool = False

    @property
    def name(self) -> str:
        group = self.group or "row"
        size = "x".join(map(str, self.shape))
        return f"{self.dtype}_{self.codes}_{size}_g{group}" + "_norm" * self.norm

    @property
    def values(self) -> int:
        """Of a thread; a block has up to 32 groups."""
        return (self.shape[1] if self.group is None else 32 * self.group) // 128

    def lowering(self):
        """(function, shapes of its arguments) to compile: the kernel, and nothing of XLA's."""
        if self.group is not None:
            rows = self.shape[0] * self.shape[1] // self.group
            x = jax.ShapeDtypeStruct((rows, self.group), self.dtype)
            return lambda x: kernel.quantize_groups(x, self.codes, False), (x,)
        x = jax.ShapeDtypeStruct(self.shape, self.dtype)
        if not self.norm:
            return lambda x: kernel.quantize(x, self.codes, None, None, False), (x,)
        gain = jax.ShapeDtypeStruct(self.shape[1:], self.dtype)
        return lambda x, gain: kernel.quantize(x, self.codes, gain, 1e-5, False), (x, gain)


INT8 = (
    Variant("int8", (4096, 4096), 8.0),
    Variant("int8", (64, 4096), 17.0, norm=True),
    # The longest rows that are taken.
    Variant("int8", (8, 32768), 7.0),
    Variant("int8", (8, 16384), 16.0, norm=True),
)
ALL = (
    *INT8,
    Variant("int8", (16, 896), 17.0),
    Variant("int8", (8, 13696), 8.0),
    Variant("int8", (16, 2048), 10.0, "float32"),
    Variant(FP8, (4096, 4096), 7.0),
    Variant(FP8, (4096, 4096), 9.0, group=128),
    Variant(FP8, (64, 4096), 16.0, "float16", norm=True),
)


def variants(capability: str) -> tuple[Variant, ...]:
    """Every one where there is float8."""
    return ALL if capability in ("8.9", "9.0") else INT8


def main(capability: str) -> None:
    sass.use_wheels_tools()
    major, minor = map(int, capability.split("."))
    device = sass.compile_only_device((major, minor))
    for variant in variants(capability):
        dumps = sass.compile_kernel(*variant.lowering(), device)
        log = dumps["ptxas"]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
        opcodes = sass.count(dumps["sass_ctrl"])
        report = {
            "name": variant.name,
            "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
            "local": int(frame.group(1)) + int(frame.group(2)),
            "per_value": (opcodes.total() - opcodes["NOP"]) / variant.values,
            "slow": [opcode for opcode in ("F2I", "FRND", "F2F", "LDL", "STL") if opcodes[opcode]],
            "loads": opcodes["LDG"] + opcodes["LD"],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
