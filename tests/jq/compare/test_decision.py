"""Which arm is taken, on comparisons made of numbers."""

import dataclasses
import json
import math

import pytest

from jq.compare.decision import Budget, decide
from jq.errors import SpecError
from tests.jq.compare.made_up import comparison, done, failed

ONE_PERCENT = Budget()
TIGHT = Budget.parse("0.01%")


def original(**more):
    return done(ms=20.0, megabytes=400.0, **more)


def decided(budget=ONE_PERCENT, first=None, /, *, options=None, **arms):
    return decide(comparison(first or original(), **arms), budget, **(options or {}))


def standing(decision):
    return {j.arm: j.standing for j in decision.judged}


def test_the_fastest_arm_within_the_budget_is_taken():
    found = decided(
        rtn=done(rise=0.05, ms=5, kl=0.1), awq=done(rise=0.001, ms=8, kl=0.01), gptq=done(ms=12)
    )
    assert found.chosen == "awq"
    assert found.verdict.startswith("Take awq: a decode step takes 8.00 ms, original 20.00 ms")
    assert standing(found) == {
        "original": "within", "rtn": "over", "awq": "within", "gptq": "within",
    }  # fmt: skip
    assert found.bound == "What bound: perplexity; rtn (5.00 ms) is over that budget."


def test_where_the_fastest_is_good_enough_the_cost_bound():
    found = decided(rtn=done(rise=0.001, ms=5, kl=0.1), awq=done(ms=8, kl=0.01))
    assert found.chosen == "rtn"
    assert found.bound.startswith("What bound: the cost alone")


def test_the_original_stays_where_nothing_is_faster():
    found = decided(rtn=done(ms=40), awq=done(ms=25))
    assert (found.chosen, found.verdict) == ("original", "No change: keep original.")
    assert "no other arm is cheaper" in found.bound


def test_what_is_used_today_stays_unless_another_is_clearly_better():
    # The same speed within 5 %, and perplexities that differ by noise.
    arms = {
        "awq": done(rise=0.001, noise=0.01, ms=8.0, kl=0.02, seed=1),
        "gptq": done(rise=0.0005, noise=0.01, ms=7.9, kl=0.01, seed=2),
    }
    kept = decided(**arms, options={"current": "awq"})
    assert (kept.chosen, kept.verdict) == ("awq", "No change: keep awq.")
    assert "cannot be told from that of gptq" in " ".join(kept.reasons)
    # Of two that nobody uses, the smaller divergence decides.
    assert decided(**arms).chosen == "gptq"
    better = {**arms, "gptq": done(rise=-0.002, noise=0.0001, ms=7.9, kl=0.01, seed=2)}
    better["awq"] = done(rise=0.005, noise=0.0001, ms=8.0, kl=0.02)
    assert decided(**better, options={"current": "awq"}).chosen == "gptq"


def test_a_clearly_faster_arm_replaces_the_current_one():
    found = decided(awq=done(ms=8, kl=0.01), gptq=done(ms=4, kl=0.02), options={"current": "awq"})
    assert found.chosen == "gptq"
    assert "awq 8.00 ms (0.50 times)" in found.verdict


def test_an_interval_across_the_limit_is_open_and_not_taken():
    found = decided(rtn=done(rise=0.01, noise=0.05, ms=5, kl=0.1), awq=done(ms=8, kl=0.01))
    assert standing(found)["rtn"] == "open"
    assert found.chosen == "awq"
    assert found.bound == "What bound: perplexity; rtn (5.00 ms) may be over that budget."
    assert any(r.startswith("rtn may be within the budget or not") for r in found.reasons)


def test_one_window_decides_nothing_about_quality():
    found = decided(ONE_PERCENT, original(windows=1), rtn=done(rise=0.001, ms=5, windows=1))
    assert standing(found)["rtn"] == "open"
    assert found.chosen == "original"
    assert any("cannot be judged on one window" in r for r in found.reasons)


@pytest.mark.parametrize(
    ("text", "allowed"), [("0.5", True), ("1.5%", True), ("0.5%", False), ("0.1", False)]
)
def test_budgets_are_absolute_or_relative(text, allowed):
    # exp(3) (exp(0.01) - 1) is an increase of about 0.2, or 1 %.
    found = decided(Budget.parse(text), rtn=done(rise=0.01, ms=5))
    assert (standing(found)["rtn"] == "within") == allowed
    assert (found.chosen == "rtn") == allowed


def test_a_limit_counts_in_perplexity():
    assert Budget.parse("1%").limit(50.0) == pytest.approx(0.5)
    assert Budget.parse(".2").limit(50.0) == pytest.approx(0.2)


@pytest.mark.parametrize("text", ["", "x", "-1", "1 %%", "nan", "1e400", "inf"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(SpecError, match="max_ppl_increase"):
        Budget.parse(text)


def test_few_windows_are_warned_of():
    assert not any("are few" in r for r in decided(rtn=done(ms=5)).reasons)
    few = comparison(original(windows=6), rtn=done(ms=5, windows=6))
    spec = {**few.spec, "evaluation": {**few.spec["evaluation"], "windows": 6}}
    found = decide(dataclasses.replace(few, spec=spec), ONE_PERCENT)
    assert any(r.startswith("6 windows are few") for r in found.reasons)


def test_times_of_a_busy_machine_are_warned_of():
    arms = {"rtn": done(ms=5, load=[2.9, 2.0]), "awq": done(ms=8, kl=0.01, load=[9.5, 2.0])}
    (warning,) = [r for r in decided(**arms).reasons if r.startswith("Others used")]
    assert "while awq were timed (9.5 processes for 2 processors)" in warning
    by_size = decided(**arms, options={"objective": "size"})
    assert not any(r.startswith("Others used") for r in by_size.reasons)


def test_tasks_have_a_budget_of_their_own():
    good, bad = [1.0] * 80 + [0.0] * 20, [1.0] * 60 + [0.0] * 40
    arms = {"rtn": done(ms=5, tasks={"quiz": bad}), "awq": done(ms=8, tasks={"quiz": good})}
    budget = Budget(max_task_drop=0.05)
    found = decided(budget, original(tasks={"quiz": good}), **arms)
    assert found.chosen == "awq"
    assert found.bound == "What bound: task quiz; rtn (5.00 ms) is over that budget."
    drop = next(j for j in found.judged if j.arm == "rtn").task_drops["quiz"]
    assert drop.value == pytest.approx(0.2)
    loose = decided(Budget(), original(tasks={"quiz": good}), **arms)
    assert loose.chosen == "rtn"
    (worst,) = [r for r in loose.reasons if r.startswith("Of its tasks")]
    assert worst.startswith("Of its tasks quiz fares worst: -20.0 points (95 % -")
    assert not worst.endswith("noise.")
    with pytest.raises(SpecError, match="no tasks were measured"):
        decided(budget, rtn=done(ms=5))


def test_costs_are_what_was_asked_for():
    arms = {"rtn": done(ms=5, megabytes=90), "awq": done(ms=8, megabytes=50)}
    small = decided(**arms, options={"objective": "size"})
    assert small.chosen == "awq"
    assert "50.00 MB, 0.12 times those of original" in small.verdict
    assert decided(**arms, options={"batch_size": 4}).judged[1].cost == pytest.approx(0.01)
    assert decided(**arms, options={"objective": "prefill"}).chosen == "rtn"


def test_what_was_not_measured_cannot_decide():
    untimed = {"speed": None}
    with pytest.raises(SpecError, match="nothing was timed"):
        decided(ONE_PERCENT, original(**untimed), rtn=done(**untimed))
    with pytest.raises(SpecError, match=r"batch size 3 was not timed; timed: \[1, 4\]"):
        decided(rtn=done(), options={"batch_size": 3})
    with pytest.raises(SpecError, match="'awq' is not compared; compared: original, rtn"):
        decided(rtn=done(), options={"current": "awq"})


def test_failed_arms_are_left_out():
    found = decided(rtn=failed(), awq=done(ms=8, kl=0.01))
    assert found.chosen == "awq"
    assert set(standing(found)) == {"original", "awq"}


def test_without_the_original_there_is_no_decision():
    found = decided(ONE_PERCENT, failed("Killed: no memory"), rtn=done())
    assert found.chosen is None
    assert found.verdict == "No decision: the original failed (Killed: no memory)."


def test_decisions_are_json():
    found = decided(ONE_PERCENT, original(windows=1), rtn=done(rise=0.001, windows=1))
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    rise = next(j for j in value["judged"] if j["arm"] == "rtn")["perplexity_increase"]
    assert rise[0] == pytest.approx(math.exp(3.0) * 0.001, rel=0.5)
    assert rise[1:] == [None, None]
