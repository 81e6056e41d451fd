"""Which method should I choose?  Every method on one model, data and machine, and a decision.

numbers = Numbers(bits=4, group_size=128)
plan = Plan(model, out, find_arms(("awq", "gptq"), numbers), numbers, tokens, ...)
comparison = compare(plan)
decision = decide(comparison, Budget.parse("1%"))
write_reports(out, comparison, decision)
"""

from __future__ import annotations

from jq.compare.arms import ARMS, DEFAULT_ARMS, ORIGINAL, Arm, Numbers, find_arms, unfair_pairs
from jq.compare.decision import Budget, Decision, decide
from jq.compare.report import write_reports
from jq.compare.results import ArmResult, Comparison
from jq.compare.run import Plan, Step, Timing, compare

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "ORIGINAL",
    "Arm",
    "ArmResult",
    "Budget",
    "Comparison",
    "Decision",
    "Numbers",
    "Plan",
    "Step",
    "Timing",
    "compare",
    "decide",
    "find_arms",
    "unfair_pairs",
    "write_reports",
]
