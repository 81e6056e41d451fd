"""The devices that share the work of calibration, and which calibration sample lies on which.

    mesh = data_mesh(8)                                # or any jax.sharding.Mesh of one's own
    jq.quantize_model(model, params, recipe, tokens, mesh=mesh, axis="data")

Samples are dealt out like cards: sample i is row i // D of device i % D.  The first n samples,
on which scales are searched, are then spread evenly too.  Devices that get one sample less have a
last row that is never computed, and counts for nothing: no sample is padded or left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jq.cuts import misfit
from jq.errors import SpecError
from jq.spec import QuantSpec


def data_mesh(devices: int | Literal["all"] | None = None, axis: str = "data") -> Mesh | None:
    """A mesh of this process's first devices; None where it would be one device.

    Args:
      devices: how many, or "all"; None is all of an accelerator's, and one CPU.
      axis: its name.
    Raises: SpecError when there are fewer.
    """
    local = jax.local_devices()
    if devices is None:
        devices = 1 if local[0].platform == "cpu" else len(local)
    count = checked_count(devices, len(local), local[0].platform)
    if count == 1:
        return None
    return Mesh(np.array(local[:count]), (axis,), axis_types=(AxisType.Auto,))


def checked_count(asked: int | Literal["all"], there: int, platform: str) -> int:
    """How many of a process's devices are meant.  Raises SpecError for more than are there."""
    count = there if asked == "all" else asked
    if not 1 <= count <= there:
        good = "1" if there == 1 else f"1 to {there}"
        raise SpecError(
            f"{count} devices are asked for, and this process has {there} ({platform}): "
            f"give {good}, or all"
        )
    return count


@dataclasses.dataclass(frozen=True)
class DataMesh:
    """A mesh whose `axis` cuts the calibration samples, and the weights of the block at work.

    Other axes of the mesh repeat the work.
    """

    mesh: Mesh
    axis: str = "data"

    @property
    def size(self) -> int:
        """Devices along the axis."""
        return self.mesh.shape[self.axis]

    def sharding(self, *spec: Any) -> NamedSharding:
        """The sharding of a PartitionSpec's entries; none: a whole copy on every device."""
        return NamedSharding(self.mesh, P(*spec))

    def rows_of(self, samples: int) -> int:
        """Rows of each device for so many samples."""
        return -(-samples // self.size)

    def counts(self, samples: int) -> np.ndarray:
        """int32 [D]: how many of its rows are samples, for each device."""
        return (samples - np.arange(self.size) + self.size - 1).astype(np.int32) // self.size

    def deal(self, whole: np.ndarray) -> np.ndarray:
        """Samples [S, ...] -> rows [D * rows, ...] in the devices' order; those without one: 0."""
        rows = self.rows_of(len(whole))
        out = np.zeros((rows * self.size, *whole.shape[1:]), whole.dtype)
        out[: len(whole)] = whole
        return out.reshape(rows, self.size, *whole.shape[1:]).swapaxes(0, 1).reshape(out.shape)

    def undeal(self, rows: np.ndarray, samples: int) -> np.ndarray:
        """The inverse of `deal`."""
        cut = rows.reshape(self.size, -1, *rows.shape[1:]).swapaxes(0, 1)
        return cut.reshape(rows.shape)[:samples]


def shard_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The axis by which a parameter of a block is cut into so many parts, or None.

    Vectors lie whole on every device, and so does what no axis divides; all else is cut along its
    last axis, the outputs, if possible.
    """
    if len(shape) < 2:
        return None
    return next((i for i in reversed(range(len(shape))) if shape[i] % parts == 0), None)


def columns_are_cut(spec: QuantSpec, k: int, n: int, parts: int) -> bool:
    """Whether so many devices share the outputs of a weight [k, n] when it is rounded: whole scales
    and bytes for each.  Otherwise each of them rounds all of it."""
    return spec.granularity != "tensor" and misfit(spec, k, n, 1, parts, tiled=False) is None


def checked_mesh(mesh: Mesh | None, axis: str) -> DataMesh | None:
    """The mesh to work on; None for one device, whose programs are those without a mesh.

    Axes of any type will do: the work is laid out explicitly.
    Raises: SpecError when the mesh has no such axis.
    """
    if mesh is None:
        return None
    if axis not in mesh.axis_names:
        raise SpecError(f"the mesh has axes {', '.join(mesh.axis_names)}, and none {axis!r}")
    if mesh.shape[axis] == 1:
        return None
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return DataMesh(Mesh(mesh.devices, mesh.axis_names, axis_types=types), axis)


def mesh_fact(mesh: Mesh | None, axis: str) -> str:
    """What a run's journal remembers of the mesh, on which the order of its sums depends."""
    devices = checked_mesh(mesh, axis)
    if devices is None:
        return "1 device"
    # Which samples are whose, as a process reads its own again.
    owners = [device.process_index for device in devices.mesh.devices.flat]
    order = "" if owners == sorted(owners) else f" of processes {' '.join(map(str, owners))}"
    return f"{devices.size} devices{order}"
