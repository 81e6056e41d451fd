"""Latency of a model's linears, each shape and format by itself, on its own weights."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq import tree
from jq.bench.result import Latency
from jq.bench.timing import Clock, time_calls
from jq.bench.work import Work, linear_work
from jq.errors import ModelError
from jq.kernels.choice import explain
from jq.matmul import qmatmul
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class LinearTiming:
    """Linears of one shape and format, with one number of rows.

    Attributes:
        names: such as "attention/q_proj", without the layer.
        shape: [K, N].
        format: dtype of the weights, with the group size.
        count: how many the model has.
        measured: how many of them the timed program multiplies with, one after the other, so that
            caches do not hold the weight.
        rows: of x.
        kernel, reason: what multiplies, and why (see `jq.explain`).
        first_call_seconds: compilation included; not in the latency.
        latency: per product.
        work: of one product.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    format: str
    count: int
    measured: int
    rows: int
    kernel: str
    reason: str
    first_call_seconds: float
    latency: Latency
    work: Work

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in seconds."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {"names": list(self.names), "shape": list(self.shape)}
        return plain | {"latency": self.latency.to_dict(), "work": dataclasses.asdict(self.work)}


def measure_linears(
    params: Any,
    *,
    dtype: Any,
    rows: Sequence[int] = (1,),
    samples: int = 20,
    most: int = 8,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[LinearTiming, ...]:
    """Time the product with every shape and format of linear in a parameter tree.

    Args:
      params: the parameters; bring them into the layout of the device's kernels first
        (`jq.prepare`).
      dtype: of the activations.
      rows: of x: the batch size for decoding, batch size times tokens for a prefill.
      samples: of each latency; one is the mean of several calls.
      most: weights of equal shape and format that are multiplied with in turn.
      progress: called with (done, in all, text).
      clock: seconds.
    Raises: ModelError where there is no linear, or counts below 1.
    """
    groups = _groups(params)
    if not groups or not rows or min(*rows, samples, most) < 1:
        raise ModelError(
            f"{len(groups)} kinds of linears, rows {tuple(rows)}, samples {samples} and most "
            f"{most}: give parameters with kernels, and at least 1 of each"
        )
    jobs = [(key, kernels, m) for key, kernels in groups.items() for m in rows]
    timings = []
    for done, ((shape, text), kernels, m) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{shape[0]} x {shape[1]} {text}, {m} rows")
        timings.append(_measure(shape, text, kernels, m, dtype, samples, most, clock))
    if progress is not None:
        progress(len(jobs), len(jobs), "")
    return tuple(timings)


def _groups(params: Any) -> dict[tuple[tuple[int, int], str], list[tuple[str, Any]]]:
    """(shape, format) -> (name, kernel) of each linear, in the order of the tree."""
    groups = defaultdict(list)
    for path, leaf in tree.leaves(params):
        parts = path.split("/")
        if parts[-1] == "kernel" and len(leaf.shape) == 2:
            name = "/".join(parts[1:-1]) or parts[0]  # "lm_head/kernel" has no layer
            groups[tuple(leaf.shape), _format(leaf)].append((name, leaf))
    return dict(groups)


def _format(kernel: Any) -> str:
    if not isinstance(kernel, QTensor | PreparedTensor):
        return jnp.dtype(kernel.dtype).name
    spec = kernel.spec
    text = spec.dtype if spec.group_size == -1 else f"{spec.dtype} g{spec.group_size}"
    text += "" if spec.symmetric else " zp"
    text += " act-order" if kernel.order is not None else ""
    return text if spec.activation is None else f"{text} x {spec.activation.dtype}"


def _measure(
    shape: tuple[int, int],
    text: str,
    kernels: Sequence[tuple[str, Any]],
    rows: int,
    dtype: Any,
    samples: int,
    most: int,
    clock: Clock,
) -> LinearTiming:
    weights = [kernel for _, kernel in kernels[:most]]
    x = jax.random.normal(jax.random.key(rows), (rows, shape[0])).astype(dtype)
    first, latency = time_calls(lambda: _products(x, weights), samples=samples, clock=clock)
    choice = explain(weights[0], rows=rows, dtype=dtype)
    return LinearTiming(
        names=tuple(dict.fromkeys(name for name, _ in kernels)),
        shape=shape,
        format=text,
        count=len(kernels),
        measured=len(weights),
        rows=rows,
        kernel=choice.kernel,
        reason=choice.reason,
        first_call_seconds=first,
        latency=Latency(tuple(seconds / len(weights) for seconds in latency.seconds)),
        work=linear_work(weights[0], rows, dtype),
    )


@jax.jit
def _products(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
    """x @ each weight, one after the other."""
    outputs = []
    for weight in weights:
        # Without the barrier XLA could join products of equal shape, which no model lets it do.
        x, y = jax.lax.optimization_barrier((x, qmatmul(x, weight)))
        outputs.append(y)
    return outputs
