"""How much memory a model takes: parameters, weights in a format, key-value cache per token.

Everything is computed from the config, and exact: the sums are those of the arrays that a
checkpoint of this format holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from jq.models import ModelConfig
from jq.models.hf_names import block_table, outer_table
from jq.spec import QuantSpec

HALF = 2  # bytes of a 16-bit number

_GROUP_SIZES = (128, 64, 32, 16)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a model is made of, in numbers (not bytes).

    Attributes:
        linears: shape [K, N] of the blocks' linears -> how many there are.
        embedding: of the token embedding.
        head: of the output head; 0 where it is the embedding again.
        others: norms and biases.
    """

    linears: Counter[tuple[int, int]]
    embedding: int
    head: int
    others: int

    @property
    def linear(self) -> int:
        """Weights of the blocks' linears, which are what is quantized."""
        return sum(k * n * count for (k, n), count in self.linears.items())

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.head + self.others


def parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters."""
    layers = config.num_hidden_layers
    linears: Counter[tuple[int, int]] = Counter()
    others = 0
    for entry in block_table(config, 0):
        if len(entry.shape) == 2:
            linears[entry.shape[0], entry.shape[1]] += layers
        else:
            others += layers * math.prod(entry.shape)
    outer = {entry.path: math.prod(entry.shape) for entry in outer_table(config)}
    head = outer.get("lm_head/kernel", 0)
    return Parameters(linears, outer["embed/embedding"], head, others + outer["final_norm/scale"])


def weight_bytes(config: ModelConfig, spec: QuantSpec | None, *, act_order: bool = False) -> int:
    """Bytes of all weights, with every linear of the blocks in a format and the rest in 16 bits.

    Args:
      spec: None is 16 bits.
      act_order: an int32 per input and linear.
    Raises: SpecError where the group size does not divide a linear's inputs.
    """
    counted = parameters(config)
    rest = HALF * (counted.total - counted.linear)
    if spec is None:
        return rest + HALF * counted.linear
    bits = sum(
        count * k * n * spec.bits_per_weight(k, n) for (k, n), count in counted.linears.items()
    )
    order = 32 * sum(count * k for (k, _), count in counted.linears.items()) if act_order else 0
    return rest + round((bits + order) / 8)


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of keys and values, in 16 bits, that each token of each sequence adds."""
    heads = config.num_key_value_heads * config.head_dim
    return 2 * HALF * config.num_hidden_layers * heads


def largest_linear(config: ModelConfig) -> tuple[int, int]:
    """[K, N] of the blocks' largest linear."""
    return max(parameters(config).linears, key=math.prod)


def group_size(config: ModelConfig) -> int:
    """The largest usual group size, at most 128, that divides the inputs of every linear; -1 (one
    scale per output) where none does."""
    inputs = {k for k, _ in parameters(config).linears}
    return next((size for size in _GROUP_SIZES if all(k % size == 0 for k in inputs)), -1)
