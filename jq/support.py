"""The support matrix: how each kind of product runs on each family of GPUs.

One table, which the dispatcher (`jq.kernels.choice`), `jaxq quantize --target-gpu`, `jaxq doctor`
and the README read; a test compares it with what the kernels themselves say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from jq.errors import SpecError
from jq.gpus import GPUS, find_gpu, lacking
from jq.spec import QuantSpec

Product = Literal["int4", "int8", "fp8", "other"]
Verdict = Literal["kernel", "reference", "refused"]
Capability = tuple[int, int]

PRODUCTS: dict[Product, str] = {
    "int4": "int4 weights (GPTQ, AWQ)",
    "int8": "int8 weights and activations (SmoothQuant)",
    "fp8": "fp8 weights and activations",
    "other": "everything else",
}
# What makes each of them.
_METHODS: dict[Product, str] = {
    "int4": "int4 weights (--method gptq or awq)",
    "int8": "int8 weights and activations (--method smoothquant or int8)",
    "fp8": "fp8 weights and activations (--method smoothquant-fp8 or fp8)",
    "other": "",
}
_AMPERE_TO_HOPPER: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (9, 0))
KERNELS: dict[Product, tuple[Capability, ...]] = {
    "int4": _AMPERE_TO_HOPPER,
    "int8": _AMPERE_TO_HOPPER,
    "fp8": ((8, 9), (9, 0)),
    "other": (),
}
# Older GPUs lack what the kernels are made of: asynchronous copies, and bfloat16.
_OLDEST: Capability = (8, 0)


@dataclasses.dataclass(frozen=True)
class Support:
    """verdict: "kernel"; "reference", which is plain XLA; or "refused": the reference would run
      too, but quantizing for that GPU is refused unless one insists.
    reason: why it is no kernel; None where it is one."""

    verdict: Verdict
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the matrix.

    family: the maker's name, "Hopper".
    capability: CUDA compute capability; None for everything that is no CUDA device.
    names: of GPUs that it stands for, as `jaxq advise` knows them.
    """

    family: str
    capability: Capability | None
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        """ "Hopper, sm_90 (h100, h200)"."""
        if self.capability is None:
            return self.family
        return f"{self.family}, sm_{_digits(self.capability)} ({', '.join(self.names)})"

    @property
    def cells(self) -> dict[Product, Support]:
        return {product: support(self.capability, product) for product in PRODUCTS}


def product_of(spec: QuantSpec) -> Product:
    """Which column of the matrix a format belongs to."""
    if spec.activation is not None:
        return "fp8" if spec.is_float else "int8"
    return "int4" if spec.dtype == "int4" else "other"


def support(capability: Capability | None, product: Product) -> Support:
    """The cell of a compute capability; None is no CUDA device."""
    if capability is None:
        return Support("reference", "no CUDA device: kernels need one of capability 8.0 to 9.0")
    if capability < _OLDEST:
        oldest, spelled = spell(_OLDEST), spell(capability)
        return Support(
            "refused", f"kernels need compute capability {oldest} or newer, not {spelled}"
        )
    if capability in KERNELS[product]:
        return Support("kernel")
    if product == "other":
        return Support("reference", "kernels are for int4 weights, and for 8-bit products")
    if product == "fp8" and (reason := lacking(capability, "fp8")):
        return Support("refused", reason)
    return Support(
        "reference", f"there are no kernels yet for compute capability {spell(capability)}"
    )


def rows() -> tuple[Row, ...]:
    """The matrix: a row per family of known GPUs, and one for other devices."""
    families = dict.fromkeys((gpu.family, gpu.capability) for gpu in GPUS.values())
    known = [
        Row(*key, tuple(g.name for g in GPUS.values() if (g.family, g.capability) == key))
        for key in families
    ]
    return (*known, Row("CPUs, TPUs, others", None, ()))


def check_target(
    specs: Iterable[QuantSpec], capability: Capability, name: str, *, allow_reference: bool = False
) -> None:
    """Refuse formats that a GPU lacks kernels or arithmetic for.

    Args:
      specs: what is to be quantized.
      capability, name: of the GPU that will run it.
      allow_reference: let it pass: XLA's reference will run.
    Raises: SpecError naming the alternatives.
    """
    if allow_reference:
        return
    wanted = {product_of(spec) for spec in specs}
    for product in PRODUCTS:
        found = support(capability, product)
        if product in wanted and found.verdict == "refused":
            raise SpecError(
                f"{name} (sm_{_digits(capability)}) does not serve "
                f"{PRODUCTS[product]}: {found.reason}; {_alternatives(capability, product)}"
            )


def _alternatives(capability: Capability, product: Product) -> str:
    here = [_METHODS[other] for other in PRODUCTS if support(capability, other).verdict == "kernel"]
    elsewhere = [f"sm_{_digits(each)}" for each in KERNELS[product]]
    ways = [f"choose {' or '.join(here)}"] if here else []
    if elsewhere:
        ways.append(f"choose a GPU of {', '.join(elsewhere)}")
    ways.append(
        "insist with --allow-reference (in Python allow_reference=True): XLA multiplies, "
        "usually slower than 16-bit weights"
    )
    return "; ".join(ways)


def find_capability(target: str) -> tuple[Capability, str]:
    """Compute capability and name of "a100", "sm_80" or "8.0".

    Raises: SpecError for what is none of these.
    """
    digits = target.removeprefix("sm_").replace(".", "")
    if (target.startswith("sm_") or "." in target) and digits.isdigit() and len(digits) > 1:
        return (int(digits[:-1]), int(digits[-1])), target
    gpu = find_gpu(target)
    return gpu.capability, gpu.name


def spell(capability: Capability) -> str:
    """ "9.0"."""
    return ".".join(map(str, capability))


def _digits(capability: Capability) -> str:
    return "".join(map(str, capability))


def markdown() -> str:
    """The matrix as the README has it."""
    lines = ["| GPUs | " + " | ".join(PRODUCTS.values()) + " |", "| --- " * 5 + "|"]
    for row in rows():
        lines.append(f"| {row.label} | " + " | ".join(c.verdict for c in row.cells.values()) + " |")
    return "\n".join(lines)
