"""What advice depends on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jq.errors import SpecError
from jq.gpus import GPU
from jq.models import ModelConfig
from jq.presets import find_preset

Goal = Literal["memory", "latency", "throughput", "quality"]
Accuracy = Literal["strict", "normal", "loose"]
Activations = Literal["any", "16-bit", "8-bit", "int8", "fp8"]
Engine = Literal["jaxq", "vllm", "tgi", "exllama"]

# What each accuracy bar lets the weights have at least.
FEWEST_BITS: dict[Accuracy, int] = {"strict": 8, "normal": 4, "loose": 3}


@dataclasses.dataclass(frozen=True)
class Situation:
    """A model, a machine, and what matters.

    Attributes:
        gpu: what it is to run on.
        model: the model's config.
        goal: what matters most: memory, the latency of a step, throughput, or quality.
        batch: sequences at once.
        context: tokens of each, prompt and answer together.
        gpus: how many share the model.
        accuracy: strict keeps 8 bits, normal 4 or more, loose 3 or more.
        bits: of the weights, where they are given; overrides accuracy.
        activations: which inputs of the linears will do; 8-bit is what a backend for W8A8 wants.
        engine: what serves the model.
        requantize_often: after every fine-tuning, say.
        instruction_tuned: the model follows instructions or chats.
        widest_tooling: many tools have to read the result, the oldest ones too.
        existing: the preset of a pipeline that works already.
        reserve: bytes per GPU for all but weights and cache: CUDA, programs, activations. A guess.
    """

    gpu: GPU
    model: ModelConfig
    goal: Goal = "memory"
    batch: int = 1
    context: int = 4096
    gpus: int = 1
    accuracy: Accuracy = "normal"
    bits: int | None = None
    activations: Activations = "any"
    engine: Engine = "jaxq"
    requantize_often: bool = False
    instruction_tuned: bool = False
    widest_tooling: bool = False
    existing: str | None = None
    reserve: float = 1e9

    def __post_init__(self) -> None:
        for name in ("batch", "context", "gpus"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} {getattr(self, name)}: give at least 1")
        if self.reserve < 0:
            raise SpecError(f"reserve {self.reserve}: give 0 bytes or more")
        if self.bits is not None and self.bits not in (3, 4, 8):
            raise SpecError(f"bits {self.bits}: advice is for 3, 4 and 8, or none for all of them")
        if self.bits in (3, 4) and self.activations in ("8-bit", "int8", "fp8"):
            raise SpecError(
                f"bits {self.bits} with {self.activations} activations: 8-bit arithmetic needs "
                "8-bit weights; leave one of the two out"
            )
        if self.existing is not None:
            find_preset(self.existing)

    @property
    def fewest_bits(self) -> int:
        """Of the weights, by the accuracy bar."""
        return FEWEST_BITS[self.accuracy]
