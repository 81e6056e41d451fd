"""Quantized kernels in Flax's own `nn.Dense`.

`nn.Dense` compares the shape of its kernel with the initializer's and refuses a QTensor. Inside

    with quantized_dense():
        y = model.apply({"params": params}, x)

every `nn.Dense` whose kernel is a QTensor multiplies with `jq.qmatmul` instead; all other modules
and kernels are left alone. Models that call `jq.qmatmul` themselves, as `jq.models` do, need none
of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jq.matmul import qmatmul
from jq.qtensor import QTensor


def quantized_dense() -> AbstractContextManager[None]:
    """A context in which `nn.Dense` reads QTensor kernels.

    It acts while a model is traced: a compiled function made inside it needs no context later, and
    one that is compiled outside refuses a QTensor as `nn.Dense` does, rather than running wrongly.
    The `precision` and `dot_general` of the module are of no use to a quantized product.
    """
    return nn.intercept_methods(_route)


def _route(
    next_fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if context.method_name != "__call__" or not _is_dense(module):
        return next_fun(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not isinstance(kernel, QTensor):
        return next_fun(*args, **kwargs)
    return _dense(module, kernel, *args, **kwargs)


def _is_dense(module: nn.Module) -> bool:
    """`nn.Dense`, or a subclass that did not change what it does."""
    return isinstance(module, nn.Dense) and type(module).__call__ is nn.Dense.__call__


def _dense(module: Any, kernel: QTensor, inputs: Any) -> Any:
    """What `nn.Dense` does, in the dtype that inputs and bias (or `module.dtype`) promote to."""
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, bias = module.promote_dtype(inputs, bias, dtype=module.dtype)
    y = qmatmul(x, kernel)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)
