"""What a benchmark found: latencies with their percentiles, and rates made of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import jax

from jq.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds that one kind of step took, in the order they were measured.

    A percentile is the smallest measured value that at least so many percent of the steps did not
    exceed (nearest rank): it is a time that occurred. Of fewer than 100 steps, p99 is the longest.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ModelError("a latency needs at least one measured step; raise the steps to 1")

    @property
    def count(self) -> int:
        return len(self.seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p95(self) -> float:
        return self.percentile(95)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    def percentile(self, percent: float) -> float:
        """Seconds; percent in (0, 100]."""
        rank = math.ceil(percent / 100 * self.count)
        return sorted(self.seconds)[max(rank, 1) - 1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in seconds, without the single steps."""
        names = ("count", "mean", "p50", "p95", "p99")
        return {name: getattr(self, name) for name in names} | {"max": max(self.seconds)}


@dataclasses.dataclass(frozen=True)
class BatchTiming:
    """One batch size.

    Attributes:
        batch_size: sequences that run at once.
        prompt_tokens: of each; `padded_tokens` is the length that the program really runs.
        cache_tokens: slots of the key-value cache per sequence, all of which attention reads.
        first_call_seconds: the first prefill and step, compilation included; not in the latencies.
        prefill: until the first new tokens of all sequences were on the host.
        decode: one step, a new token for every sequence, from host to host.
    """

    batch_size: int
    prompt_tokens: int
    padded_tokens: int
    cache_tokens: int
    first_call_seconds: float
    prefill: Latency
    decode: Latency

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of prompts, padding not counted, over the time of all measured prefills."""
        return self.batch_size * self.prompt_tokens / self.prefill.mean

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens of all sequences together, over the time of all measured steps."""
        return self.batch_size / self.decode.mean

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in seconds."""
        plain = ("batch_size", "prompt_tokens", "padded_tokens", "cache_tokens")
        return {
            **{name: getattr(self, name) for name in plain},
            "first_call_seconds": self.first_call_seconds,
            "prefill_seconds": self.prefill.to_dict(),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_seconds": self.decode.to_dict(),
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclasses.dataclass(frozen=True)
class Device:
    """Where something was measured; numbers of different devices or versions do not compare."""

    platform: str
    kind: str
    jax_version: str

    @classmethod
    def default(cls) -> Device:
        """JAX's default device."""
        from jax.extend import backend

        device = backend.get_default_device()
        return cls(device.platform, device.device_kind, jax.__version__)

    @property
    def label(self) -> str:
        """ "cpu", or the platform and the device's own name."""
        return self.platform if self.kind == self.platform else f"{self.platform} ({self.kind})"


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Generation, prefill and decode apart, at several batch sizes.

    Attributes:
        device: where.
        dtype: of the model's activations.
        steps: decode steps that were measured for each batch size.
        batches: in the order that was asked for.
    """

    device: Device
    dtype: str
    steps: int
    batches: tuple[BatchTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in seconds."""
        return {
            "device": dataclasses.asdict(self.device),
            "dtype": self.dtype,
            "steps": self.steps,
            "batches": [batch.to_dict() for batch in self.batches],
        }
