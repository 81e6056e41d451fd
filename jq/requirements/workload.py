"""A run as far as its needs go: shapes, rules and the size of the calibration set."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jq.blockwise import LinearGroup
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Recipe, Rule, needs_calibration, resolve, rounding_of
from jq.scaling import scaling_method


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears that read one input of k numbers per token.

    outputs: of each linear.
    rules: what decides about each; None in full precision.
    scaling: the method that moves a scale into the op before, or None.
    """

    k: int
    outputs: tuple[int, ...]
    rules: tuple[Rule | None, ...]
    scaling: AWQ | SmoothQuant | None = None

    @property
    def weights(self) -> int:
        """Numbers in the kernels."""
        return self.k * sum(self.outputs)

    @property
    def sides(self) -> dict[Rule, int]:
        """Rule -> outputs that are rounded side by side."""
        out: dict[Rule, int] = {}
        for n, rule in zip(self.outputs, self.rules, strict=True):
            if rule is not None:
                out[rule] = out.get(rule, 0) + n
        return out

    @property
    def learns(self) -> bool:
        """Whether a rule needs statistics of the input."""
        return any(needs_calibration(rule) for rule in self.sides)

    @property
    def uses_hessian(self) -> bool:
        """Whether the Gram matrix is factored."""
        return any(isinstance(rounding_of(rule.method), GPTQ) for rule in self.sides)


@dataclasses.dataclass(frozen=True)
class Block:
    """groups: in the order of the stages.  others: parameters that are no kernels."""

    groups: tuple[Group, ...]
    others: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in all of the block."""
        return sum(group.weights for group in self.groups) + self.others

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens run through it."""
        return any(group.learns for group in self.groups)

    @property
    def looks_twice(self) -> bool:
        """Whether statistics of the block's own weights come before any weight is rounded."""
        return not self.sequential or any(group.scaling is not None for group in self.groups)

    @property
    def sequential(self) -> bool:
        """Whether linears see inputs that their rounded predecessors in the block have made."""
        roundings = [rounding_of(rule.method) for g in self.groups for rule in g.sides]
        return all(r.true_sequential for r in roundings if isinstance(r, GPTQ))


@dataclasses.dataclass(frozen=True)
class Run:
    """One quantization.

    blocks: each kind of block and how many there are of it.
    hidden: size D of the hidden state.
    heads: query heads, for the attention's scores.
    outer: parameters outside the blocks.
    stored_bytes: of a number in the checkpoint; compute_bytes: of one in a hidden state.
    samples, seq_len: of the calibration set; 0 where nothing is calibrated.
    batch_size, offload: see `jq.calib.driver.quantize_blocks`.
    copies: of the finished blocks on disk at the end: 1 where the output links to the journal's.
    devices: that share the work (see `jq.data_mesh`).
    """

    blocks: tuple[tuple[Block, int], ...]
    hidden: int
    heads: int
    outer: int
    stored_bytes: int = 2
    compute_bytes: int = 2
    samples: int = 0
    seq_len: int = 0
    batch_size: int = 1
    offload: bool = False
    copies: int = 1
    devices: int = 1

    @property
    def calibrates(self) -> bool:
        """Whether there is a calibration set."""
        return self.samples > 0 and any(block.calibrates for block, _ in self.blocks)

    @property
    def tokens(self) -> int:
        """Of the calibration set."""
        return self.samples * self.seq_len

    @property
    def own_tokens(self) -> int:
        """Of the calibration set, those on one device."""
        return -(-self.samples // self.devices) * self.seq_len


def run_of(
    block_names: Iterable[str],
    linear_groups: Sequence[LinearGroup],
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    hidden: int,
    heads: int,
    tokens: tuple[int, int] | None = None,
    stored_bytes: int = 2,
    compute_bytes: int = 2,
    batch_size: int = 1,
    offload: bool = False,
    copies: int = 1,
    devices: int = 1,
) -> Run:
    """A run on a model of `jq.blockwise`.

    Args:
      block_names, linear_groups: of the model.
      shapes: path of every parameter ("layers_0/mlp/up_proj/kernel") -> its shape.
      recipe: see `jq.recipe`.
      tokens: (samples, length) of the calibration set, None without one.
      hidden, heads, stored_bytes, compute_bytes, batch_size, offload, copies, devices: see `Run`.
    Raises: SpecError when the recipe gives linears that share an input different scales.
    """
    by_block: dict[str, dict[str, tuple[int, ...]]] = {}
    outer = 0
    names = set(block_names)
    for path, shape in shapes.items():
        block, _, rest = path.partition("/")
        if block in names:
            by_block.setdefault(block, {})[rest] = shape
        else:
            outer += math.prod(shape)
    counted = Counter(
        _block(name, parameters, linear_groups, recipe) for name, parameters in by_block.items()
    )
    samples, seq_len = (0, 0) if tokens is None else tokens
    return Run(
        blocks=tuple(counted.items()),
        hidden=hidden,
        heads=heads,
        outer=outer,
        stored_bytes=stored_bytes,
        compute_bytes=compute_bytes,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        offload=offload,
        copies=copies,
        devices=devices,
    )


def _block(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    linear_groups: Sequence[LinearGroup],
    recipe: Recipe,
) -> Block:
    groups = []
    for group in linear_groups:
        sizes = [shapes[f"{linear}/kernel"] for linear in group.linears]
        rules = tuple(resolve(recipe, f"{name}/{linear}") for linear in group.linears)
        scaling = scaling_method(name, group, rules)
        groups.append(Group(sizes[0][0], tuple(size[1] for size in sizes), rules, scaling))
    kernels = sum(group.weights for group in groups)
    return Block(tuple(groups), sum(math.prod(shape) for shape in shapes.values()) - kernels)
