"""What GPUs can do, from their makers' data sheets, and which arithmetic each one has.

Rates are dense: data sheets that state sparse rates only are halved.  They are ceilings that no
program reaches; `jaxq bench` measures those of the machine it runs on.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jq.errors import SpecError

Arithmetic = Literal["16-bit", "int8", "fp8"]

# fp8 tensor cores came with Ada (8.9), int8 ones with Turing (7.2, 7.5), bfloat16 with Ampere.
# CUDA C++ Programming Guide, "Compute Capabilities".
_SINCE: dict[Arithmetic, tuple[int, int]] = {"16-bit": (7, 0), "int8": (7, 2), "fp8": (8, 9)}
_BF16_SINCE = (8, 0)
_WHO: dict[Arithmetic, str] = {
    "fp8": "sm_89 (Ada) and newer",
    "int8": "sm_75 (Turing) and newer",
    "16-bit": "sm_70",
}


@dataclasses.dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: how the command line calls it.
        family: the maker's name for the architecture.
        capability: CUDA compute capability.
        memory_gb, bandwidth_gbs: GB and GB/s, powers of ten, as data sheets count.
        half_tflops: dense 16-bit products with float32 sums, TFLOP/s.
        eight_bit_tops: dense int8 tensor-core products, and fp8 where `has("fp8")`, 10^12 per
            second; 0 without such tensor cores.
        source: where the numbers stand.
        fp8_tflops: dense fp8 products with float32 sums, where they are fewer than the int8 ones.
    """

    name: str
    family: str
    capability: tuple[int, int]
    memory_gb: float
    bandwidth_gbs: float
    half_tflops: float
    eight_bit_tops: float
    source: str
    fp8_tflops: float | None = None

    def has(self, arithmetic: Arithmetic) -> bool:
        """Whether tensor cores multiply such numbers."""
        return self.capability >= _SINCE[arithmetic]

    @property
    def sm(self) -> str:
        """ "sm_90": what `jq.explain` takes as a device."""
        return "sm_{}{}".format(*self.capability)

    @property
    def half(self) -> str:
        """The 16-bit dtype that its tensor cores take."""
        return "bfloat16" if self.capability >= _BF16_SINCE else "float16"

    def rate(self, arithmetic: Arithmetic) -> float:
        """Products and sums per second, dense; 0 where there are no such tensor cores."""
        if not self.has(arithmetic):
            return 0.0
        if arithmetic == "fp8" and self.fp8_tflops is not None:
            return 1e12 * self.fp8_tflops
        return 1e12 * (self.half_tflops if arithmetic == "16-bit" else self.eight_bit_tops)

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return 1e9 * self.bandwidth_gbs


_V100 = ("Volta", (7, 0))
_TURING = ("Turing", (7, 5))
_GA100, _GA102 = ("Ampere", (8, 0)), ("Ampere", (8, 6))
_ADA = ("Ada Lovelace", (8, 9))
_HOPPER = ("Hopper", (9, 0))
_BLACKWELL = ("Blackwell", (10, 0))

# name: GB, GB/s, 16-bit TFLOP/s, int8 (and fp8) TOP/s
_TABLE = (
    GPU("v100-16gb", *_V100, 16, 900, 125, 0, "NVIDIA V100 data sheet, SXM2"),
    GPU("v100-32gb", *_V100, 32, 900, 125, 0, "NVIDIA V100 data sheet, SXM2"),
    GPU("t4", *_TURING, 16, 320, 65, 130, "NVIDIA T4 data sheet"),
    GPU("a100-40gb", *_GA100, 40, 1555, 312, 624, "NVIDIA A100 data sheet"),
    GPU("a100-80gb", *_GA100, 80, 2039, 312, 624, "NVIDIA A100 data sheet, SXM"),
    GPU("a30", *_GA100, 24, 933, 165, 330, "NVIDIA A30 data sheet"),
    GPU("a10", *_GA102, 24, 600, 125, 250, "NVIDIA A10 data sheet"),
    GPU("a40", *_GA102, 48, 696, 149.7, 299.3, "NVIDIA A40 data sheet"),
    GPU("rtx-a6000", *_GA102, 48, 768, 154.8, 309.7, "NVIDIA GA102 white paper, appendix C"),
    GPU("rtx-3090", *_GA102, 24, 936, 71, 284, "NVIDIA GA102 white paper, appendix A"),
    # GeForce cards sum floats in float32 at half the rate; int8 products are summed in int32.
    GPU("rtx-4090", *_ADA, 24, 1008, 165.2, 660.6, "NVIDIA Ada white paper, appendix A", 330.3),
    GPU("l4", *_ADA, 24, 300, 121, 242.5, "NVIDIA L4 data sheet, halved"),
    GPU("l40s", *_ADA, 48, 864, 362.05, 733, "NVIDIA L40S data sheet"),
    GPU("h100-pcie", *_HOPPER, 80, 2000, 756, 1513, "NVIDIA H100 data sheet, PCIe, halved"),
    GPU("h100", *_HOPPER, 80, 3350, 989, 1979, "NVIDIA H100 data sheet, SXM, halved"),
    GPU("h200", *_HOPPER, 141, 4800, 989, 1979, "NVIDIA H200 data sheet, SXM, halved"),
    GPU("b200", *_BLACKWELL, 180, 7700, 2250, 4500, "NVIDIA HGX B200 data sheet, per GPU, halved"),
)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}
_ALIASES = {
    "v100": "v100-16gb",
    "a100": "a100-40gb",  # the smaller one: what fits there fits on both
    "a6000": "rtx-a6000",
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
}


def find_gpu(name: str) -> GPU:
    """A GPU by its name, however it is spelled; SpecError listing the known ones otherwise."""
    key = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = key.removeprefix("tesla-").removesuffix("-sxm").removesuffix("-hbm3")
    key = _ALIASES.get(key, key)
    if key not in GPUS:
        raise SpecError(f"GPU {name!r} is unknown; known: {', '.join(GPUS)}")
    return GPUS[key]


def missing(gpu: GPU, arithmetic: Arithmetic) -> str | None:
    """Why a GPU does not run products of this arithmetic on tensor cores; None where it does."""
    reason = lacking(gpu.capability, arithmetic)
    return None if reason is None else f"{gpu.name} ({gpu.sm}) has {reason}"


def lacking(capability: tuple[int, int], arithmetic: Arithmetic) -> str | None:
    """ "no fp8 tensor cores; ...", or None where a compute capability has them."""
    if capability >= _SINCE[arithmetic]:
        return None
    return f"no {arithmetic} tensor cores; {_WHO[arithmetic]} have"
