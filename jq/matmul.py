"""`qmatmul`: the one place where the kernel of a linear is chosen; `explain` says which and why."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jq.errors import SpecError
from jq.packing import packed_size
from jq.pallas_kernels import reference
from jq.pallas_kernels.w4a16 import supported, w4a16, w4a16_reference
from jq.pallas_kernels.weight import W4Weight, dequantize, unsupported_format, w4_weight
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import QuantSpec

HOPPER = (9, 0)
W4A16, REFERENCE = "w4a16", "reference"


def qmatmul(x: jax.Array, w: jax.Array | QTensor | PreparedTensor) -> jax.Array:
    """y = x @ w for a plain, a quantized or a prepared weight.

    Args:
      x: floating [..., K].
      w: Array [K, N], or QTensor or PreparedTensor of logical shape [K, N] (index or scan over
        stacked ones first).  Inside `jax.shard_map`, its shard (see `jq.sharding`).
    Returns: [..., N] in x's dtype.  Products accumulate in float32, or int32 for int8 operands.

    Differentiable in x: the gradient of a weight that runs with 8-bit activations is that of the
    dequantized weight (straight-through estimate).  A prepared weight, and one with 8-bit
    activations, is a constant: its own gradients are zeros.
    Raises: SpecError when the sizes do not match.
    """
    if not isinstance(w, QTensor | PreparedTensor):
        return reference.weight_only(x, w)
    if isinstance(w, QTensor):
        w = _with_sizes_of_arrays(w)
    if w.ndim != 2 or x.shape[-1] != w.k:
        raise SpecError(
            f"x {x.shape} does not multiply a quantized weight of logical shape {w.shape}"
        )
    if w.order is not None:
        x = reorder(x, w.order)
    if isinstance(w, PreparedTensor):
        return _prepared(x, w.weight)
    if w.spec.activation is None:
        return reference.weight_only(x, w.dequantize_stored(x.dtype))
    return _eight_bit(x, w)


def reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [..., K] with its inputs in a weight's stored order, int32 [K]."""
    # Without the barrier XLA's CPU backend gathers x into columns: no bfloat16 dot takes them.
    return jax.lax.optimization_barrier(jnp.take(x, order, axis=-1))


def _with_sizes_of_arrays(w: QTensor) -> QTensor:
    """`w`, or what it is inside `jax.shard_map`: a shard, whose static sizes are the whole's."""
    rows, n = w.codes.shape[-2:]
    packed = w.codes.dtype == jnp.uint8
    if (rows, n) == (packed_size(w.k, w.spec.bits) if packed else w.k, w.n):
        return w
    return dataclasses.replace(w, k=rows * 8 // w.spec.bits if packed else rows, n=n)


# Which kernel, and why


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
    """kernel: "w4a16" (Mosaic GPU, `jq.pallas_kernels`) or "reference" (plain XLA).
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
    capability, name = _capability(device)
    if capability is None:
        return Choice(REFERENCE, f"{name} is no CUDA device: kernels need one of capability 9.0")
    reason = _unsupported(w.spec, w.k, w.n, jnp.dtype(dtype).name)
    if reason is None:
        shapes = jax.eval_shape(lambda: _blank(w.spec, w.k, w.n, jnp.dtype(dtype).name))
        reason = supported(shapes, rows, capability)
    if reason is not None:
        return Choice(REFERENCE, reason)
    return Choice(W4A16, f"int4 on {name}")


def _capability(device: Any) -> tuple[tuple[int, int] | None, str]:
    """Compute capability of a CUDA device or of "sm_90" (None for other devices), and a name."""
    if device is None:
        device = backend.get_default_device()
    if isinstance(device, str):
        if not (device.startswith("sm_") and device[3:].isdigit() and len(device) > 4):
            raise SpecError(f"device {device!r} is neither a jax.Device nor a name like 'sm_90'")
        return (int(device[3:-1]), int(device[-1])), device
    text = getattr(device, "compute_capability", None)
    name = f"{device.device_kind}"
    if not isinstance(text, str) or not text.replace(".", "").isdigit():
        return None, name
    major, _, minor = text.partition(".")
    return (int(major), int(minor or 0)), f"{name} (compute capability {text})"


def _unsupported(spec: QuantSpec, k: int, n: int, dtype: str) -> str | None:
    """Why no kernel serves a format, whatever the device; None if one does."""
    if spec.dtype != "int4":
        return f"{spec.dtype} weights have no kernel yet"
    if spec.activation is not None:
        return "8-bit activations have no kernel yet"
    size = None if spec.group_size in (-1, k) else spec.group_size
    if reason := unsupported_format(k, n, size, dtype):
        return reason
    # A scale per column is applied in float32; scales of groups are held in x's dtype.
    if size is not None and spec.scale_dtype not in (dtype, "bfloat16"):
        return f"scales are {spec.scale_dtype}, which {dtype} would round"
    return None


def _blank(spec: QuantSpec, k: int, n: int, dtype: Any) -> W4Weight:
    groups = spec.num_groups(k)
    zero = None if spec.symmetric else jnp.zeros((groups, n), jnp.uint8)
    codes, scale = jnp.zeros((k, n), jnp.uint8), jnp.zeros((groups, n), jnp.float32)
    return w4_weight(codes, scale, zero, dtype=dtype)


# Prepared weights


@functools.partial(jax.jit, static_argnames="dtype")
def to_kernel(w: QTensor, dtype: Any) -> PreparedTensor:
    """Bring a weight that `explain` calls a kernel for into that kernel's layout, on its device.

    Args:
      w: int4 [..., K, N]; leading axes are kept.
      dtype: name of the dtype of the activations.
    Stacked weights are converted one after the other, so that only one is ever unpacked.
    """

    def convert(w: QTensor) -> W4Weight:
        columns = (w.scale.shape[-2], w.n)
        zero = w.zeros()
        if zero is not None:
            zero = jnp.broadcast_to(zero, columns)
        scale = jnp.broadcast_to(w.scale.astype(jnp.float32), columns)
        return w4_weight(w.unsigned_codes(), scale, zero, dtype=dtype)

    lead = w.shape[:-2]
    if not lead:
        return PreparedTensor(convert(w), w.order, w.spec)
    flat = jax.tree.map(lambda a: a.reshape(math.prod(lead), *a.shape[len(lead) :]), w)
    weight = jax.lax.map(convert, flat)
    weight = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), weight)
    return PreparedTensor(weight, w.order, w.spec)


@jax.jit
def _prepared(x: jax.Array, w: W4Weight) -> jax.Array:
    """x [..., K] @ w, in stored order.  A function of its own in the program of a model, so that
    linears of equal shape are lowered once."""
    return _product(x, w)


@jax.custom_vjp
def _product(x: jax.Array, w: W4Weight) -> jax.Array:
    return _batched(x, w)


def _product_forward(x, w):
    return _batched(x, w), w


def _product_backward(w, dy):
    dx = reference.weight_only(dy, dequantize(w).T)
    return dx, jax.tree.map(_zero_tangent, w)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_batching.custom_vmap
def _batched(x: jax.Array, w: W4Weight) -> jax.Array:
    rows = math.prod(x.shape[:-1])
    capability, _ = _capability(None)
    # Without a GPU in this process the program may still be exported to one, and a weight is only
    # prepared for devices that the kernel is for.
    if x.dtype != jnp.dtype(w.dtype) or supported(w, rows, capability or HOPPER) is not None:
        return _reference(x, w)
    leaves, structure = jax.tree.flatten(w)
    return w4a16_p.bind(x, *leaves, structure=structure)


@_batched.def_vmap
def _batch(axis_size, in_batched, x, w):
    x_batched, w_batched = in_batched
    if not any(jax.tree.leaves(w_batched)):
        return _batched(x, w), True  # further rows of x
    whole = (x, w)
    mapped = jax.tree.map(lambda a, b: a if b else None, whole, (x_batched, w_batched))

    def one(part):
        x, w = jax.tree.map(
            lambda a, b: a if b is None else b, whole, part, is_leaf=lambda a: a is None
        )
        return _batched(x, w)

    return jax.lax.map(one, mapped), True


def _reference(x: jax.Array, w: W4Weight) -> jax.Array:
    """XLA on the prepared weight, rounded to its own dtype whatever that of x."""
    if x.dtype == jnp.dtype(w.dtype):
        return w4a16_reference(x, w)
    return reference.weight_only(x, dequantize(w))


# The kernel for CUDA and XLA for the rest, decided when a program is lowered: an operation of its
# own, so that no other platform ever traces a kernel.
w4a16_p = Primitive("w4a16")


@w4a16_p.def_abstract_eval
def _(x, *leaves, structure):
    return ShapedArray((*x.shape[:-1], jax.tree.unflatten(structure, leaves).n), x.dtype)


@w4a16_p.def_impl
def _(x, *leaves, structure):
    """Without compilation (`jax.disable_jit`): XLA's."""
    return _reference(x, jax.tree.unflatten(structure, leaves))


def _lowering(product):
    def flat(x, *leaves, structure):
        return product(x, jax.tree.unflatten(structure, leaves))

    return mlir.lower_fun(flat, multiple_results=False)


def _lower_for_cuda(ctx, *args, **params):
    """Kernels are lowered for one platform: in a program for several, this branch is for one."""
    module = ctx.module_context.replace(platforms=("cuda",))
    capability, _ = _capability(None)
    product = functools.partial(w4a16, compute_capability=capability or HOPPER)
    return _lowering(product)(ctx.replace(module_context=module), *args, **params)


mlir.register_lowering(w4a16_p, _lowering(_reference))
mlir.register_lowering(w4a16_p, _lower_for_cuda, platform="cuda")


# 8-bit activations


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def _eight_bit(x: jax.Array, w: QTensor) -> jax.Array:
    act = w.spec.activation
    assert act is not None
    dtype = jnp.dtype(act.dtype)
    scale = w.scale.astype(jnp.float32)
    if act.granularity == "group":
        groups = x.reshape(*x.shape[:-1], scale.shape[0], -1)
        x_scale = reference.activation_scale(groups, dtype, -1)
        codes = reference.quantize_activations(groups, x_scale, dtype)
        return reference.block_scaled_matmul(codes, x_scale, w.codes, scale, x.dtype)
    if w.input_scale is not None:
        x_scale = w.input_scale.astype(jnp.float32)
    else:
        x_scale = reference.activation_scale(x, dtype, -1 if act.granularity == "token" else None)
    codes = reference.quantize_activations(x, x_scale, dtype)
    return reference.scaled_matmul(codes, x_scale, w.codes, scale, x.dtype)


def _eight_bit_forward(x, w):
    return _eight_bit(x, w), w


def _eight_bit_backward(w, dy):
    dx = reference.weight_only(dy, w.dequantize_stored(dy.dtype).T)
    return dx, jax.tree.map(_zero_tangent, w)


def _zero_tangent(leaf: jax.Array):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_eight_bit.defvjp(_eight_bit_forward, _eight_bit_backward)
