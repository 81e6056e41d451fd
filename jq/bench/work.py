"""How much a step has to compute and to move, and which of the two bounds it on a device."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq import tree
from jq.bench.ceilings import Ceilings
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Work:
    """Attributes:
    operations: by the dtype that is multiplied; a product and a sum are two.
    nbytes: that have to be moved at least once between memory and processor.
    """

    operations: Mapping[str, float]
    nbytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte (arithmetic intensity)."""
        return sum(self.operations.values()) / self.nbytes


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Work against a device's ceilings.

    Williams, Waterman, Patterson (2009), doi:10.1145/1498765.1498785.

    Attributes:
        intensity: operations per byte of the work.
        balance: operations per byte where the device is as long busy with either; less is bound by
            memory, more by compute.
        memory_seconds, compute_seconds: to move the bytes, and to do the products, at best.
    """

    intensity: float
    balance: float
    memory_seconds: float
    compute_seconds: float

    @property
    def bound(self) -> str:
        """ "memory" or "compute": what takes longer at best."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"

    @property
    def seconds(self) -> float:
        """The shortest possible time."""
        return max(self.memory_seconds, self.compute_seconds)

    def fraction(self, seconds: float) -> float:
        """Of the ceiling, that a measured time reaches."""
        return self.seconds / seconds

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """JSON-ready, for a measured time."""
        told = {"bound": self.bound, "ceiling_seconds": self.seconds}
        return dataclasses.asdict(self) | told | {"fraction_of_ceiling": self.fraction(seconds)}


def roofline(work: Work, ceilings: Ceilings) -> Roofline:
    """SpecError where the work needs products whose rate was not measured."""
    compute = sum(count / ceilings.rate(dtype) for dtype, count in work.operations.items())
    memory = work.nbytes / ceilings.bytes_per_second
    return Roofline(work.intensity, work.intensity * memory / compute, memory, compute)


def operand_dtype(kernel: Any, dtype: Any) -> str:
    """The dtype of the products with a kernel: that of the activations, or 8 bits."""
    if isinstance(kernel, QTensor | PreparedTensor) and kernel.spec.activation is not None:
        return kernel.spec.activation.dtype
    return jnp.dtype(dtype).name


def linear_work(kernel: Any, rows: int, dtype: Any) -> Work:
    """x [rows, K] @ kernel: the weight as it is stored, inputs and outputs once."""
    k, n = kernel.shape[-2:]
    moved = _nbytes(kernel) + rows * (k + n) * jnp.dtype(dtype).itemsize
    return Work({operand_dtype(kernel, dtype): 2.0 * rows * k * n}, moved)


def decode_work(model: Any, params: Any, batch_size: int, cache_tokens: int) -> Work:
    """One decode step: all weights and caches once, activations neglected.

    Args:
      model, params: the decoder and its parameters.
      batch_size: sequences.
      cache_tokens: slots of the cache, all of which attention reads.
    """
    return prefill_work(model, params, batch_size, 1, cache_tokens)


def prefill_work(model: Any, params: Any, batch_size: int, tokens: int, cache_tokens: int) -> Work:
    """One prefill of `tokens` tokens per sequence, padding included, the rest as in `decode_work`.

    The output head makes the logits of one token per sequence, as generation asks for.
    """
    config, dtype = model.config, jnp.dtype(model.dtype)
    operations: Counter[str] = Counter()
    moved = 0
    for path, leaf in tree.leaves(params):
        outer = path.startswith(("embed/", "lm_head/"))
        if path == "embed/embedding" and not config.tie_word_embeddings:
            continue  # a step looks up a few rows only
        moved += _nbytes(leaf)
        if len(leaf.shape) == 2:
            rows = batch_size * (1 if outer else tokens)
            operations[operand_dtype(leaf, dtype)] += 2 * rows * math.prod(leaf.shape)
    slots = batch_size * cache_tokens * config.num_hidden_layers * config.head_dim
    operations[dtype.name] += 4 * tokens * slots * config.num_attention_heads
    moved += 2 * slots * config.num_key_value_heads * dtype.itemsize
    return Work({key: float(count) for key, count in operations.items()}, moved)


def _nbytes(leaf: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
