"""Statistics of the inputs of any Flax model's linears, for `jq.quantize`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jq import experts as stacked
from jq import statistics, tree
from jq.dense import quantized_dense
from jq.errors import CalibrationError, NonFiniteError
from jq.qtensor import QTensor
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Apply = Callable[[Any, Any], Any]
Collected = dict[str, InputStats]


def collect(
    model: nn.Module | Apply,
    params: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    pattern: str | None = None,
    experts: str | None = None,
) -> Collected:
    """Run a model on batches and remember what its linears read.

    A linear is a module with a 2-D parameter "kernel" that is called on one array [..., K]: Flax's
    `nn.Dense`, and the linears of `jq.models`.  Every row of its inputs counts, so leave padding
    out of the batches.  Inputs of three axes and more are added one entry of the first axis at a
    time, so that the order of the sums does not depend on how entries were batched.

    Args:
      model: a Linen module, run as `model.apply({"params": params}, batch)`; or a function
        (params, batch) -> anything, not jitted, that applies one.
      params: the "params" collection; may be sharded, and quantized in part.
      batches: each is handed on as it is; batches of equal shapes share a compiled program.
      pattern: a regular expression, searched in the path ("Dense_0", "mlp/up"); None takes all
        linears.  Each costs K * K floats.
      experts: a regular expression; modules whose path matches hold the linears of E experts, a
        3-D parameter "kernel" [E, K, N], and are called on tokens that were dispatched to them,
        [E, C, K], with or without a second argument, the mask [E, C] of places that hold a token.
        Without it rows of zeros count as empty.  Each costs E * K * K floats (see `jq.experts`).
    Returns: path -> statistics, of all linears that were called.
    Raises:
      CalibrationError: no batches, no linear that matches, none that was called, or one that is
        called inside a loop or another jit, from which its inputs cannot be taken.
      NonFiniteError: an input with NaN or infinity, naming linear and batch.
    """
    run = _applied(model)
    stats = {
        path: statistics.init(shape[0]) if len(shape) == 2 else stacked.init(*shape[:2])
        for path, shape in _linears(params, pattern, experts).items()
    }
    step = jax.jit(lambda stats, params, batch: _step(run, stats, params, batch))
    count = 0
    for batch in batches:
        try:
            stats = step(stats, params, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise CalibrationError(
                "a linear is called inside a loop, nn.remat, nn.scan or another jit, and its "
                "inputs cannot be taken out of there: collect from a model without them, or give "
                "a pattern that leaves it out"
            ) from error
        _check_finite(stats, count)
        count += 1
    if count == 0:
        raise CalibrationError("there are no calibration batches")
    called = {path: s for path, s in stats.items() if float(jnp.sum(s.count)) > 0}
    _check_quantized(params, stats, called)
    if not called:
        raise CalibrationError(
            f"none of {', '.join(stats)} was called with inputs; if the function is jitted, give "
            "the one inside"
        )
    return jax.jit(lambda all_stats: jax.tree.map(_finish, all_stats, is_leaf=_is_stats))(called)


def _applied(model: nn.Module | Apply) -> Apply:
    if isinstance(model, nn.Module):
        return lambda params, batch: model.apply({"params": params}, batch)
    return model


def _linears(
    params: Mapping[str, Any], pattern: str | None, experts: str | None
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the kernels that match; those of experts are [E, K, N]."""
    kernels = {}
    for path, leaf in tree.leaves(params):
        linear, ndim = path.removesuffix("/kernel"), getattr(leaf, "ndim", 0)
        stack = experts is not None and re.search(experts, linear) is not None
        if linear != path and ndim == (3 if stack else 2):
            kernels[linear] = leaf.shape
    found = {p: k for p, k in kernels.items() if pattern is None or re.search(pattern, p)}
    if not found:
        raise CalibrationError(
            f"no linear matches {pattern!r}; there are {', '.join(kernels) or 'none'}"
        )
    return found


def _step(run: Apply, stats: Collected, params: Any, batch: Any) -> Collected:
    seen: list[tuple[str, jax.Array, jax.Array | None]] = []

    def catch(next_fun, args, kwargs, context):
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path in stats:
            if stats[path].gram.ndim == 3:
                mask = args[1] if len(args) > 1 else kwargs.get("mask")
                seen.append((path, args[0], mask))
            elif len(args) == 1:
                seen.append((path, args[0], None))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(catch), quantized_dense():
        run(params, batch)
    # Added out here: inside a function that JAX caches, sums would get stuck.
    stats = dict(stats)
    for path, x, mask in seen:
        stats[path] = _add(stats[path], x, mask)
    return stats


def _add(stats: InputStats, x: Float[Array, "*B K"], mask: jax.Array | None) -> InputStats:
    if stats.gram.ndim == 3:
        experts, k = stats.abs_sum.shape
        places = x.reshape(experts, -1, k)
        return stacked.update(stats, places, None if mask is None else mask.reshape(experts, -1))
    k = stats.gram.shape[0]
    if x.ndim < 3:
        return statistics.update(stats, x.reshape(-1, k))
    rows = x.reshape(x.shape[0], -1, k)
    return lax.scan(lambda stats, row: (statistics.update(stats, row), None), stats, rows)[0]


def _check_quantized(params: Any, stats: Collected, called: Collected) -> None:
    """A quantized `nn.Dense` is out of sight where the caller's own context routes it first."""
    unseen = [path for path in stats if path not in called]
    hidden = [p for p in unseen if isinstance(tree.get(params, f"{p}/kernel"), QTensor)]
    if hidden:
        raise CalibrationError(
            f"{', '.join(hidden)}: quantized, and not seen; collect outside of quantized_dense(), "
            "which is entered here anyway, or give a pattern that leaves out what is never called"
        )


def _check_finite(stats: Collected, batch: int) -> None:
    finite = jax.device_get(_finite(stats))
    for path, good in finite.items():
        if not good:
            raise NonFiniteError(
                f"{path}: its input is NaN or infinite in calibration batch {batch}"
            )


@jax.jit
def _finite(stats: Collected) -> dict[str, jax.Array]:
    # A NaN or an infinity anywhere in an input is one on the diagonal; so is a square's overflow.
    return {
        path: jnp.isfinite(jnp.sum(jnp.trace(s.gram, axis1=-2, axis2=-1)))
        for path, s in stats.items()
    }


def _is_stats(value: Any) -> bool:
    return isinstance(value, InputStats)


def _finish(stats: InputStats) -> InputStats:
    return stacked.finish(stats) if stats.gram.ndim == 3 else statistics.finish(stats)
