"""Which kernel multiplies with a weight, and why: `explain`."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend import backend

from jq.errors import SpecError
from jq.pallas_kernels.capability import HOPPER as HOPPER
from jq.pallas_kernels.capability import told
from jq.pallas_kernels.w4a16 import supported
from jq.pallas_kernels.w8a8 import OUTPUTS, supported8
from jq.pallas_kernels.weight import W4Weight, unsupported_format, w4_weight
from jq.pallas_kernels.weight8 import W8Weight, unsupported_format8, w8_weight
from jq.spec import QuantSpec
from jq.support import Capability, product_of, spell, support

W4A16, W8A8, REFERENCE = "w4a16", "w8a8", "reference"


@runtime_checkable
class Format(Protocol):
    """What decides about a kernel: a QTensor, a PreparedTensor or a manifest's entry has it."""

    @property
    def spec(self) -> QuantSpec: ...
    @property
    def k(self) -> int: ...
    @property
    def n(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Choice:
    """kernel: "w4a16" or "w8a8" (Mosaic GPU, `jq.pallas_kernels`), or "reference" (plain XLA).
    reason: why, in a few words."""

    kernel: str
    reason: str


def explain(w: Any, *, rows: int = 1, dtype: Any = jnp.bfloat16, device: Any = None) -> Choice:
    """Which kernel multiplies with a weight once it is prepared (see `jq.prepare`), and why.

    Args:
      w: a QTensor, a PreparedTensor or anything else that has `spec`, `k` and `n`; an array.
      rows: of x, all its leading axes together.
      dtype: of x.
      device: a jax.Device, "sm_90", or None for JAX's default device.
    """
    if not isinstance(w, Format):
        return Choice(REFERENCE, "not quantized: a plain product")
    capability, name = capability_of(device)
    cell = support(capability, product_of(w.spec))
    if cell.reason is not None or capability is None:
        between = " is" if capability is None else ":"
        return Choice(REFERENCE, f"{name}{between} {cell.reason}")
    dtype = jnp.dtype(dtype).name
    if (reason := unsupported_weight(w.spec, w.k, w.n, dtype)) is not None:
        return Choice(REFERENCE, reason)
    shapes = kernel_weight(w.spec, w.k, w.n, dtype)
    if isinstance(shapes, W4Weight):
        kernel, reason = W4A16, supported(shapes, rows, capability)
    else:
        kernel, reason = W8A8, supported8(shapes, rows, capability)
    if reason is not None:
        return Choice(REFERENCE, reason)
    return Choice(kernel, f"{w.spec.dtype} on {name}")


def capability_of(device: Any = None) -> tuple[Capability | None, str]:
    """Compute capability of a CUDA device or of "sm_90" (None for other devices), and a name."""
    if device is None:
        device = backend.get_default_device()
    if isinstance(device, str):
        if not (device.startswith("sm_") and device[3:].isdigit() and len(device) > 4):
            raise SpecError(f"device {device!r} is neither a jax.Device nor a name like 'sm_90'")
        return (int(device[3:-1]), int(device[-1])), device
    found, name = told(getattr(device, "compute_capability", None)), f"{device.device_kind}"
    if found is None:
        return None, name
    return found, f"{name} (compute capability {spell(found)})"


def unsupported_weight(spec: QuantSpec, k: int, n: int, dtype: str) -> str | None:
    """Why no kernel's layout holds a format whose product has kernels, or None if one does.

    dtype: name of x's.
    """
    if spec.activation is not None:
        if dtype not in OUTPUTS:
            return f"activations are {dtype}, the kernels give {' and '.join(OUTPUTS)}"
        block = spec.group_size if spec.granularity == "block" else None
        return unsupported_format8(k, n, spec.dtype, block)
    size = None if spec.group_size in (-1, k) else spec.group_size
    if reason := unsupported_format(k, n, size, dtype):
        return reason
    # A scale per column is applied in float32; scales of groups are held in x's dtype.
    if size is not None and spec.scale_dtype not in (dtype, "bfloat16"):
        return f"scales are {spec.scale_dtype}, which {dtype} would round"
    return None


def kernel_weight(spec: QuantSpec, k: int, n: int, dtype: Any) -> W4Weight | W8Weight:
    """The shapes of a format's weight in its kernel's layout."""
    shape = jax.ShapeDtypeStruct
    if spec.activation is not None:
        scale = shape(spec.scale_shape(k, n), jnp.float32)
        return jax.eval_shape(w8_weight, shape((k, n), jnp.dtype(spec.dtype)), scale)
    columns = (spec.num_groups(k), n)
    zero = None if spec.symmetric else shape(columns, jnp.uint8)

    def pack(codes, scale, zero):
        return w4_weight(codes, scale, zero, dtype=dtype)

    return jax.eval_shape(pack, shape((k, n), jnp.uint8), shape(columns, jnp.float32), zero)
