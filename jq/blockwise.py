"""The contract between a model made of equal blocks and everything that works block by block.

A block is described as a chain of stages.  Stage 0 turns the block's input into the input that the
first group of linears shares; stage i runs group i-1's linears and everything up to the input of
group i; the last stage runs the last group and returns the next block's input.  Running the stages
one after another is running the block, so statistics of every linear, on inputs made by already
quantized predecessors, cost one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same input.

    name: short name for reports ("qkv").
    linears: their paths within the block's parameters, without "/kernel".
    producer: path of the op whose output channels are that input, up to operations that commute
      with a scale per channel; None when a scale cannot be folded.
    producer_kind: "norm" (parameter "scale" [K]) or "linear" ("kernel" [.., N], "bias" [N]).
    share: consecutive query heads that read one output head of the producer (grouped-query
      attention); 1 elsewhere.
    head_dim: channels of a head, where share > 1.
    """

    name: str
    linears: tuple[str, ...]
    producer: str | None = None
    producer_kind: Literal["norm", "linear"] = "norm"
    share: int = 1
    head_dim: int = 0


@runtime_checkable
class BlockwiseModel(Protocol):
    """What the calibration driver needs of a model.

    Methods are pure and may be jitted; the model is hashable, since it is a static argument of
    compiled programs.
    """

    @property
    def block_names(self) -> tuple[str, ...]:
        """Keys of the blocks in the parameter tree, in order."""
        ...

    @property
    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """The groups of every block, in the order of the stages."""
        ...

    def block_kind(self, name: str) -> Hashable:
        """Blocks of equal kind run the same program (full or sliding-window attention, say)."""
        ...

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> the first block's input [B, T, D]."""
        ...

    def block_stage(
        self,
        kind: Hashable,
        index: int,
        params: Params,
        x: jax.Array,
        carry: Any,
        mask: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Stage `index` of a block with parameters `params`; mask [B, T]: True for real tokens."""
        ...

    def logits(self, params: Params, h: jax.Array) -> jax.Array:
        """The last block's output [B, T, D] -> float32 [B, T, V]."""
        ...
