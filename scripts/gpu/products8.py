"""Programs that multiply with several 8-bit weights in turn (see `products`).

Methods: "kernel"; "xla", the same arithmetic with XLA's own product, codes of the weight with the
inputs contiguous, as its 8-bit matrix library wants them; "scaled_matmul", `jax.nn.scaled_matmul`
with scales per 128 inputs; "rows", the quantization of the activations alone; "whole", it and the
kernel's product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq.pallas_kernels.quantize_rows import quantize_rows
from jq.pallas_kernels.w8a8 import w8a8, w8a8_reference
from jq.pallas_kernels.weight8 import BLOCK, W8Weight
from scripts.gpu import family, products
from scripts.gpu.problems8 import Problem8, device_problem8

METHODS = ("kernel", "xla", "scaled_matmul", "rows", "whole")
_QUANTIZES = ("rows", "whole")


def rotations(p: Problem8) -> int:
    """How many weights are multiplied with in turn."""
    return products.cold_rotations(p.k * p.n, p.m)


def arguments(p: Problem8, method: str) -> list[Any]:
    """(x, scale of x, weight) of each product, all different; x unquantized, and no scale, for what
    quantizes it."""
    return jax.block_until_ready([_make(p, method, number) for number in range(rotations(p))])


def _make(p: Problem8, method: str, number: int) -> tuple[jax.Array, Any, W8Weight]:
    x, x_scale, w = device_problem8(p, number)
    if method in _QUANTIZES:
        return _dequantized(x, x_scale), None, w
    return x, x_scale, w


@jax.jit
def _dequantized(x: jax.Array, x_scale: jax.Array) -> jax.Array:
    wide = jnp.repeat(x_scale, x.shape[1] // x_scale.shape[1], axis=1)
    return (x.astype(jnp.float32) * wide).astype(jnp.bfloat16)


def product(p: Problem8, method: str, config: Any = None) -> Callable[..., Any]:
    """(x, scale of x, weight) -> y, or the codes and scales."""
    group = BLOCK if p.block else None
    dtype: Any = p.dtype
    quantize = functools.partial(quantize_rows, dtype=dtype, group=group)
    multiply = functools.partial(
        w8a8, out_dtype=p.out, config=config, compute_capability=family.here()
    )

    def kernel(x, x_scale, w):
        return multiply(x, x_scale, w)

    def xla(x, x_scale, w):
        return w8a8_reference(x, x_scale, w, out_dtype=p.out)

    def rows(x, x_scale, w):
        del x_scale, w
        return quantize(x)

    def whole(x, x_scale, w):
        del x_scale
        return multiply(*quantize(x), w)

    every = {"kernel": kernel, "xla": xla, "scaled_matmul": _scaled, "rows": rows, "whole": whole}
    # A function of its own in the program, so that it is lowered once for all weights.
    return jax.jit(every[method])


def _scaled(x: jax.Array, x_scale: jax.Array, w: W8Weight) -> jax.Array:
    """A scale per column and 128 inputs, as many as that function wants, for both operands."""
    groups = x.shape[1] // BLOCK
    left = jnp.broadcast_to(x_scale, (x.shape[0], groups))
    if w.block is None:
        right = jnp.broadcast_to(w.scale[:, None], (w.n, groups))
    else:
        right = jnp.repeat(w.scale, BLOCK, axis=0)
    operands = (a[None] for a in (x, w.codes, left, right))
    return jax.nn.scaled_matmul(*operands, preferred_element_type=jnp.bfloat16)[0]


def build(p: Problem8, method: str, config: Any = None) -> Any:
    """Compile the program that computes every product; called as program(triples)."""
    one = product(p, method, config)

    def every(triples):
        return [one(*triple) for triple in triples]

    shapes = jax.eval_shape(lambda: [_make(p, method, 0)] * rotations(p))
    return jax.jit(every).lower(shapes).compile()


def spread(y: Any) -> float:
    """Root mean square of a result, about 1 where all is well, also of quantized activations."""
    if isinstance(y, tuple):
        codes, scale = (a[:8].astype(jnp.float32) for a in y)
        wide = jnp.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
        return products.spread(codes * wide * codes.shape[1] ** 0.25)
    return products.spread(y)
