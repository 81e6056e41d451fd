"""Run the kernels for Ampere and Ada in NumPy, block by block, watching their shared memory.

Mosaic's interpreter knows neither `cp.async` nor `mma.sync`.  Here the kernels' own Python runs
once per block, with the names it takes from JAX replaced: copies arrive when they are waited for
and not before, whoever reads what has not arrived, or writes what may still be being read, is
told, and so is whoever leaves an array.  What stands for a warpgroup's registers is whole arrays:
their layouts are proved elsewhere (test_dequant, test_ampere).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels import dequant
from jq.pallas_kernels.ampere import pipeline, w4a16, w8a8
from jq.pallas_kernels.compat import plgpu
from jq.pallas_kernels.weight import SYMMETRIC_ZERO, TRICKS


class Race(AssertionError):
    """What a GPU would answer with wrong numbers, sometimes."""


@dataclasses.dataclass(repr=False)
class Ref:
    """An array in memory, or a part of it; `reads` and `writes` since the last barrier, and the
    elements that a copy is going to write (`expected`): views of the whole array's.
    others: arrays in the same memory."""

    values: np.ndarray
    expected: np.ndarray
    reads: np.ndarray
    writes: np.ndarray
    others: tuple[Ref, ...] = ()

    @classmethod
    def full(cls, values, others=()) -> Ref:
        return cls(values, *(np.zeros(values.shape, bool) for _ in range(3)), others)

    @property
    def busy(self) -> bool:
        """Whether some thread may be using it still, or what shares its memory."""
        states = (self.expected, self.reads, self.writes)
        return any(s.any() for s in states) or any(other.busy for other in self.others)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def at(self) -> Ref:
        return self

    @property
    def T(self) -> Ref:
        return self._each(lambda a: a.T)

    def _each(self, part) -> Ref:
        arrays = (self.values, self.expected, self.reads, self.writes)
        return Ref(*map(part, arrays), self.others)

    def _part(self, index) -> Ref:
        index = index if isinstance(index, tuple) else (index,)
        if index == (Ellipsis,):
            return self
        found = []
        for i, size in zip(index, self.shape, strict=False):
            if not isinstance(i, slice):
                i = int(i)
            last = i.stop if isinstance(i, slice) else i + 1
            first = i.start if isinstance(i, slice) else i
            if not 0 <= (first or 0) <= (size if last is None else last) <= size:
                raise IndexError(f"{index} leaves an array of shape {self.shape}")
            found.append(i)
        return self._each(lambda a: a[tuple(found)])

    def __getitem__(self, index):
        """A part: of `.at`, a reference.  Elements of global memory are read as scalars."""
        part = self._part(index)
        return part if part.shape else part.values[()]

    def __setitem__(self, index, value) -> None:
        part = self._part(index)
        if part.busy:
            raise Race("written while it may be being read, written or copied to")
        assert part.dtype == value.dtype
        part.values[...] = value
        part.writes[...] = True

    def load(self) -> np.ndarray:
        if self.expected.any():
            raise Race("read before its copy was waited for")
        if self.writes.any():
            raise Race("read before a barrier after it was written")
        self.reads[...] = True
        return self.values.copy()


class Machine:
    """What stands for Pallas while one block runs."""

    OOBFillMode = plgpu.OOBFillMode
    Layout = plgpu.Layout

    def __init__(self, axes: dict[str, int], shared: list[Ref]):
        self.axes, self.shared = axes, shared
        self.groups: list[tuple[Ref, np.ndarray] | None] = []

    # plgpu

    planar_snake = staticmethod(lambda *args: tuple(int(i) for i in plgpu.planar_snake(*args)))

    def copy_gmem_to_smem(self, source: Ref, destination: Ref, *, oob_mode) -> None:
        assert oob_mode == plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        assert source.shape == destination.shape
        assert source.dtype == destination.dtype
        if destination.busy:
            raise Race("copied to while it may be being read, written or copied to")
        destination.expected[...] = True
        self.groups.append((destination, source.values.copy()))

    def commit_nothing(self) -> None:
        self.groups.append(None)

    def wait_gmem_to_smem(self, n: int) -> None:
        while len(self.groups) > n:
            if (group := self.groups.pop(0)) is not None:
                group[0].values[...] = group[1]
                group[0].expected[...] = False
        self.barrier()

    def barrier(self) -> None:
        for ref in self.shared:
            ref.reads[...] = ref.writes[...] = False

    @staticmethod
    def load(ref: Ref, *, layout, optimized=True) -> np.ndarray:
        return ref.load()

    @staticmethod
    def layout_cast(values, layout):
        return values

    @staticmethod
    def mma(sums, left, right):
        wide = np.int32 if left.dtype == np.int8 else np.float64
        return (sums + left.astype(wide) @ right.astype(wide)).astype(sums.dtype)

    @staticmethod
    def store_to_global(destination: Ref, values) -> None:
        destination[...] = values

    # pl

    @staticmethod
    def ds(start, size) -> slice:
        return slice(int(start), int(start) + size)

    @staticmethod
    def when(condition):
        return lambda function: function() if condition else None

    # lax

    def axis_index(self, name: str) -> int:
        return self.axes[name]

    @staticmethod
    def fori_loop(first, end, body, carry):
        for i in range(int(first), int(end)):
            carry = body(i, carry)
        return carry

    select = staticmethod(lambda condition, yes, no: int(yes if condition else no))
    div = staticmethod(lambda a, b: int(a) // int(b))
    min = staticmethod(lambda a, b: min(int(a), int(b)))

    @staticmethod
    def broadcast_in_dim(values, shape, dimensions):
        [axis] = dimensions
        return np.broadcast_to(values.reshape([-1 if a == axis else 1 for a in (0, 1)]), shape)


def first_row(fmt, inputs: int) -> int:
    return inputs // fmt.group_size if fmt.group_size else 0


def operand(fmt, words, scales, offsets, mma):
    """The A operand as `layout` and `weight` define it: a thread's words hold the codes of its
    place, and (code - zero) * scale is rounded once."""
    assert mma
    trick = TRICKS[fmt.dtype]
    nibbles = words.view(np.uint32).reshape(4, 8, 4, 4, 1) >> np.arange(0, 32, 4, dtype=np.uint32)
    # axes: warp g t step, e kh h -> columns (warp h g), inputs (step kh t e)
    codes = (nibbles & 15).reshape(4, 8, 4, 4, 2, 2, 2).transpose(0, 6, 1, 3, 5, 2, 4)
    codes = codes.reshape(64, 64).astype(np.float64)

    def spread(rows):
        return np.repeat(np.stack(rows, 1).astype(np.float64), 64 // len(rows), axis=1)

    if fmt.symmetric:
        values = (codes - SYMMETRIC_ZERO) * spread(scales) * 2.0**trick.unit
    else:
        base = 2.0 ** (trick.unit + trick.zero[0])
        values = (codes * base + spread(offsets)) * spread(scales)
    return values.astype(scales[0].dtype)


NUMPY = SimpleNamespace(zeros=np.zeros, int32=np.int32, float32=np.float32, dtype=jnp.dtype)


def poison(kind, others=()) -> Ref:
    """Uninitialized memory of an SMEM type, or of a result."""
    values = np.zeros(kind.shape, kind.dtype)
    values[...] = 77 if values.dtype in (np.int8, np.int32) else np.nan
    return Ref.full(values, others)


def union(kind) -> tuple[tuple[Ref, ...], Ref]:
    """Uninitialized memory of the union of some arrays and another one."""
    group, last = kind.refs
    group = tuple(map(poison, group))
    return group, poison(last, group)


@contextlib.contextmanager
def standing_in(machine: Machine, module):
    """The machine in place of the modules that a kernel takes names from."""
    with contextlib.ExitStack() as stack:

        def replace(where, **names):
            for name, value in names.items():
                if hasattr(where, name):
                    stack.enter_context(mock.patch.object(where, name, value))

        for where in (module, pipeline):
            replace(where, pl=machine, plgpu=machine, lax=machine, jnp=NUMPY)
        for name in ("barrier", "commit_nothing", "store_to_global"):
            replace(pipeline, **{name: getattr(machine, name)})
        if module is w4a16:
            names = vars(dequant) | {"operand": operand, "first_row": first_row}
            replace(module, dequant=SimpleNamespace(**names))
        yield


def kernel(module, machine_type, body, *, out_type, scratch_types, grid, grid_names, **_):
    """`plgpu.kernel`: (arrays) -> the result, having run all blocks, the last one first.

    Raises: Race; IndexError for what leaves an array; AssertionError for results that are not
      written, or for copies left under way.
    """

    def launch(*inputs):
        result = poison(out_type)
        blocks = itertools.product(*map(range, grid))
        for block in reversed(list(blocks)):
            shared = {name: union(kind) for name, kind in scratch_types.items()}
            axes = dict(zip(grid_names, block, strict=True))
            machine = machine_type(axes, jax.tree.leaves(shared))
            arrays = [Ref.full(np.asarray(a)) for a in inputs]
            with standing_in(machine, module):
                body(*arrays, result, **shared)
            assert not any(machine.groups), "ends while copies are under way"
        assert result.writes.all(), "not all of the result is written"
        return jnp.asarray(result.values)

    return launch


@contextlib.contextmanager
def emulation(machine_type=Machine):
    """Within, `w4a16_ampere` and `w8a8_ampere` run in NumPy."""
    with contextlib.ExitStack() as stack:
        for module in (w4a16, w8a8):
            names = vars(plgpu) | {"kernel": functools.partial(kernel, module, machine_type)}
            stack.enter_context(mock.patch.object(module, "plgpu", SimpleNamespace(**names)))
        yield
