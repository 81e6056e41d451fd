"""Tensor parallelism: a whole parameter tree cut over the devices of a mesh by rule.

    mesh = tensor_mesh(4)                                  # or any mesh with an axis "model"
    model, params = jq.load("path/to/checkpoint", mesh=mesh)
    logits = model.apply({"params": params}, tokens)       # and jq.generate, as on one device

Linears that read a norm (q, k, v, gate, up) are cut by their outputs, those behind them (o, down)
by their inputs, so that a block exchanges two sums per token (Shoeybi et al., arXiv 1909.08053).
Two kinds of weights are cut by their outputs everywhere, at the price of gathering their input:
those in act order, whose rows lie anywhere, and those with 8-bit activations, whose scale is that
of a whole token.  The results are then the same as on one device, up to the order of sums.

Where the devices do not divide the heads of q, k or v, that linear is whole on every device, and so
is its cache: heads in parts would be put together again at every step.  Embedding and output head
are cut along the vocabulary, vectors lie whole on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jq import tree
from jq.blockwise import BlockwiseModel
from jq.cuts import CutRule, Weight, misfit
from jq.errors import SpecError
from jq.qtensor import QTensor
from jq.sharded import ShardedTensor
from jq.sharding import axes_of, partition_specs

Place = Callable[[str, tuple[int, ...]], Any]


def tensor_mesh(devices: int, axis: str = "model") -> Mesh:
    """A mesh of this process's first devices.  Raises SpecError when there are fewer."""
    local = jax.local_devices()
    if not 1 <= devices <= len(local):
        raise SpecError(f"{devices} devices are asked for, and this process has {len(local)}")
    return Mesh(np.array(local[:devices]), (axis,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """The rule for one model on one mesh.

    model: its `linear_groups` say which linears stand behind others.
    mesh, axis: the devices; other axes of the mesh repeat the weights.
    """

    model: BlockwiseModel
    mesh: Mesh
    axis: str = "model"

    def __post_init__(self) -> None:
        if self.axis not in self.mesh.axis_names:
            raise SpecError(
                f"the mesh has axes {', '.join(self.mesh.axis_names)}, and none {self.axis!r}"
            )
        types = (AxisType.Auto,) * len(self.mesh.axis_names)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=types)
        object.__setattr__(self, "mesh", mesh)

    @property
    def cuts(self) -> CutRule:
        """The axes of all weights, whatever the mesh."""
        return CutRule(self.model)

    @property
    def parts(self) -> int:
        """Into how many parts weights are cut."""
        return self.mesh.shape[self.axis]

    def cut(
        self, path: str, n: int, weight: Weight | None = None, parts: int | None = None
    ) -> tuple[str | None, str | None]:
        """Mesh axes of K and N of a linear's kernel.

        n: its outputs; weight: None for a plain array; parts: as if there were so many.
        """
        if self.cuts.by_inputs(path, weight):
            return self.axis, None
        unit = self.cuts.together(path)
        apart = unit > 1 and n % (unit * (parts or self.parts)) > 0
        return None, None if apart else self.axis

    def check(self, weights: Mapping[str, Weight]) -> None:
        """Raise SpecError, listing the tensors, where shards would cut a group of inputs or a byte
        of codes, with the numbers of devices that would not."""
        bad = {path: reason for path, w in weights.items() if (reason := self._misfit(path, w))}
        if bad:
            good = [
                parts
                for parts in range(1, self.mesh.size + 1)
                if not any(self._misfit(path, w, parts) for path, w in weights.items())
            ]
            raise SpecError(
                f"{len(bad)} quantized weights cannot be cut over {self.parts} devices: "
                + "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:8])
                + (f"; and {len(bad) - 8} more" if len(bad) > 8 else "")
                + f". All can over {', '.join(map(str, good))}"
            )

    def _misfit(self, path: str, w: Weight, parts: int | None = None) -> str | None:
        k, n = self.cut(path, w.n, w, parts)
        cuts = (axes_of(self.mesh, k), axes_of(self.mesh, n))
        if parts is not None:
            cuts = (parts if k else 1, parts if n else 1)
        return misfit(w.spec, w.k, w.n, *cuts, tiled=False)

    def sharding(self, *spec: Any) -> NamedSharding:
        """The sharding of a PartitionSpec's entries."""
        return NamedSharding(self.mesh, P(*spec))

    def of_array(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter that is no QTensor lies; whole where the devices do not divide it."""
        axis = self.cuts.of_array(path, shape)
        if axis is not None and (shape[axis] % self.parts or self._apart(path, shape[-1])):
            axis = None
        return self._along(axis, shape)

    def _apart(self, path: str, n: int, weight: Weight | None = None) -> bool:
        return self.cut(path, n, weight) == (None, None)

    def _along(self, axis: int | None, shape: tuple[int, ...]) -> NamedSharding:
        spec = (self.axis if i == axis else None for i in range(len(shape)))
        return self.sharding(*(spec if axis is not None else ()))

    def of_qtensor(self, path: str, w: QTensor) -> QTensor:
        """`w` with a NamedSharding in the place of each array; w may be its shapes."""
        specs = partition_specs(w, *self.cut(path, w.n, Weight.of(w)))
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda s: isinstance(s, P)
        )

    def shard(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters on the mesh, every QTensor as a ShardedTensor.

        What lies there already is not moved.  Raises SpecError, see `check`.
        """
        leaves = dict(tree.leaves(params))
        self.check({path: Weight.of(w) for path, w in leaves.items() if isinstance(w, QTensor)})
        out = dict(params)
        for path, leaf in leaves.items():
            if isinstance(leaf, QTensor):
                placed = jax.device_put(leaf, self.of_qtensor(path, leaf))
                k, n = self.cut(path, leaf.n, Weight.of(leaf))
                made: Any = ShardedTensor(placed, self.mesh, k, n)
            else:
                made = jax.device_put(leaf, self.of_array(path, np.shape(leaf)))
            out = tree.replace(out, path, made)
        return out

    def placer(self, weights: Mapping[str, Weight]) -> Place:
        """`shardings` for `jq.load` of a checkpoint with these quantized weights.

        Raises SpecError, see `check`, before anything is read.
        """
        self.check(weights)

        def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
            owner, _, field = path.rpartition("/")
            if owner not in weights:
                return self.of_array(path, shape)
            weight = weights[owner]
            if self._apart(owner, weight.n, weight):
                return self.sharding()
            return self._along(self.cuts.of_field(owner, weight, field, shape), shape)

        return place


def unsharded(params: Any) -> Any:
    """The same tree with QTensors in the place of ShardedTensors; arrays stay where they are."""
    return jax.tree.map(
        lambda a: a.weight if isinstance(a, ShardedTensor) else a,
        params,
        is_leaf=lambda a: isinstance(a, ShardedTensor),
    )
