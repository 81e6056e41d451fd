"""The work on a block, shared by the devices of a mesh: samples, weights and outputs are cut.

The programs are those of `jq.calib.mesh_programs`; here stands where arrays lie between them.

Weights lie in shards of their last axis.  What the devices do not divide, or whose outputs share
one scale, lies whole on every device, and each of them solves it.

What the programs exchange, in bytes: `jq.communication`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jq import tree
from jq.blockwise import BlockwiseModel
from jq.calib import mesh_programs as programs
from jq.calib.one_device import check_hidden, embed
from jq.calib.scaling import Scaling
from jq.calib.stages import StageResult, Stream
from jq.chunks import largest_divisor
from jq.data_mesh import DataMesh, columns_are_cut, shard_axis
from jq.group import RoundedGroup
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.qtensor import QTensor
from jq.spec import QuantSpec
from jq.statistics import InputStats


@dataclasses.dataclass(frozen=True)
class ManyDevices:
    """`jq.calib.one_device.OneDevice` on a mesh.

    model: see `jq.blockwise`.
    batch_size, offload: see `quantize_blocks`; batch_size counts the samples of each device.
    devices: the mesh.
    samples: of the calibration set.

    A stream's arrays are [D * rows, ...] in the order of `DataMesh.deal`, cut over the devices;
    with `offload` they are NumPy arrays, the rows of this process's devices.
    """

    model: BlockwiseModel
    batch_size: int
    offload: bool
    devices: DataMesh
    samples: int

    def first(self, outer: Mapping[str, Any], tokens: np.ndarray, mask: Any) -> Stream:
        """What the first block reads: the embedded calibration set.

        The default device embeds it, `batch_size` samples at a time.
        """
        dealt = self.devices.deal(tokens)
        outer = jax.device_put(outer)  # once, where it is in host memory
        shape = jax.eval_shape(lambda t: embed(self.model, outer, t), dealt).shape

        def part(index: Any) -> np.ndarray:
            some, size = dealt[index[0]], self.batch_size
            x = [embed(self.model, outer, some[i : i + size]) for i in range(0, len(some), size)]
            return np.concatenate([np.asarray(a) for a in x])

        x = self._own(shape[0], part) if self.offload else self._made(shape, part)
        return Stream(x, None, self._mask(mask))

    def restored(self, hidden: Any, tokens: np.ndarray, mask: Any) -> Stream:
        """What a block reads, as the one before has left it in an earlier run."""
        rows = self.devices.rows_of(len(tokens)) * self.devices.size
        own = self._own(rows, lambda index: np.arange(rows)[index[0]])
        is_own = len(hidden) == len(own)  # of this process, see `QuantizedBlock`
        check_hidden(hidden, (len(own) if is_own else rows, tokens.shape[1]))
        shape = (rows, *hidden.shape[1:])
        if self.offload:
            x = np.asarray(hidden) if is_own else np.asarray(hidden)[own]
        elif isinstance(hidden, jax.Array):
            x = jax.device_put(hidden, self._rows())  # which leaves it there if it is there
        elif is_own:
            x = jax.make_array_from_process_local_data(self._rows(), hidden, shape)
        else:
            x = self._made(shape, lambda index: hidden[index])
        return Stream(x, None, self._mask(mask))

    def prepare(self, params: Any, dtype: Any) -> tuple[Any, Any]:
        """See `prepare_block`; the block lies in shards afterwards."""
        params = self.settle(params)
        return programs.prepare(params, dtype, devices=self.devices, specs=_specs(params))

    def settle(self, params: Any) -> Any:
        """Parameters that were changed or have just come, in their shards."""
        return jax.tree.map(
            lambda a: a if isinstance(a, QTensor) else place_shards(self.devices, a),
            params,
            is_leaf=lambda a: isinstance(a, QTensor),
        )

    def stage(
        self, kind: Hashable, index: int, params: Any, stream: Stream, *, collect: bool
    ) -> StageResult:
        """See `run_stage`."""
        stats = self._empty(index, params) if collect else None
        run = functools.partial(
            programs.stage,
            model=self.model,
            kind=kind,
            index=index,
            devices=self.devices,
            specs=_specs(params),
        )
        counts = self.devices.counts(self.samples)
        if not self.offload:
            x, carry, finite, stats = run(params, stream, stats, self._dealt(counts))
            flags = self.devices.undeal(np.asarray(finite), self.samples)
        else:
            x, carry, flags, stats = self._in_chunks(run, params, stream, stats, counts)
        if stats is not None:
            stats = programs.finish(stats, devices=self.devices)
        return StageResult(Stream(x, carry, stream.mask), stats, flags)

    def _in_chunks(self, run: Any, params: Any, stream: Stream, stats: Any, counts: Any) -> Any:
        """A stage on a stream in host memory: `batch_size` rows of each device at a time."""
        rows = self.devices.rows_of(self.samples)
        size = largest_divisor(rows, self.batch_size)
        whole, flags, waiting = None, [], None
        for start in range(0, rows, size):
            chunk = self._chunk(stream, start, size)
            some = self._dealt(np.clip(counts - start, 0, size).astype(np.int32))
            x, carry, finite, stats = run(params, chunk, stats, some)
            # Dispatch is asynchronous: this chunk is computed while the one before is fetched.
            if waiting is not None:
                whole = self._fetch(whole, *waiting)
            waiting = start, (x, carry)
            flags.append(finite)
        assert waiting is not None
        x, carry = self._fetch(whole, *waiting)
        finite = np.concatenate(
            [self.devices.undeal(np.asarray(f), self.devices.size * size) for f in flags]
        )
        return x, carry, finite[: self.samples], stats

    def choose(
        self,
        kind: Hashable,
        index: int,
        params: Any,
        stream: Stream,
        stats: InputStats,
        *,
        specs: tuple[QuantSpec | None, ...],
        method: AWQ | SmoothQuant,
    ) -> Scaling:
        """See `choose_scale`: each device looks at its share of the first samples."""
        count = min(self.samples, max(1, method.search_tokens // stream.x.shape[1]))
        rows = self.devices.rows_of(count)
        return programs.choose(
            params,
            self._chunk(stream, 0, rows) if self.offload else stream,
            stats,
            self._dealt(self.devices.counts(count)),
            model=self.model,
            kind=kind,
            index=index,
            specs=specs,
            method=method,
            devices=self.devices,
            cuts=_specs(params),
            rows=rows,
        )

    def round(
        self,
        weights: Sequence[jax.Array],
        stats: InputStats | None,
        spec: QuantSpec,
        rounding: RTN | GPTQ,
        scale: jax.Array | None,
    ) -> RoundedGroup:
        """See `round_group`: each device solves its columns of each weight."""
        hessian = None
        if isinstance(rounding, GPTQ):
            assert stats is not None, "the driver collects what GPTQ needs"
            hessian = programs.factor(stats.gram, spec, rounding, devices=self.devices)
        cut = [columns_are_cut(spec, w.shape[0], w.shape[1], self.devices.size) for w in weights]
        parts = []
        for which in sorted(set(cut)):
            chosen = [i for i, is_cut in enumerate(cut) if is_cut == which]
            some = tuple(weights[i] for i in chosen)
            if not which:
                some = jax.device_put(some, self.devices.sharding())
            made = programs.solve(
                some, stats, hessian, scale, spec, rounding, devices=self.devices, cut=which
            )
            parts.append((chosen, made))
        return parts[0][1] if len(parts) == 1 else _merged(parts)

    # Where arrays lie

    def _rows(self) -> NamedSharding:
        return self.devices.sharding(self.devices.axis)

    def _made(self, shape: tuple[int, ...], part: Any) -> jax.Array:
        return jax.make_array_from_callback(shape, self._rows(), part)

    def _own(self, rows: int, part: Any) -> np.ndarray:
        """The parts of this process's devices, one after the other."""
        return np.concatenate([part((cut,)) for cut in self._own_rows(rows)])

    def _own_rows(self, rows: int) -> list[slice]:
        places = self._rows().addressable_devices_indices_map((rows,)).values()
        starts = {(cut[0].start or 0): cut[0] for cut in places if cut is not None}
        return [starts[start] for start in sorted(starts)]

    def _mask(self, mask: Any) -> Any:
        if mask is None:
            return None
        dealt = self.devices.deal(np.asarray(mask))
        if self.offload:
            return self._own(len(dealt), lambda index: dealt[index[0]])
        return self._made(dealt.shape, lambda index: dealt[index])

    def _dealt(self, counts: np.ndarray) -> jax.Array:
        return self._made(counts.shape, lambda index: counts[index])

    def _chunk(self, stream: Stream, start: int, size: int) -> Stream:
        """Rows [start, start + size) of every device, on the devices."""
        rows = self.devices.rows_of(self.samples)

        def put(a: np.ndarray) -> jax.Array:
            some = a.reshape(-1, rows, *a.shape[1:])[:, start : start + size]
            shape = (self.devices.size * size, *a.shape[1:])
            some = some.reshape(-1, *a.shape[1:])
            return jax.make_array_from_process_local_data(self._rows(), some, shape)

        return jax.tree.map(put, stream)

    def _fetch(self, whole: Any, start: int, part: Any) -> Any:
        """`whole`, made if it is None, with the rows of this process's devices filled in."""
        rows = self.devices.rows_of(self.samples)

        def own(a: jax.Array) -> np.ndarray:
            shards = {shard.index[0].start or 0: shard.data for shard in a.addressable_shards}
            return np.stack([np.asarray(shards[start]) for start in sorted(shards)])

        part = jax.tree.map(own, part)
        if whole is None:
            whole = jax.tree.map(
                lambda a: np.empty((a.shape[0] * rows, *a.shape[2:]), a.dtype), part
            )
        for all_rows, some in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            view = all_rows.reshape(some.shape[0], rows, *some.shape[2:])
            view[:, start : start + some.shape[1]] = some
        return whole

    def _empty(self, index: int, params: Any) -> InputStats:
        first = self.model.linear_groups[index].linears[0]
        return programs.zeros(tree.get(params, f"{first}/kernel").shape[-2], devices=self.devices)


def place_shards(devices: DataMesh, array: Any) -> jax.Array:
    """An array of a block's parameters in its shards (see `shard_axis`)."""
    at = shard_axis(np.shape(array), devices.size)
    sharding = devices.sharding(*() if at is None else (*(None,) * at, devices.axis))
    if isinstance(array, jax.Array):
        return array if array.sharding == sharding else jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _specs(params: Any) -> programs.Specs:
    return tuple(leaf.sharding.spec for leaf in jax.tree.leaves(params))


def _merged(parts: Sequence[tuple[list[int], RoundedGroup]]) -> RoundedGroup:
    """One group of linears that were rounded in several programs, in their order."""
    order = np.argsort([i for chosen, _ in parts for i in chosen])
    groups = [made for _, made in parts]

    def ordered(lists: Any) -> tuple[Any, ...]:
        flat = [item for items in lists for item in items]
        return tuple(flat[i] for i in order)

    reports = [group.report for group in groups]
    report = reports[0]._replace(
        **{
            field: jnp.concatenate([getattr(report, field) for report in reports])[order]
            for field in ("weight_error", "output_error", "rtn_output_error")
        }
    )
    return RoundedGroup(
        ordered(group.qtensors for group in groups),
        ordered(group.kernels for group in groups),
        report,
    )
