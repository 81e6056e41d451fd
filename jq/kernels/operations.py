"""Operations that are a kernel on CUDA and XLA's elsewhere, decided when a program is lowered, so
that no other platform ever traces a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jq.pallas_kernels.quantize_rows import quantize_rows, quantize_rows_reference
from jq.pallas_kernels.w4a16 import w4a16, w4a16_reference
from jq.pallas_kernels.w8a8 import w8a8, w8a8_reference
from jq.support import Capability


class Operation:
    """A function of pytrees that `kernel` computes on CUDA and `reference` everywhere else.

    kernel, reference: called with the arrays, and with the static arguments by name.
    """

    def __init__(
        self, name: str, kernel: Callable[..., Any], reference: Callable[..., Any]
    ) -> None:
        self._reference = reference
        self._primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_abstract_eval(self._shapes)
        # Without compilation (`jax.disable_jit`): XLA's.
        primitive.def_impl(_flat(reference))
        mlir.register_lowering(primitive, _lowering(reference))
        mlir.register_lowering(primitive, _for_cuda(kernel), platform="cuda")

    def __call__(self, *args: Any, **static: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        results = self._primitive.bind(*leaves, structure=structure, **static)
        out = jax.eval_shape(lambda *a: self._reference(*a, **static), *args)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    def _shapes(self, *leaves: Any, structure: Any, **static: Any) -> list[ShapedArray]:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        out = jax.eval_shape(
            lambda *s: _flat(self._reference)(*s, structure=structure, **static), *shapes
        )
        return [ShapedArray(each.shape, each.dtype) for each in out]


def _flat(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    def flat(*leaves: Any, structure: Any, **static: Any) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves), **static))

    return flat


def _lowering(function: Callable[..., Any]) -> Any:
    return mlir.lower_fun(_flat(function), multiple_results=True)


def _for_cuda(kernel: Callable[..., Any]) -> Any:
    """Kernels are lowered for one platform: in a program for several, this branch is for one."""

    def lower(ctx, *args, **params):
        module = ctx.module_context.replace(platforms=("cuda",))
        return _lowering(kernel)(ctx.replace(module_context=module), *args, **params)

    return lower


def over_rows(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """function(rows, rest) under `jax.vmap`: a batch of rows alone is more rows; anything else is
    computed one after the other."""

    @jax.custom_batching.custom_vmap
    def mapped(rows, rest):
        return function(rows, rest)

    @mapped.def_vmap
    def _(axis_size, in_batched, rows, rest):
        rows_batched, rest_batched = in_batched
        if all(jax.tree.leaves(rows_batched)) and not any(jax.tree.leaves(rest_batched)):
            out = mapped(rows, rest)
        else:
            whole, batched = (rows, rest), (rows_batched, rest_batched)
            part = jax.tree.map(lambda a, b: a if b else None, whole, batched)

            def one(part):
                def fill(a, b):
                    return a if b is None else b

                filled = jax.tree.map(fill, whole, part, is_leaf=lambda a: a is None)
                return mapped(*filled)

            out = jax.lax.map(one, part)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


# The kernels are looked up when they are traced.
def _w4a16(x, w, *, capability: Capability):
    return w4a16(x, w, compute_capability=capability)


def _w8a8(codes, scale, w, *, dtype: str, capability: Capability):
    return w8a8(codes, scale, w, out_dtype=dtype, compute_capability=capability)


def _rows(x, *norm, codes: str, group: int | None, epsilon: float | None):
    return quantize_rows(x, codes, group=group, norm=_norm(norm, epsilon))


def _rows_reference(x, *norm, codes: str, group: int | None, epsilon: float | None):
    return quantize_rows_reference(x, codes, group=group, norm=_norm(norm, epsilon))


def _norm(gain: tuple[jax.Array, ...], epsilon: float | None) -> tuple[jax.Array, float] | None:
    return None if epsilon is None else (gain[0], epsilon)


int4_product = Operation("w4a16", _w4a16, lambda x, w, *, capability: w4a16_reference(x, w))
eight_bit_product = Operation(
    "w8a8",
    _w8a8,
    lambda codes, scale, w, *, dtype, capability: w8a8_reference(codes, scale, w, out_dtype=dtype),
)
quantized_rows = Operation("quantize_rows", _rows, _rows_reference)
