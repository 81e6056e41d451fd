"""Activations in 8 bits, quantized once for all linears that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq.kernels.choice import capability_of
from jq.kernels.operations import over_rows, quantized_rows
from jq.pallas_kernels import reference
from jq.pallas_kernels.capability import HOPPER
from jq.pallas_kernels.quantize_rows import quantize_rows_reference, supported_rows
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import ActivationSpec
from jq.support import Capability

rms_norm = reference.rms_norm


@dataclasses.dataclass(frozen=True)
class Plan:
    """How linears want their input quantized.

    activation: the format.
    group: inputs that share a scale, where its granularity is "group"; else None.
    capability: of the GPU whose kernels may do it; None: XLA does.
    """

    activation: ActivationSpec
    group: int | None
    capability: Capability | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedActivations:
    """The input of linears that run with 8-bit activations, as `jq.qmatmul` takes it.

    Arrays (pytree children):
      x: floating [..., K], what was quantized: gradients are taken in it, and its dtype is that of
        the result.  Where neither happens, nothing computes it.
      codes: int8 or float8_e4m3fn [..., K].
      scale: float32 [..., 1], [..., K / group], or anything that broadcasts to the former.
    Static: plan.
    """

    x: jax.Array
    codes: jax.Array
    scale: jax.Array
    plan: Plan = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype


def plan_of(w: QTensor | PreparedTensor) -> Plan:
    """How a weight with 8-bit activations wants its input."""
    assert w.spec.activation is not None
    group = w.spec.group_size if w.spec.activation.granularity == "group" else None
    return Plan(w.spec.activation, group, target(w) if isinstance(w, PreparedTensor) else None)


def shared_plan(kernels: Sequence[Any]) -> Plan | None:
    """The plan that all of these kernels have in common, or None.

    Static scales belong to their weights, and an act order to its own: such inputs are not shared.
    """
    if not kernels or not all(isinstance(w, QTensor | PreparedTensor) for w in kernels):
        return None
    if any(w.spec.activation is None or w.order is not None for w in kernels):
        return None
    plans = {plan_of(w) for w in kernels}
    plan = plans.pop()
    return None if plans or plan.activation.static else plan


def quantize_input(
    x: jax.Array, plan: Plan, static: jax.Array | None = None
) -> QuantizedActivations:
    """x [..., K] in 8 bits; static: the scale, where it was fixed in calibration."""
    codes, scale = _codes(jax.lax.stop_gradient(x), plan, static)
    return QuantizedActivations(x, codes, scale, plan)


def normalised_input(
    x: jax.Array, gain: jax.Array, epsilon: float, plan: Plan
) -> QuantizedActivations:
    """`quantize_input(rms_norm(x, gain, epsilon), plan)`, in one kernel where there is one."""
    normed = rms_norm(x, gain, epsilon)
    if plan.group is None and _has_kernel(x, plan, norm=True):
        rows = _rows(plan.activation.dtype, None, epsilon)
        codes, scale = rows(*map(jax.lax.stop_gradient, (x, gain)))
        return QuantizedActivations(normed, codes, scale, plan)
    return quantize_input(normed, plan)


def target(w: PreparedTensor) -> Capability | None:
    """The capability of this process's GPU.

    Without one the program may still be exported to the GPU that the weight was prepared for, if
    that is what Mosaic takes an absent device for: Hopper.  None: XLA multiplies.
    """
    found, _ = capability_of(None)
    return found or (w.capability if w.capability == HOPPER else None)


def _codes(x: jax.Array, plan: Plan, static: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    act = plan.activation
    dtype = jnp.dtype(act.dtype)
    if act.granularity == "tensor":
        scale = reference.activation_scale(x, dtype, None) if static is None else static
        scale = scale.astype(jnp.float32)
        return reference.quantize_activations(x, scale, dtype), scale
    if _has_kernel(x, plan):
        return _rows(act.dtype, plan.group, None)(x, ())
    return quantize_rows_reference(x, act.dtype, group=plan.group)


def _has_kernel(x: jax.Array, plan: Plan, *, norm: bool = False) -> bool:
    act = plan.activation
    if plan.capability is None or act.granularity == "tensor":
        return False
    sizes = (x.shape[-1], x.dtype.name, act.dtype, plan.capability)
    return supported_rows(*sizes, group=plan.group, norm=norm) is None


def _rows(codes: str, group: int | None, epsilon: float | None):
    """(x, gain) -> codes and scales, by the kernel; gain is () where epsilon is None."""

    def run(x, gain):
        norm = () if epsilon is None else (gain,)
        return quantized_rows(x, *norm, codes=codes, group=group, epsilon=epsilon)

    return over_rows(run)
