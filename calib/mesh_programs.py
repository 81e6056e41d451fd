"""The programs of a mesh: in each, every device does what one device would, on its part.

* a stage gathers the kernels it runs, and runs them on the device's own samples, one by one;
* statistics are added up by each device, and over the devices once per group;
* the Hessian is factored by every device for itself.  If one did it the others would wait as long,
  and what the sum saves (to one instead of to all) is spent on handing out the factor;
* a solve takes the device's own columns of each weight, which is how weights lie anyway.

What they exchange, in bytes: `jq.communication`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jq import statistics
from jq.calib.scaling import Scaling, choose_scale
from jq.calib.stages import prepare_block, ready, run_samples
from jq.data_mesh import DataMesh
from jq.group import RoundedGroup, solve_group
from jq.methods.gptq import GPTQ, HessianFactor, factor_hessian
from jq.sharding import partition_specs
from jq.spec import QuantSpec
from jq.statistics import InputStats

# How the leaves of a block's parameters are cut, in order.
Specs = tuple[P, ...]


@functools.partial(jax.jit, static_argnames=("dtype", "devices", "specs"))
def prepare(params, dtype, *, devices: DataMesh, specs: Specs):
    """See `prepare_block`: each device casts its shards, and all learn whether all are finite."""
    axis = devices.axis

    def local(params):
        cast, finite = prepare_block(params, dtype)
        flags, structure = jax.tree.flatten(finite)
        bad = lax.psum(jnp.stack(flags).astype(jnp.float32) - 1.0, axis)
        return cast, jax.tree.unflatten(structure, list(bad == 0))

    cuts = _tree_of(params, specs)
    return jax.shard_map(
        local, mesh=devices.mesh, in_specs=(cuts,), out_specs=(cuts, P()), check_vma=False
    )(params)


@functools.partial(jax.jit, static_argnames=("model", "kind", "index", "devices", "specs"))
def stage(params, stream, stats, counts, *, model, kind, index, devices: DataMesh, specs: Specs):
    """(x, carry, finite, stats): of every device its rows and sums, but all flags."""
    axis = devices.axis

    def local(params, stream, stats, count):
        # In the dtype of the products before they travel.
        params = _gathered(ready(params, stream.x.dtype), specs, axis)
        stats = jax.tree.map(lambda a: a[0], stats)
        made = run_samples(model, kind, index, params, stream, stats, count[0])
        finite = lax.all_gather(made.finite, axis, tiled=True)
        sums = jax.tree.map(lambda a: a[None], made.stats)
        return made.stream.x, made.stream.carry, finite, sums

    rows = P(axis)
    return jax.shard_map(
        local,
        mesh=devices.mesh,
        in_specs=(_tree_of(params, specs), rows, rows, rows),
        out_specs=(rows, rows, P(), rows),
        check_vma=False,
    )(params, stream, stats, counts)


@functools.partial(jax.jit, static_argnames=("k", "devices"))
def zeros(k: int, *, devices: DataMesh) -> InputStats:
    """Statistics of no tokens for every device, [D, ...]."""
    return jax.shard_map(
        lambda: jax.tree.map(lambda a: a[None], statistics.init(k)),
        mesh=devices.mesh,
        in_specs=(),
        out_specs=P(devices.axis),
        check_vma=False,
    )()


@functools.partial(jax.jit, static_argnames="devices")
def finish(stats: InputStats, *, devices: DataMesh) -> InputStats:
    """Statistics of all devices' tokens, on every device."""

    def local(stats):
        mine = jax.tree.map(lambda a: a[0], stats)
        return statistics.finish(statistics.all_reduce(mine, devices.axis))

    return jax.shard_map(
        local, mesh=devices.mesh, in_specs=(P(devices.axis),), out_specs=P(), check_vma=False
    )(stats)


@functools.partial(jax.jit, static_argnames=("spec", "rounding", "devices"))
def factor(gram, spec: QuantSpec, rounding: GPTQ, *, devices: DataMesh) -> HessianFactor:
    """See `factor_hessian`; what is too small to be shared every device does alone."""
    return jax.shard_map(
        lambda gram: factor_hessian(gram, spec, rounding, devices.axis),
        mesh=devices.mesh,
        in_specs=(P(),),
        out_specs=P(),
        check_vma=False,
    )(gram)


@functools.partial(jax.jit, static_argnames=("spec", "rounding", "devices", "cut"))
def solve(weights, stats, hessian, scale, spec, rounding, *, devices: DataMesh, cut: bool):
    """See `solve_group`; `cut`: of each weight the device's own columns."""
    axis = devices.axis if cut else None

    def local(weights, stats, hessian, scale):
        made = solve_group(weights, stats, hessian, scale, spec, rounding, axis)
        # Static sizes are the whole's (see `jq.sharding`).
        tensors = [dataclasses.replace(q, n=n) for q, n in zip(made.qtensors, columns, strict=True)]
        return made._replace(qtensors=tuple(tensors))

    columns = [w.shape[1] for w in weights]
    whole = jax.eval_shape(
        lambda *args: solve_group(*args, spec, rounding).qtensors, weights, stats, hessian, scale
    )
    cuts: Any = (tuple(partition_specs(q, n=axis) for q in whole), P(None, axis), P())
    return jax.shard_map(
        local,
        mesh=devices.mesh,
        in_specs=(P(None, axis), P(), P(), P()),
        out_specs=RoundedGroup(*cuts),
        check_vma=False,
    )(weights, stats, hessian, scale)


@functools.partial(
    jax.jit,
    static_argnames=("model", "kind", "index", "specs", "method", "devices", "cuts", "rows"),
)
def choose(
    params,
    stream,
    stats,
    counts,
    *,
    model,
    kind,
    index,
    specs,
    method,
    devices: DataMesh,
    cuts: Specs,
    rows: int,
) -> Scaling:
    """See `choose_scale`."""
    axis = devices.axis

    def local(params, stream, stats, count):
        return choose_scale(
            model,
            kind,
            index,
            _gathered(params, cuts, axis),
            jax.tree.map(lambda a: a[:rows], stream),
            stats,
            specs=specs,
            method=method,
            real=jnp.arange(rows) < count[0],
            axis_name=axis,
        )

    return jax.shard_map(
        local,
        mesh=devices.mesh,
        in_specs=(_tree_of(params, cuts), P(axis), P(), P(axis)),
        out_specs=P(),
        check_vma=False,
    )(params, stream, stats, counts)


def _tree_of(params: Any, specs: Specs) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def _gathered(params: Any, specs: Specs, axis: str) -> Any:
    """Shards -> whole arrays.  The compiler drops what the program does not read."""
    whole = [
        _all_gather(a, axis, tuple(spec).index(axis)) if axis in spec else a
        for a, spec in zip(jax.tree.leaves(params), specs, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), whole)


def _all_gather(a: jax.Array, axis: str, at: int) -> jax.Array:
    if a.dtype.itemsize > 1 or not jnp.issubdtype(a.dtype, jnp.floating):
        return lax.all_gather(a, axis, axis=at, tiled=True)
    # As bytes: some backends would send float8 as float16.
    whole = lax.all_gather(lax.bitcast_convert_type(a, jnp.uint8), axis, axis=at, tiled=True)
    return lax.bitcast_convert_type(whole, a.dtype)
