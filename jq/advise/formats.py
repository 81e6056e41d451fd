"""The number formats that advice chooses from: memory, ceilings and what speaks against each."""

from __future__ import annotations

import dataclasses
import math

from jq.advise.situation import Situation
from jq.advise.sizes import (
    HALF,
    group_size,
    kv_bytes_per_token,
    largest_linear,
    parameters,
    weight_bytes,
)
from jq.gpus import GPU, Arithmetic, missing
from jq.kernels.choice import REFERENCE, Choice, explain
from jq.presets import preset
from jq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Format:
    """bits of the weights, and the arithmetic of the products ("16-bit": weights alone)."""

    name: str
    bits: int
    arithmetic: Arithmetic = "16-bit"

    @property
    def weight_only(self) -> bool:
        return self.arithmetic == "16-bit"


INT3, INT4, INT8_WEIGHTS = Format("int3", 3), Format("int4", 4), Format("int8 weights", 8)
INT8, FP8 = Format("int8", 8, "int8"), Format("fp8", 8, "fp8")
# Of two that do equally well the first is taken.
FORMATS = (INT4, INT3, INT8_WEIGHTS, FP8, INT8)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear that is only talked about, for `jq.explain`."""

    spec: QuantSpec
    k: int
    n: int


@dataclasses.dataclass(frozen=True)
class Fit:
    """A format on the machine of a situation; None as the format is 16 bits.

    Attributes:
        format, spec: what is stored.
        weights: bytes of all weights, the embedding and head in 16 bits.
        reserve: bytes for everything but weights and cache.
        capacity: bytes of memory of all GPUs together.
        batch: sequences of the situation.
        per_token: bytes of key-value cache, 16 bits, per token and sequence.
        memory_seconds, compute_seconds: what a decode step of the situation takes at least to read
            weights and cache once, and to do all products, at the data sheet's rates.
        break_even: the batch size from which compute takes longer; infinite where it never does.
        sequences: how many of the situation's context fit beside the weights.
        best_tokens_per_second: with all of them, by the same reckoning; 0 for none.
        kernel: which of our kernels multiplies on that GPU.
        unwanted: what the questions, the engine or the GPU say against it; None where nothing.
        too_large: why it does not fit; None where it does.
        caveat: what should be known about it; None where nothing.
    """

    format: Format | None
    spec: QuantSpec | None
    weights: int
    reserve: float
    capacity: float
    batch: int
    per_token: int
    memory_seconds: float
    compute_seconds: float
    break_even: float
    sequences: int
    best_tokens_per_second: float
    kernel: Choice
    unwanted: str | None = None
    too_large: str | None = None
    caveat: str | None = None

    @property
    def against(self) -> str | None:
        """Why it is out of the question; None where it is not."""
        return self.unwanted or self.too_large

    @property
    def step_seconds(self) -> float:
        """The shortest that a decode step can take."""
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def left(self) -> float:
        """Bytes for the key-value cache; negative where the weights do not fit."""
        return self.capacity - self.weights - self.reserve

    @property
    def tokens(self) -> int:
        """Tokens of key-value cache that fit beside the weights."""
        return max(math.floor(self.left / self.per_token), 0)


def candidates(s: Situation) -> tuple[Fit, ...]:
    """Every format in a situation."""
    return tuple(measure(s, f, spec_of(s, f)) for f in FORMATS)


def unquantized(s: Situation) -> Fit:
    """The model in 16 bits."""
    return measure(s, None, None)


def spec_of(s: Situation, f: Format, *, symmetric: bool | None = None) -> QuantSpec:
    """The presets' number format, in groups that fit the model."""
    if not f.weight_only:
        return preset("smoothquant" if f.arithmetic == "int8" else "smoothquant-fp8")[0]
    return preset("gptq", bits=f.bits, group_size=group_size(s.model), symmetric=symmetric)[0]


def measure(
    s: Situation, f: Format | None, spec: QuantSpec | None, *, act_order: bool = False
) -> Fit:
    """How a format fares; act_order as in `weight_bytes`."""
    weights = weight_bytes(s.model, spec, act_order=act_order)
    kernel = kernel_of(s, spec)
    reserve = s.gpus * s.reserve
    if s.engine == "jaxq" and kernel.kernel == REFERENCE and spec is not None:
        # The reference product holds the weight of one linear in 16 bits, if it is not fused.
        reserve += HALF * math.prod(largest_linear(s.model)) if spec.activation is None else 0
    capacity = 1e9 * s.gpu.memory_gb * s.gpus
    per_token = kv_bytes_per_token(s.model)
    sequences = math.floor(max(capacity - weights - reserve, 0) / (per_token * s.context))
    fixed, memory, compute = _roofline(s, weights, "16-bit" if f is None else f.arithmetic)
    batch = max(sequences, 1)
    fit = Fit(
        format=f,
        spec=spec,
        weights=weights,
        reserve=reserve,
        capacity=capacity,
        batch=s.batch,
        per_token=per_token,
        memory_seconds=fixed + memory * s.batch,
        compute_seconds=compute * s.batch,
        break_even=fixed / (compute - memory) if compute > memory else math.inf,
        sequences=sequences,
        best_tokens_per_second=sequences / max(fixed + memory * batch, compute * batch),
        kernel=kernel,
        unwanted=_unwanted(s, f),
        caveat=None if f is None else _caveat(s.gpu, f),
    )
    return dataclasses.replace(fit, too_large=_too_large(s, fit))


def kernel_of(s: Situation, spec: QuantSpec | None) -> Choice:
    """Our kernel for the model's largest linear on the situation's GPU."""
    if spec is None:
        return Choice(REFERENCE, "not quantized: a plain product")
    linear = Linear(spec, *largest_linear(s.model))
    return explain(linear, rows=s.batch, dtype=s.gpu.half, device=s.gpu.sm)


def _roofline(s: Situation, weights: int, arithmetic: Arithmetic) -> tuple[float, float, float]:
    """Seconds of a decode step: to read the weights; and per sequence, to read its cache, and to do
    its products.

    Williams, Waterman, Patterson (2009), doi:10.1145/1498765.1498785.
    """
    counted, config = parameters(s.model), s.model
    unread = HALF * counted.embedding if counted.head else 0  # a step looks up a few rows only
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * heads * s.context
    half = s.gpu.rate("16-bit")
    head = counted.head or counted.embedding
    rate = s.gpu.rate(arithmetic) or half
    bandwidth = s.gpu.bandwidth * s.gpus
    return (
        (weights - unread) / bandwidth,
        s.context * kv_bytes_per_token(config) / bandwidth,
        (2 * counted.linear / rate + (2 * head + attention) / half) / s.gpus,
    )


def _unwanted(s: Situation, f: Format | None) -> str | None:
    """What the questions, the engine or the GPU say against a format."""
    if f is None:
        return None
    if s.bits is not None and f.bits != s.bits:
        return f"bits {s.bits} asked for"
    if s.bits is None and f.bits < s.fewest_bits:
        return f"accuracy {s.accuracy} asks for {s.fewest_bits} bits"
    wanted = {"any": None, "16-bit": ("16-bit",), "8-bit": ("int8", "fp8")}
    kinds = wanted.get(s.activations, (s.activations,))
    if kinds is not None and f.arithmetic not in kinds:
        return f"{s.activations} activations asked for"
    if s.engine == "exllama" and f is not INT4:
        return "ExLlama-type kernels are for 4-bit weights"
    return missing(s.gpu, "fp8") if f is FP8 else None


def _too_large(s: Situation, fit: Fit) -> str | None:
    if fit.left < 0:
        needed = (fit.weights + fit.reserve) / 1e9
        return f"needs {needed:.1f} GB before any cache, there are {fit.capacity / 1e9:.0f}"
    if fit.sequences < s.batch:
        return (
            f"leaves {fit.tokens:,} tokens of cache, {s.batch} x {s.context} = "
            f"{s.batch * s.context:,} are needed"
        )
    return None


def _caveat(gpu: GPU, f: Format) -> str | None:
    if f is INT8 and (why := missing(gpu, "int8")):
        return f"{why}: it runs, without their speed"
    return None
