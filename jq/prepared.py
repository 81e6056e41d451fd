"""`PreparedTensor`: a quantized weight in the layout of the kernel that multiplies with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jq.spec import QuantSpec
from jq.support import Capability


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedTensor:
    """What `jq.prepare` puts in the place of a `QTensor` that a kernel of the device serves.

    Arrays (pytree children; leading axes, if any, are stacked layers or experts):
      weight: the kernel's own pytree (`jq.pallas_kernels`: `weight.W4Weight`, `weight8.W8Weight`),
        of logical shape [..., K, N].  Its sizes are those of its arrays, so that a shard is a
        weight.
      order: int32 [..., K] or None.  Row r of the weight multiplies input order[r] (act order).
      input_scale: float32 [...] or None; the static scale of the activations.
    Static: spec, the format that was prepared; capability, of the GPU that it was prepared for.

    It holds the same codes, scales and zero points as the QTensor, and nothing else of it is
    needed.  Checkpoints keep the portable layout: save before preparing.
    """

    weight: Any
    order: jax.Array | None
    input_scale: jax.Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    capability: Capability = dataclasses.field(metadata={"static": True})

    @property
    def k(self) -> int:
        return self.weight.k

    @property
    def n(self) -> int:
        return self.weight.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K, N]."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
