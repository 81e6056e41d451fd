"""What a comparison found: results per arm, and the numbers of a table made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jq.compare.arms import ORIGINAL, Arm
from jq.compare.quality import Quality
from jq.compare.store import DONE
from jq.evaluate import mean_estimate, paired_difference, perplexity, perplexity_difference

_PERCENTILES = ("p50", "p95", "p99")


@dataclasses.dataclass(frozen=True, eq=False)
class ArmResult:
    """An arm as it was measured; `raw` is its file.

    reused: whether an earlier run measured it.
    """

    arm: Arm
    raw: Mapping[str, Any]
    reused: bool = False

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def done(self) -> bool:
        """False for an arm that FAILED; then only `error` means something."""
        return self.raw["status"] == DONE

    @property
    def error(self) -> str | None:
        return self.raw.get("error")

    @property
    def quality(self) -> Quality | None:
        """Scores of windows; None for a failed arm."""
        return Quality.from_dict(self.raw["quality"]) if self.done else None

    @property
    def linears(self) -> Sequence[Mapping[str, Any]]:
        """Errors per quantized linear."""
        return (self.raw.get("made") or {}).get("linears", ())

    @property
    def speed(self) -> Sequence[Mapping[str, Any]]:
        """A mapping per batch size (`jq.bench.BatchTiming.to_dict`); empty when not timed."""
        return self.raw.get("speed") or ()

    @property
    def tasks(self) -> Mapping[str, Sequence[float]]:
        """Scores per item."""
        return self.raw.get("tasks") or {}


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """All arms that were asked for, the original first; `spec` is `ComparisonSpec.to_dict()`."""

    spec: Mapping[str, Any]
    spec_hash: str
    results: tuple[ArmResult, ...]

    @property
    def original(self) -> ArmResult | None:
        """The arm the others are measured against; None if it failed."""
        return next((r for r in self.results if r.name == ORIGINAL and r.done), None)

    @property
    def failed(self) -> tuple[ArmResult, ...]:
        return tuple(r for r in self.results if not r.done)

    def find(self, name: str) -> ArmResult:
        """The result of an arm that was asked for."""
        return next(r for r in self.results if r.name == name)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row of numbers per arm, equal keys in all; None where there is no number.

        Perplexities and KL are per token ("word_perplexity" per word of the text, an estimate made
        with the text's average of words per token); "..._stderr" is one standard error over
        windows; differences are from the original, window by window.
        """
        rows = [self._row(result) for result in self.results]
        keys = dict.fromkeys(key for row in rows for key in row)
        return [{key: row.get(key) for key in keys} for row in rows]

    def _row(self, result: ArmResult) -> dict[str, Any]:
        raw, quality = result.raw, result.quality
        row: dict[str, Any] = {
            "arm": result.name,
            "status": raw["status"],
            "error": result.error,
            "summary": result.arm.summary,
            **{k: _get(raw, "size", k) for k in ("bits_per_weight", "weight_bytes", "disk_bytes")},
        }
        row |= {} if quality is None else self._quality_row(result, quality)
        row |= {
            "making_seconds": _get(raw, "made", "seconds"),
            "making_peak_host_bytes": _get(raw, "made", "peak_host_bytes"),
            "making_peak_device_bytes": _get(raw, "made", "peak_device_bytes"),
            "peak_host_bytes": _get(raw, "memory", "peak_host_bytes"),
            "peak_device_bytes": _get(raw, "memory", "peak_device_bytes"),
        }
        for batch in result.speed:
            row |= _speed_row(batch)
        return row

    def _quality_row(self, result: ArmResult, quality: Quality) -> dict[str, Any]:
        nll = quality.window("nll")
        assert nll is not None
        row = _estimate("perplexity", perplexity(nll))
        words = self.spec["evaluation"].get("words_per_token")
        if words:
            row |= _estimate("word_perplexity", perplexity(nll / words))
        original = self.original
        if original is not None and original is not result:
            reference = original.quality
            assert reference is not None
            quality.check_pairs(reference)
            base = reference.window("nll")
            assert base is not None
            row |= _estimate("perplexity_increase", perplexity_difference(nll, base))
        for name, column in (("kl", "kl_nats"), ("top1", "top1_agreement")):
            values = quality.window(name)
            row |= {} if values is None else _estimate(column, mean_estimate(values))
        for name, scores in result.tasks.items():
            ours = np.asarray(scores, np.float64)
            row |= _estimate(f"task_{name}", mean_estimate(ours))
            if original is not None and original is not result:
                base = np.asarray(original.tasks[name], np.float64)
                row |= _estimate(f"task_{name}_difference", paired_difference(ours, base))
        return row


def _speed_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    size, row = batch["batch_size"], {}
    for phase in ("prefill", "decode"):
        rate = f"{phase}_tokens_per_second"
        row[f"{rate}_batch{size}"] = batch[rate]
        for p in _PERCENTILES:
            row[f"{phase}_{p}_ms_batch{size}"] = 1e3 * batch[f"{phase}_seconds"][p]
    return row


def _estimate(name: str, estimate: tuple[float, float]) -> dict[str, float | None]:
    value, error = estimate
    return {name: _finite(value), f"{name}_stderr": _finite(error)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _get(raw: Mapping[str, Any], part: str, name: str) -> Any:
    return (raw.get(part) or {}).get(name)
