"""Which method should I choose?  Every method on one model, data and machine, and a decision.

numbers, budget = Numbers(bits=4, group_size=128), Budget.parse("1%")
arms = find_arms(("awq", "gptq"), numbers)
comparison = compare(Plan(model, out, arms, numbers, tokens, 2048, "held-out.txt", timing=Timing()))
decision = decide(comparison, budget)
write_reports(out, comparison, decision, budget)
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
