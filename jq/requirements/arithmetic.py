"""What a run computes, and an estimate of the time."""

from __future__ import annotations

import dataclasses

from jq.methods.awq import AWQ
from jq.methods.clip import STEPS
from jq.methods.gptq import GPTQ, PANEL
from jq.methods.smoothquant import AUTO_ALPHAS
from jq.recipe import rounding_of
from jq.requirements.workload import Block, Group, Run

_WIDE = 4  # bytes of a float32
# How often elementwise work reads or writes an element of a weight.
_ROUND_PASSES, _CLIP_PASSES, _TRY_PASSES = 20, 6, 8
# A Gram matrix is summed, and multiplied with, in panels that start at the diagonal: this part of
# all products.
_TRIANGLE = 0.625
# What the programs reach of the rates of large products and copies.
EFFICIENCY = 0.5
# A program is compiled for each stage and each shape of weights, and not again.
COMPILE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations of matrix products (a product and a sum are two), and bytes.

    products: in the dtype of the hidden states.
    wide_products: in float32, factorisations included.
    moved: bytes that elementwise work reads and writes.
    """

    products: float = 0.0
    wide_products: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Arithmetic) -> Arithmetic:
        return Arithmetic(
            self.products + other.products,
            self.wide_products + other.wide_products,
            self.moved + other.moved,
        )

    def times(self, count: int) -> Arithmetic:
        """The same, so often."""
        return Arithmetic(self.products * count, self.wide_products * count, self.moved * count)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    products, wide_products: operations, see `Arithmetic`.
    moved: bytes read and written.
    written: bytes to the disk.
    """

    products: float
    wide_products: float
    moved: float
    written: float = 300e6


def estimate(work: Arithmetic, rates: Rates, disk: int = 0) -> float:
    """Seconds, roughly: half to twice as long is no surprise."""
    device = work.products / rates.products + work.wide_products / rates.wide_products
    device += work.moved / rates.moved
    return COMPILE_SECONDS + device / EFFICIENCY + disk / rates.written


def arithmetic(run: Run, block: Block) -> Arithmetic:
    """What one block costs."""
    total = Arithmetic(moved=3.0 * _WIDE * block.parameters)
    if run.calibrates:
        passes = 2 if block.looks_twice else 1
        attention = 4 * run.seq_len * sum(g.k for g in block.groups[1:2])
        width = sum(group.k for group in block.groups) + 4 * run.hidden
        total = total + Arithmetic(
            products=float(passes * (2 * block.parameters + attention) * run.tokens),
            moved=float(6 * passes * width * run.tokens * run.compute_bytes),
        )
    for group in block.groups:
        total = total + _statistics(run, block, group) + _rounding(group)
        total = total + _search(run, block, group)
    return total


def _statistics(run: Run, block: Block, group: Group) -> Arithmetic:
    times = int(block.looks_twice) + int(group.learns and block.sequential)
    return Arithmetic(products=2.0 * _TRIANGLE * times * group.k**2 * run.tokens)


def _rounding(group: Group) -> Arithmetic:
    k, wide, moved = group.k, 0.0, 0.0
    if group.uses_hessian:
        wide += k**3 / 3
    for rule, n in group.sides.items():
        assert rule.spec is not None
        rounding, kn = rounding_of(rule.method), k * n
        moved += _ROUND_PASSES * kn * _WIDE
        if isinstance(rounding, GPTQ):
            # What earlier errors ask for, on average half of the rows'.  Rows wait for each other,
            # and each reads the errors of its block.
            wide += (k + min(k, PANEL)) * kn
            moved += min(rounding.block_size, k) * kn * _WIDE
        if group.learns or group.scaling is not None:
            wide += 6.0 * _TRIANGLE * k * kn  # three errors that the report compares
        if rounding.clip != "none":
            moved += STEPS * _CLIP_PASSES * kn * _WIDE
        if rounding.clip == "output":
            wide += 2.0 * STEPS * (k // rule.spec.num_groups(k)) * kn
    return Arithmetic(0.0, wide, moved)


def _search(run: Run, block: Block, group: Group) -> Arithmetic:
    """Trying out scales."""
    method = group.scaling
    if method is None:
        return Arithmetic()
    if isinstance(method, AWQ):
        tries = method.n_grid + 1 if method.search_scale else 0
    else:
        tries = len(AUTO_ALPHAS) if method.alpha == "auto" else 0
    moved = float(tries * _TRY_PASSES * group.weights * _WIDE)
    if len(group.outputs) == 1 and isinstance(method, AWQ):
        wide = 2.0 * _TRIANGLE * tries * group.k * group.weights
        return Arithmetic(wide_products=wide, moved=moved)
    place = block.groups.index(group) + 1
    following = block.groups[place].weights if place < len(block.groups) else 0
    tokens = min(run.tokens, max(method.search_tokens, run.seq_len))
    return Arithmetic(products=2.0 * tries * tokens * (group.weights + following), moved=moved)
