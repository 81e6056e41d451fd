"""A quantized weight that knows how it is cut: what a parameter tree holds for a mesh."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import QuantSpec

Axes = str | tuple[str, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedTensor:
    """A weight [K, N] on the devices of a mesh, made by `jq.tensor_parallel.shard_params`.

    A compiler can cut plain products by itself, but neither a kernel nor packed codes; so
    `jq.qmatmul` multiplies with this one by `jq.sharding.sharded_qmatmul`.

    weight: the QTensor or PreparedTensor, whose arrays lie in shards.
    Static: mesh; k and n, the mesh axes that cut K and N.
    """

    weight: QTensor | PreparedTensor
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    k: Axes = dataclasses.field(default=None, metadata={"static": True})
    n: Axes = dataclasses.field(default=None, metadata={"static": True})

    @property
    def spec(self) -> QuantSpec:
        """The number format."""
        return self.weight.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [K, N] of the whole."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, on all devices together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weight))
