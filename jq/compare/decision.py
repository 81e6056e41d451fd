"""Which arm to take: the cheapest one whose loss of quality is surely within the budget.

decision = decide(comparison, Budget.parse("1%"), objective="decode")
decision.verdict, decision.reasons
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jq.compare.arms import ORIGINAL
from jq.compare.bootstrap import Interval, mean_interval, perplexity_interval
from jq.compare.results import ArmResult, Comparison
from jq.errors import SpecError

Objective = Literal["decode", "prefill", "size"]
Standing = Literal["within", "over", "open"]
# Costs that differ by less are taken to be equal: timings of one program differ by that much.
TOLERANCE = 0.05
# Percentile intervals of so many windows are a tenth too narrow, of fewer more.
FEW_WINDOWS = 20


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much quality may be lost.

    max_ppl_increase: of the perplexity over the original's; a share of it where `relative`.
    max_task_drop: of any task's mean score, as a share of items (0.01 is one point in a hundred);
      None where tasks do not matter.
    """

    max_ppl_increase: float = 0.01
    relative: bool = True
    max_task_drop: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_ppl_increase", "max_task_drop"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise SpecError(f"{name} is {value}; it must be 0 or more")

    @classmethod
    def parse(cls, max_ppl_increase: str, max_task_drop: float | None = None) -> Budget:
        """Of "0.2" (perplexity) or "1%" (of the original's); SpecError for anything else."""
        found = re.fullmatch(r"\s*\+?(\d+\.?\d*|\.\d+)\s*(%?)\s*", max_ppl_increase)
        if found is None:
            raise SpecError(
                f"max_ppl_increase {max_ppl_increase!r}: give a number like 0.2, or a share of the "
                "original's perplexity like 1%"
            )
        percent = bool(found.group(2))
        value = float(found.group(1)) / (100 if percent else 1)
        return cls(value, percent, max_task_drop)

    def limit(self, perplexity: float) -> float:
        """The increase that is allowed over this perplexity."""
        return self.max_ppl_increase * (perplexity if self.relative else 1.0)


@dataclasses.dataclass(frozen=True)
class Judged:
    """An arm held against the budget.

    standing: "within" or "over", if the whole 95 % interval is; else "open".
    bound_by: what it is over, or open about; None within.
    increase: of the perplexity over the original's.
    task_drops: of the mean scores, by task, positive where the arm is worse.
    cost: seconds or bytes, see `decide`; None where it was not measured.
    """

    arm: str
    standing: Standing
    bound_by: str | None
    increase: Interval
    task_drops: dict[str, Interval]
    cost: float | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do.

    chosen: an arm's name; None where nothing can be decided.
    verdict: one sentence.
    bound: which constraint bound, in one sentence.
    reasons: further sentences.
    judged: all arms that were measured.
    """

    chosen: str | None
    verdict: str
    bound: str
    reasons: tuple[str, ...]
    judged: tuple[Judged, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for what is not a number."""
        value = dataclasses.asdict(self)
        for judged in value["judged"]:
            intervals = {"perplexity": judged.pop("increase"), **judged["task_drops"]}
            plain = {name: _plain(x) for name, x in intervals.items()}
            judged["perplexity_increase"] = plain.pop("perplexity")
            judged["task_drops"] = plain
        return value


def decide(
    comparison: Comparison,
    budget: Budget,
    *,
    objective: Objective = "decode",
    batch_size: int | None = None,
    current: str = ORIGINAL,
    seed: int = 0,
) -> Decision:
    """The cheapest arm within the budget; "no change" where that is no better than `current`.

    An arm is within the budget when the upper end of its 95 % interval (paired bootstrap over
    windows, and over items of tasks) is. Costs within 5 % of the lowest count as equal; among
    equals the smaller perplexity decides, and where that difference is inside the noise, the
    smaller KL divergence, which is far less noisy.

    Args:
        comparison: what was measured.
        budget: how much quality may be lost.
        objective: the cost: median seconds of a decode step or of a prefill, or bytes of weights.
        batch_size: at which latencies count; None is the first that was timed.
        current: the arm in use today.
        seed: of the bootstrap.
    Raises: SpecError for an objective, a batch size or tasks that were not measured, and for an
        unknown `current`.
    """
    if comparison.original is None:
        error = comparison.results[0].error
        return Decision(None, f"No decision: the original failed ({error}).", "", (), ())
    names = [r.name for r in comparison.results]
    if current not in names:
        raise SpecError(f"current arm {current!r} is not compared; compared: {', '.join(names)}")
    if budget.max_task_drop is not None and not comparison.original.tasks:
        raise SpecError("max_task_drop is given, and no tasks were measured; name some")
    done = [r for r in comparison.results if r.done]
    judged = tuple(_judge(r, comparison, budget, objective, batch_size, seed) for r in done)
    return _Decider(comparison, judged, objective, current, seed).decide()


def cost_of(result: ArmResult, objective: Objective, batch_size: int | None = None) -> float | None:
    """Seconds or bytes, see `decide`; None where the arm failed."""
    if not result.done:
        return None
    if objective == "size":
        return float(result.raw["size"]["weight_bytes"])
    if not result.speed:
        raise SpecError(f"objective {objective!r}: nothing was timed; decide by size")
    sizes = [batch["batch_size"] for batch in result.speed]
    if batch_size is not None and batch_size not in sizes:
        raise SpecError(f"batch size {batch_size} was not timed; timed: {sizes}")
    batch = result.speed[0 if batch_size is None else sizes.index(batch_size)]
    return float(batch[f"{objective}_seconds"]["p50"])


def _judge(
    result: ArmResult,
    comparison: Comparison,
    budget: Budget,
    objective: Objective,
    batch_size: int | None,
    seed: int,
) -> Judged:
    original = comparison.original
    assert original is not None
    cost = cost_of(result, objective, batch_size)
    if result is original:
        return Judged(result.name, "within", None, Interval(0.0, 0.0, 0.0), {}, cost)
    nll, base = _nll(result), _nll(original)
    increase = perplexity_interval(nll, base, seed=seed)
    drops = {
        name: mean_interval(np.asarray(scores), np.asarray(result.tasks[name]), seed=seed)
        for name, scores in original.tasks.items()
    }
    limits = [("perplexity", increase, budget.limit(math.exp(base.mean())))]
    if budget.max_task_drop is not None:
        limits += [(f"task {name}", drop, budget.max_task_drop) for name, drop in drops.items()]
    standing, bound_by = _standing(limits)
    return Judged(result.name, standing, bound_by, increase, drops, cost)


def _standing(limits: Sequence[tuple[str, Interval, float]]) -> tuple[Standing, str | None]:
    for name, interval, limit in limits:
        if interval.low > limit:
            return "over", name
    for name, interval, limit in limits:
        if not interval.high <= limit:  # NaN included
            return "open", name
    return "within", None


def _task_loss(chosen: Judged) -> list[str]:
    """What becomes of the task that loses most; nothing without tasks."""
    if not chosen.task_drops:
        return []
    name, drop = max(chosen.task_drops.items(), key=lambda item: item[1].value)
    ends = f"{-100 * drop.high:+.1f} to {-100 * drop.low:+.1f}"
    noise = ": inside the noise" if drop.noise else ""
    return [
        f"Of its tasks {name} fares worst: {-100 * drop.value:+.1f} points (95 % {ends}){noise}."
    ]


@dataclasses.dataclass(frozen=True)
class _Decider:
    comparison: Comparison
    judged: tuple[Judged, ...]
    objective: Objective
    current: str
    seed: int

    def decide(self) -> Decision:
        """Choose, and say why."""
        allowed = [j for j in self.judged if j.standing == "within"]
        lowest = min(_cost(j) for j in allowed)
        near = [j for j in allowed if _cost(j) <= lowest * (1 + TOLERANCE)]
        now = next((j for j in near if j.arm == self.current), None)
        chosen, equals = self._best(near)
        if now is not None and now in equals:
            verdict = f"No change: keep {now.arm}."
            chosen = now
        else:
            verdict = f"Take {chosen.arm}: {self._gain(chosen)}."
        reasons = [self._loss(chosen), *_task_loss(chosen)] if chosen.arm != ORIGINAL else []
        if len(near) > 1:
            others = _list([j.arm for j in near if j is not chosen])
            reasons.append(f"{others} cost the same within {TOLERANCE:.0%}.")
        if len(equals) > 1:
            names = _list([j.arm for j in equals if j is not chosen])
            reasons.append(f"Its perplexity cannot be told from that of {names}.")
        reasons += [_open(j) for j in self.judged if j.standing == "open"]
        reasons += self._busy()
        windows = self.comparison.spec["evaluation"]["windows"]
        if windows < FEW_WINDOWS:
            reasons.append(
                f"{windows} windows are few: intervals of so few come out too narrow; measure on "
                f"{FEW_WINDOWS} or more (max_windows)."
            )
        return Decision(chosen.arm, verdict, self._bound(near), tuple(reasons), self.judged)

    def _best(self, near: Sequence[Judged]) -> tuple[Judged, list[Judged]]:
        """The arm to prefer, among those whose perplexity cannot be told from the smallest one."""
        first = min(near, key=lambda j: j.increase.value)
        equals = [j for j in near if j is first or self._difference(j, first).noise]
        return min(equals, key=lambda j: _kl(self.comparison.find(j.arm))), equals

    def _difference(self, a: Judged, b: Judged) -> Interval:
        find = self.comparison.find
        return perplexity_interval(_nll(find(a.arm)), _nll(find(b.arm)), seed=self.seed)

    def _gain(self, chosen: Judged) -> str:
        before = next((j for j in self.judged if j.arm == self.current), None)
        what = {"size": "weights of", "decode": "a decode step takes", "prefill": "a prefill takes"}
        text = f"{what[self.objective]} {_amount(_cost(chosen), self.objective)}"
        if before is None or before is chosen:
            return text
        ratio = _cost(chosen) / _cost(before)
        old = _amount(_cost(before), self.objective)
        return (
            f"{text}, {ratio:.2f} times those of {before.arm}"
            if self.objective == "size"
            else (f"{text}, {before.arm} {old} ({ratio:.2f} times)")
        )

    def _loss(self, chosen: Judged) -> str:
        rise = chosen.increase
        text = f"{rise.value:+.4f} (95 % {rise.low:+.4f} to {rise.high:+.4f})"
        if rise.noise:
            return f"Its perplexity differs from the original's by {text}: inside the noise."
        return f"Its perplexity differs from the original's by {text}."

    def _busy(self) -> list[str]:
        """A warning about times that were taken while others wanted the processors as well."""
        if self.objective == "size":
            return []
        loads = {r.name: r.raw.get("load") for r in self.comparison.results if r.done}
        busy = {name: load for name, load in loads.items() if load and load[0] > load[1] + 1}
        if not busy:
            return []
        load, processors = max(busy.values())
        return [
            f"Others used the machine while {_list(list(busy))} were timed ({load:.1f} processes "
            f"for {processors:.0f} processors): such times say little; repeat on a quiet machine."
        ]

    def _bound(self, near: Sequence[Judged]) -> str:
        """Which constraint kept the choice from the cheapest arm of all."""
        cheapest = min(self.judged, key=_cost)
        if cheapest.standing != "within" and _cost(cheapest) * (1 + TOLERANCE) < _cost(near[0]):
            how = "is over" if cheapest.standing == "over" else "may be over"
            amount = _amount(_cost(cheapest), self.objective)
            return f"What bound: {cheapest.bound_by}; {cheapest.arm} ({amount}) {how} that budget."
        if all(j.arm == ORIGINAL for j in near):
            return "What bound: the cost; no other arm is cheaper than the original here."
        return "What bound: the cost alone; the cheapest arm is within the quality budget."


def _open(judged: Judged) -> str:
    rise = judged.increase
    if math.isnan(rise.high):
        return f"{judged.arm} cannot be judged on one window; measure on more (max_windows)."
    return (
        f"{judged.arm} may be within the budget or not ({judged.bound_by}: "
        f"{rise.value:+.4f}, 95 % {rise.low:+.4f} to {rise.high:+.4f}); more windows would tell."
        if judged.bound_by == "perplexity"
        else f"{judged.arm} may be within the budget of {judged.bound_by} or not; more items would "
        "tell."
    )


def _nll(result: ArmResult) -> np.ndarray:
    quality = result.quality
    assert quality is not None
    nll = quality.window("nll")
    assert nll is not None
    return nll


def _kl(result: ArmResult) -> float:
    quality = result.quality
    kl = None if quality is None else quality.window("kl")
    return 0.0 if kl is None else float(kl.mean())


def _cost(judged: Judged) -> float:
    assert judged.cost is not None
    return judged.cost


def _amount(cost: float, objective: Objective) -> str:
    return f"{cost / 1e6:.2f} MB" if objective == "size" else f"{1e3 * cost:.2f} ms"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(interval: Sequence[float]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in interval]
