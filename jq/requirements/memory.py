"""Memory and disk of a run, from its shapes.

The number of blocks multiplies the disk, never the memory: the largest moment of one block decides.
The terms are the arrays that the programs hold, in as many copies as the compiler's own buffer
assignment has of them (the tests compare).  For linears [K, N] rounded side by side, in float32:

    statistics    2.5 K^2          the sums before and after a sample, and panels of a product
    factor        4.25 K^2         the Hessian, ordered and damped, its root, workspace
    solve         3.2 K^2 + 5.2 KN weights side by side, their order, errors, what they become
    rounding      5.2 KN           to nearest, or where the report has statistics
    report        1.5 KM           beside either, for the M outputs that it compares at a time

beside the block's weights, as they are stored and in float32 (the latter not where nothing is
calibrated, or where weights and hidden states have 16 bits and no scale is folded), and the hidden
states: a block's input stays, while input and output of one stage after the other come and go.

Of several devices each has its part of weights, hidden states and N, and all of K^2; a stage
gathers the weights that it multiplies with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from jq.group import OUTPUTS
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.recipe import Rule, rounding_of
from jq.requirements.arithmetic import Arithmetic, arithmetic
from jq.requirements.workload import Block, Group, Run
from jq.spec import QuantSpec

WIDE = 4  # bytes of a float32
_STATISTICS, _FACTOR, _SOLVE_GRAMS = 2.5, 4.25, 3.2  # of K^2
_LEFT = 1.6  # of K^2: half of the factorisation's workspace, as measured
_SUMMED = 3.25  # of K^2: the sums, their panels before and after the exchange, and the result
_SOLVE, _REPORT = 5.2, 1.5  # of KN, and of K times some outputs

WEIGHTS, STATES = "weights of a block", "hidden states"
STATISTICS, HESSIAN, ROUNDING = "statistics", "Hessian and its factor", "rounding"
OUTER, WRITING, READING = (
    "embeddings and head",
    "finished blocks on their way",
    "weights being read",
)


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a run needs; bytes.

    device_parts: what arrays take on the device at the largest moment, by name.
    host_parts: the same in host memory, beside the process itself and what the device holds.
    shared_parts: both together, where the device computes in host memory.
    disk: output and journal together, when they are largest; output: what stays.
    arithmetic: of all blocks.
    """

    device_parts: Mapping[str, int]
    host_parts: Mapping[str, int]
    shared_parts: Mapping[str, int]
    disk: int
    output: int
    arithmetic: Arithmetic

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(self.device_parts.values())

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return sum(self.host_parts.values())

    @property
    def shared(self) -> int:
        """Bytes where host and device are one."""
        return sum(self.shared_parts.values())


def requirements(run: Run) -> Requirements:
    """What this run needs."""
    moments = [device_parts(run, block) for block, _ in run.blocks]
    # All of these are read and checked before the first block.
    outer = run.outer * run.stored_bytes
    first = {OUTER: round(1.5 * outer)}
    largest = max(block.parameters for block, _ in run.blocks) * run.stored_bytes
    writing = _writing(run)
    host = {READING: max(largest, outer), **writing}
    resting = {WEIGHTS: 3 * largest, STATES: 2 * _states(run)}
    if run.offload and run.calibrates:
        widest = max(max(stream_widths(run, block)) for block, _ in run.blocks)
        host[STATES] = run.tokens * widest * run.compute_bytes
    offloaded = {STATES: host[STATES]} if STATES in host else {}
    both = [device_parts(run, block, overlap=True) for block, _ in run.blocks]
    shared = [_sum(parts, offloaded, {READING: largest}) for parts in both]
    shared += [first | {READING: outer}, _sum(resting, writing)]
    written = sum(quantized_bytes(block, run.stored_bytes) * count for block, count in run.blocks)
    work = Arithmetic()
    for block, count in run.blocks:
        work = work + arithmetic(run, block).times(count)
    return Requirements(
        device_parts=_largest([*moments, first]),
        host_parts=host,
        shared_parts=_largest(shared),
        # The journal holds what this block and the one before have left.
        disk=run.copies * written + outer + 2 * _states(run),
        output=written + outer,
        arithmetic=work,
    )


def quantized_bytes(block: Block, stored_bytes: int) -> int:
    """Bytes of a finished block on disk."""
    total = float(block.others * stored_bytes)
    for group in block.groups:
        for n, rule in zip(group.outputs, group.rules, strict=True):
            if rule is None or rule.spec is None:
                total += group.k * n * stored_bytes
            else:
                total += _weight_bytes(group.k, n, rule.spec, rounding_of(rule.method))
    return round(total)


def _weight_bytes(k: int, n: int, spec: QuantSpec, rounding: RTN | GPTQ) -> float:
    gathers = isinstance(rounding, GPTQ) and rounding.desc_act and not rounding.static_groups
    order = 4 * k if gathers and spec.num_groups(k) > 1 else 0
    return k * n * spec.bits_per_weight(k, n) / 8 + order


def stream_widths(run: Run, block: Block) -> list[int]:
    """Numbers per token that are held while each stage runs: the block's input, which stays, the
    stage's input and its output, each with the residual stream beside it."""
    d, inputs = run.hidden, [group.k for group in block.groups]
    inner = [d + (a + d) + (b + d) for a, b in itertools.pairwise(inputs)]
    return [d + (inputs[0] + d), *inner, d + (inputs[-1] + d) + d]


def device_parts(run: Run, block: Block, *, overlap: bool = False) -> dict[str, int]:
    """What takes the device's memory at the largest moment of a block.

    overlap: a solve begins before all workspace of the factorisation is given back, as on CPUs.
    """
    weights = block.parameters * (run.stored_bytes + WIDE * _widens(run, block))
    held = {WEIGHTS: (weights + quantized_bytes(block, run.stored_bytes)) // run.devices}
    kept = sum(g.k**2 * WIDE for g in block.groups) if block.looks_twice else 0
    moments = [held]
    for index in range(len(block.groups) + 1):
        if run.calibrates:
            moments.append(held | _stage_parts(run, block, index, kept))
        if index == len(block.groups):
            break
        group = block.groups[index]
        # While a group is rounded there is no stage's input beside its output.
        resting = run.own_tokens * (group.k + 2 * run.hidden) * run.compute_bytes
        states = {STATES: resting} if run.calibrates and not run.offload else {}
        if group.uses_hessian:
            moments.append(held | states | {HESSIAN: round(_FACTOR * group.k**2 * WIDE) + kept})
        for rule, n in group.sides.items():
            own = -(-n // run.devices)
            moments.append(held | states | _round_parts(group, own, rule, kept, overlap))
    return _largest(moments)


def _widens(run: Run, block: Block) -> bool:
    """Whether the block's kernels are worked on in float32."""
    scales = any(group.scaling is not None for group in block.groups)
    return run.calibrates and (scales or not run.stored_bytes == run.compute_bytes < WIDE)


def _stage_parts(run: Run, block: Block, index: int, kept: int) -> dict[str, int]:
    """Hidden states, and statistics with temporaries, while stage `index` runs."""
    groups, width = block.groups, stream_widths(run, block)[index]
    if run.offload:
        # A chunk in work with its results, the one before on its way back, the next on its way.
        some = min(run.batch_size, run.samples) * run.seq_len
        states = 2 * some * (width - run.hidden) * run.compute_bytes
    else:
        states = run.own_tokens * width * run.compute_bytes
    widest = max(group.k for group in groups[max(index - 1, 0) : index + 1])
    temporary = 4 * run.seq_len * widest * WIDE
    if index == 1:
        temporary = max(temporary, run.heads * run.seq_len**2 * WIDE)
    if index > 0 and (run.compute_bytes != WIDE or run.devices > 1):
        temporary += groups[index - 1].weights * run.compute_bytes
    if index < len(groups) and (groups[index].learns or block.looks_twice):
        summed = _STATISTICS if run.devices == 1 else max(_STATISTICS, _SUMMED)
        temporary += round(summed * groups[index].k ** 2 * WIDE)
    return {STATES: states, STATISTICS: temporary + kept}


def _round_parts(
    group: Group, n: int, rule: Rule, kept: int, overlap: bool = False
) -> dict[str, int]:
    kn, kk = group.k * n * WIDE, group.k**2 * WIDE
    report = _REPORT * group.k * min(n, OUTPUTS) * WIDE
    if isinstance(rounding_of(rule.method), GPTQ):
        grams, linears = (_SOLVE_GRAMS + _LEFT * overlap) * kk, _SOLVE * kn + report
    elif group.learns or group.scaling is not None:
        grams, linears = kk, _SOLVE * kn + report
    else:
        grams, linears = 0, _SOLVE * kn
    return {HESSIAN: round(grams) + kept, ROUNDING: round(linears)}


def _writing(run: Run) -> dict[str, int]:
    """What is written is copied from the device, and again for the file."""
    written = max(quantized_bytes(block, run.stored_bytes) for block, _ in run.blocks)
    return {WRITING: 2 * (written + _states(run))}


def _states(run: Run) -> int:
    """Bytes of the hidden states of the calibration set."""
    return run.tokens * run.hidden * run.compute_bytes if run.calibrates else 0


def _sum(*several: dict[str, int]) -> dict[str, int]:
    """Parts of the same name added."""
    names = dict.fromkeys(name for parts in several for name in parts)
    return {name: sum(parts.get(name, 0) for parts in several) for name in names}


def _largest(moments: list[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))
