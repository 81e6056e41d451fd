"""Along which axis the devices of a mesh share a parameter, whatever the mesh.

One rule for two: `jq.tensor_parallel` cuts weights by it, and `jq.checkpoint` stores them in pieces
along the same axis, so that a process can read those of its own devices.
"""

from __future__ import annotations

import dataclasses
import math

from jq.blockwise import BlockwiseModel
from jq.qtensor import QTensor
from jq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Weight:
    """What decides about a quantized weight's cut: format, sizes, and whether it has an act
    order."""

    spec: QuantSpec
    k: int
    n: int
    ordered: bool

    @classmethod
    def of(cls, w: QTensor) -> Weight:
        """That of a QTensor, or of its shapes."""
        return cls(w.spec, w.k, w.n, w.order is not None)


@dataclasses.dataclass(frozen=True)
class CutRule:
    """The rule for one model.

    Linears that read a norm (q, k, v, gate, up) are cut by their outputs, those behind them (o,
    down) by their inputs; in act order, and with 8-bit activations, all by their outputs.
    Embeddings [V, D] are cut along the vocabulary, vectors not at all.

    model: its `linear_groups` say which linears stand behind others; None where there is no such
      model, and the last axis is cut of all.
    """

    model: BlockwiseModel | None = None

    def by_inputs(self, path: str, weight: Weight | None = None) -> bool:
        """Whether a linear's kernel is cut along K; `weight`: None for a plain array."""
        whole = weight is not None and (weight.ordered or weight.spec.activation is not None)
        return self._behind(path) and not whole

    def together(self, path: str) -> int:
        """Outputs of a linear that must not be cut apart: those of a head, of q, k and v."""
        block, linear = self._linear(path)
        groups = self.model.linear_groups if self.model is not None and block else ()
        for reader in groups:
            if reader.head_dim and any(
                linear in group.linears and reader.producer in group.linears for group in groups
            ):
                return reader.head_dim
        return 1

    def of_array(self, path: str, shape: tuple[int, ...]) -> int | None:
        """The axis of a parameter that is no QTensor; None for what is not cut."""
        if len(shape) != 2:
            return None
        kernel = self.model is None or path.endswith("/kernel")
        return int(kernel and not self.by_inputs(path))

    def of_field(self, path: str, weight: Weight, field: str, shape: tuple[int, ...]) -> int | None:
        """The axis of an array of the QTensor at `path`."""
        return axis_of_field(field, shape, by_inputs=self.by_inputs(path, weight))

    def _behind(self, path: str) -> bool:
        block, linear = self._linear(path)
        groups = self.model.linear_groups if self.model is not None and block else ()
        return any(g.producer_kind == "linear" and linear in g.linears for g in groups)

    def _linear(self, path: str) -> tuple[str, str]:
        """The block of a kernel, "" if it is in none, and the linear's path there."""
        block, _, linear = path.removesuffix("/kernel").partition("/")
        known = self.model is not None and block in self.model.block_names
        return block if known else "", linear


def axis_of_field(field: str, shape: tuple[int, ...], *, by_inputs: bool) -> int | None:
    """The axis of a QTensor's array when its K or N is cut; None for what every shard has whole."""
    if field in ("order", "input_scale"):
        return None
    axis = len(shape) - (2 if by_inputs else 1)
    return axis if field == "codes" or shape[axis] > 1 else None


def misfit(
    spec: QuantSpec, k: int, n: int, k_parts: int, n_parts: int, *, tiled: bool
) -> str | None:
    """Why a weight cannot be cut into so many equal parts, or None if it can.

    tiled: the parts are prepared weights, in tiles of 64 x 64.
    """
    tile = 64 if tiled else 1
    byte = 1 if spec.bits == 8 else 8  # eight codes share bytes
    size = 1 if spec.granularity in ("channel", "tensor") else spec.group_size
    block = size if spec.granularity == "block" else 1
    # Zero points are packed along the outputs.
    zero = byte if spec.has_zero_point and not tiled else 1
    for name, length, parts, unit in (
        ("K", k, k_parts, math.lcm(tile, byte, size)),
        ("N", n, n_parts, math.lcm(tile, block, zero)),
    ):
        if parts > 1 and length % (parts * unit):
            return f"{parts} shards of {name} = {length} are not multiples of {unit}"
    return None
