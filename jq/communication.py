"""What the devices of a mesh exchange to quantize a block, and what each of them computes.

The programs are those of `jq.calib.mesh_programs`; the tests read every collective of the compiled
ones and compare.  For D devices, linears [K, N] in groups that share an input, hidden states of c
bytes a number:

    stage         all-gather   c K N of each linear that it runs (codes, where x is rounded too),
                               and a byte per sample: is it finite?
    statistics    all-reduce   4 (5/8 K^2 + K + 1), and 4 K of maxima; K^2 where K < 256
    factor        all-reduce   4 K^2 and 4 b K, in K / b rounds, from K = 8192 on (see
                               `jq.methods.cholesky`); below every device factors for itself
    solve         all-reduce   20 per linear, of errors for the report
    search        all-gather   4 K N of the linears, and of those that follow; the inputs where
                               SmoothQuant compares the outputs of single linears
                  all-reduce   4 per scale that is tried

A ring all-gather of b bytes sends (D - 1) / D b from each device, an all-reduce twice that.  None
of it grows with the tokens, while the tokens of a device become fewer: that is how far it scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from jq.data_mesh import columns_are_cut, shard_axis
from jq.methods import cholesky
from jq.methods.awq import AWQ
from jq.methods.smoothquant import AUTO_ALPHAS
from jq.recipe import Rule
from jq.requirements.arithmetic import Arithmetic, arithmetic
from jq.requirements.workload import Block, Group, Run
from jq.spec import QuantSpec
from jq.statistics import panel_size

_WIDE = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between all devices.

    program: which needs it.
    kind: what it is.
    bytes: of the array that every device has afterwards.
    times: how often the program makes it, one after the other.
    """

    program: str
    kind: Literal["all-gather", "all-reduce"]
    bytes: int
    times: int = 1

    def sent(self, devices: int) -> float:
        """Bytes that each device sends, in a ring."""
        ways = 2 if self.kind == "all-reduce" else 1
        return self.times * ways * (devices - 1) / devices * self.bytes


def collectives(
    run: Run, block: Block, devices: int, *, arrays: int, last: bool = False
) -> list[Collective]:
    """Every exchange of one block, those of linears one by one.

    Args:
      run, block: see `jq.requirements.workload`.
      devices: how many share the work.
      arrays: how many the block's parameters are.
      last: nothing is calibrated on its output.
    """
    out = [Collective("prepare", "all-reduce", _WIDE * arrays)]
    groups = block.groups
    rounded = [False] * len(groups)
    if run.calibrates and block.looks_twice:
        for index, group in enumerate(groups):
            out += _stage(run, block, index, rounded, devices) + _statistics(group)
            out += _search(run, block, group, devices)
    for index, group in enumerate(groups):
        if run.calibrates:
            out += _stage(run, block, index, rounded, devices)
            if group.learns and block.sequential:
                out += _statistics(group)
        out += _factor(group, devices) + _solve(group, devices)
        rounded[index] = True
    if run.calibrates and not last:
        out += _stage(run, block, len(groups), rounded, devices)
    return [collective for collective in out if collective.bytes]


def share(run: Run, block: Block, devices: int) -> Arithmetic:
    """What each device computes of a block: its part, of factorisations that of the busiest."""
    sizes = [group.k for group in block.groups if group.uses_hessian]
    alone, shared = (sum(cholesky.products(k, count) for k in sizes) for count in (1, devices))
    whole = arithmetic(run, block)
    rows = -(-run.samples // devices) / run.samples if run.samples else 1 / devices
    return Arithmetic(
        whole.products * rows,
        (whole.wide_products - alone) / devices + shared,
        whole.moved / devices,
    )


def sent(exchanges: Iterable[Collective], devices: int) -> float:
    """Bytes that each device sends for all of them."""
    return sum(exchange.sent(devices) for exchange in exchanges)


def _stage(
    run: Run, block: Block, index: int, rounded: list[bool], devices: int
) -> list[Collective]:
    rows = -(-run.samples // devices)
    out = [Collective("stage", "all-gather", rows * devices)]
    if index > 0:
        group = block.groups[index - 1]
        for n, rule in zip(group.outputs, group.rules, strict=True):
            sizes = _stands(run, rule if rounded[index - 1] else None, group.k, n, devices)
            out += [Collective("stage", "all-gather", size) for size in sizes]
    return out


def _stands(run: Run, rule: Rule | None, k: int, n: int, devices: int) -> tuple[int, ...]:
    """Bytes of the arrays that a stage gathers of a linear."""
    if rule is None:
        return (run.compute_bytes * k * n,) if shard_axis((k, n), devices) is not None else ()
    spec = rule.spec
    assert spec is not None
    if not columns_are_cut(spec, k, n, devices):
        return ()
    if spec.activation is None:
        return (run.compute_bytes * k * n,)
    rows, columns = spec.scale_shape(k, n)
    return k * n, _scale_bytes(spec) * rows * columns


def _scale_bytes(spec: QuantSpec) -> int:
    return 4 if spec.scale_dtype == "float32" else 2


def _statistics(group: Group) -> list[Collective]:
    k, size = group.k, panel_size(group.k)
    panels = sum(size * (k - row) for row in range(0, k, size))
    return [
        Collective("statistics", "all-reduce", _WIDE * (panels + k + 1)),
        Collective("statistics", "all-reduce", _WIDE * k),
    ]


def _factor(group: Group, devices: int) -> list[Collective]:
    k, size = group.k, cholesky.block_rows(group.k, devices)
    if size is None or not group.uses_hessian:
        return []
    return [
        Collective("factor", "all-reduce", _WIDE * size * width, times=k // size)
        for width in (k, size)
    ]


def _solve(group: Group, devices: int) -> list[Collective]:
    out = []
    for rule in group.sides:
        assert rule.spec is not None
        outputs = [n for n, r in zip(group.outputs, group.rules, strict=True) if r == rule]
        cut = sum(columns_are_cut(rule.spec, group.k, n, devices) for n in outputs)
        out.append(Collective("solve", "all-reduce", 2 * _WIDE * cut))
        if group.learns or group.scaling is not None:
            out.append(Collective("solve", "all-reduce", 3 * _WIDE * cut))
    return out


def _search(run: Run, block: Block, group: Group, devices: int) -> list[Collective]:
    method = group.scaling
    if method is None:
        return []
    own = _gathered(group.k, group.outputs, devices)
    place = block.groups.index(group) + 1
    following = block.groups[place : place + 1]
    if isinstance(method, AWQ):
        tries = method.n_grid + 1 if method.search_scale else 0
        if not tries:
            return own if method.duo_scaling else []
    else:
        tries = len(AUTO_ALPHAS) + 1
        if method.alpha != "auto":
            return own
    losses = [Collective("search", "all-reduce", _WIDE * tries)]
    if len(group.outputs) > 1 and following:
        return own + _gathered(following[0].k, following[0].outputs, devices) + losses
    if isinstance(method, AWQ):
        return own + losses
    samples = min(run.samples, max(1, method.search_tokens // run.seq_len))
    rows = -(-samples // devices) * devices
    inputs = run.compute_bytes * rows * run.seq_len * group.k
    return [*own, Collective("search", "all-gather", inputs)]


def _gathered(k: int, outputs: Iterable[int], devices: int) -> list[Collective]:
    return [
        Collective("search", "all-gather", _WIDE * k * n)
        for n in outputs
        if shard_axis((k, n), devices) is not None
    ]
