"""A whole comparison on a tiny model: arms made, measured, kept, reused, and failing."""

import dataclasses
import json

import numpy as np
import pytest

from jq.api import load
from jq.calib.tokens import CalibrationData
from jq.compare import Numbers, Plan, Timing, compare, find_arms, run, stages
from jq.errors import CalibrationError, OutputError, SpecError
from jq.evaluate import evaluate
from jq.models import HFCheckpoint
from tests.cli import folders

NUMBERS = Numbers(group_size=32)
MEASURED = ("size", "load", "speed", "memory", "quality", "tasks")
TOKENS = np.random.default_rng(0).integers(0, 280, 32 * 4 + 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folders.write_model(tmp_path_factory.mktemp("models") / "tiny")


def plan_of(model, out, methods=("rtn", "int8"), **more):
    options = {"timing": None, "apart": False, "words_per_token": 0.5, **more}
    return Plan(
        model, out, find_arms(methods, NUMBERS), NUMBERS, TOKENS, 32, "made-up.npy", **options
    )


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """A comparison, its plan, and the steps it told of."""
    steps = []
    timing = Timing((1,), prompt_tokens=4, steps=3)
    out = tmp_path_factory.mktemp("compared") / "out"
    plan = plan_of(model, out, timing=timing, calibration=calibration())
    return compare(plan, progress=steps.append), plan, steps


def test_quality_is_that_of_evaluate(first, model):
    comparison, plan, _ = first
    reference = load(model)[1]
    for name in ("rtn", "int8"):
        decoder, params = load(plan.out / "arms" / name)
        expected = evaluate(decoder, params, TOKENS, reference_params=reference, seq_len=32)
        row = next(row for row in comparison.rows() if row["arm"] == name)
        assert expected.kl is not None
        assert expected.perplexity_increase is not None
        assert row["perplexity"] == pytest.approx(expected.perplexity.value, rel=1e-5)
        assert row["kl_nats"] == pytest.approx(expected.kl.value, rel=1e-3)
        rise = expected.perplexity_increase.value
        assert row["perplexity_increase"] == pytest.approx(rise, rel=1e-2, abs=1e-2)


def test_sizes_are_those_of_the_folders(first, model):
    comparison, plan, _ = first
    rows = {row["arm"]: row for row in comparison.rows()}
    # 4 bits, and a 16-bit scale and a 4-bit zero point for every 32.
    assert rows["rtn"]["bits_per_weight"] == pytest.approx(4.625)
    assert rows["original"]["bits_per_weight"] == 32
    files = (plan.out / "arms" / "rtn").rglob("*")
    assert rows["rtn"]["disk_bytes"] == sum(f.stat().st_size for f in files if f.is_file())
    assert rows["original"]["weight_bytes"] < (model / "model.safetensors").stat().st_size
    # Of a process that others share, no peak is told.
    assert rows["rtn"]["peak_host_bytes"] is None


def test_speed_and_errors_of_linears_are_there(first):
    comparison, _, _ = first
    for result in comparison.results:
        assert result.speed[0]["batch_size"] == 1
        assert len(result.speed[0]["decode_step_seconds"]) == 3
        assert result.raw["load"][1] >= 1
    assert len(comparison.find("rtn").linears) == folders.LINEARS
    assert comparison.find("original").linears == ()


def test_every_stage_tells_of_itself(first):
    _, plan, steps = first
    seen = list(dict.fromkeys((s.arm, s.stage) for s in steps))
    assert seen == [
        ("original", "digest"), ("original", "measure"),
        ("rtn", "make"), ("rtn", "measure"), ("int8", "make"), ("int8", "measure"),
    ]  # fmt: skip
    assert {s.count for s in steps} == {len(plan.arms)}


def test_finished_arms_are_reused_and_others_join(first, monkeypatch):
    comparison, plan, _ = first
    ran, other = [], comparison.find("rtn").raw

    def pretend(job, show):
        ran.append((job.arm.name, job.stage))
        return other["made"] if job.stage == "make" else {k: other[k] for k in MEASURED}

    monkeypatch.setattr(run, "run_stage", pretend)
    arms = find_arms(["int8", "rtn-clip"], NUMBERS)
    again = compare(dataclasses.replace(plan, arms=arms))
    assert ran == [("rtn-clip", "make"), ("rtn-clip", "measure")]
    assert [r.reused for r in again.results] == [True, True, False]
    assert again.find("int8").raw == comparison.find("int8").raw
    assert again.spec_hash == comparison.spec_hash


def calibration():
    tokens = np.random.default_rng(1).integers(0, 280, (2, 32)).astype(np.int32)
    return CalibrationData(tokens, None, {"sha256": "made up"})


def test_another_question_is_refused(first):
    _, plan, _ = first
    before = {p: p.read_bytes() for p in plan.out.rglob("*.json")}
    with pytest.raises(OutputError, match=r"evaluation\.seq_len was 32, is 16"):
        compare(dataclasses.replace(plan, seq_len=16))
    with pytest.raises(OutputError, match=r"evaluation\.sha256 was"):
        compare(dataclasses.replace(plan, tokens=TOKENS[1:]))
    assert {p: p.read_bytes() for p in plan.out.rglob("*.json")} == before


def test_a_failing_arm_fails_alone_and_is_tried_again(model, tmp_path, monkeypatch):
    real, broken = run.run_stage, {"rtn"}

    def sometimes(job, show):
        if job.arm.name in broken and job.stage == "measure":
            raise RuntimeError("RESOURCE_EXHAUSTED: too much")
        return {"seconds": 1.0, "linears": []} if job.stage == "make" else measured(job, show)

    def measured(job, show):
        original = dataclasses.replace(job, arm=find_arms(["rtn"], NUMBERS)[0])
        return real(original, show)

    monkeypatch.setattr(run, "run_stage", sometimes)
    told = []
    plan = plan_of(model, tmp_path / "out")
    found = compare(plan, finished=told.append)
    assert [r.name for r in found.failed] == ["rtn"]
    assert [r.done for r in told] == [True, False, True]
    assert found.failed[0].error is not None
    assert "the device is out of memory" in found.failed[0].error
    assert json.loads((plan.out / "arms" / "rtn.json").read_text())["status"] == "failed"
    broken.clear()
    again = compare(plan)
    assert again.failed == ()
    assert [r.reused for r in again.results] == [True, False, True]


def test_an_interrupt_is_no_failure(model, tmp_path, monkeypatch):
    def interrupt(job, show):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(plan_of(model, tmp_path / "out"))
    assert list((tmp_path / "out" / "arms").iterdir()) == []


def test_what_cannot_end_well_is_refused_at_once(model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CalibrationError, match="awq learns from calibration data"):
        compare(plan_of(model, out, ["awq"]))
    with pytest.raises(SpecError, match="first arm must be 'original'"):
        compare(dataclasses.replace(plan_of(model, out), arms=find_arms(["rtn"], NUMBERS)[1:]))
    arms = find_arms(["rtn"], NUMBERS)
    with pytest.raises(SpecError, match="arms of one name: rtn"):
        compare(dataclasses.replace(plan_of(model, out), arms=(*arms, arms[1])))
    odd = find_arms(["rtn"], Numbers(group_size=48))
    with pytest.raises(SpecError, match="group_size 48"):
        compare(dataclasses.replace(plan_of(model, out), arms=odd))
    with pytest.raises(CalibrationError, match="make no window of 4096"):
        compare(dataclasses.replace(plan_of(model, out), seq_len=4096))
    with pytest.raises(SpecError, match="cannot be imported"):
        compare(plan_of(model, out, tasks=("no_such_module:task",)))
    with pytest.raises(SpecError, match="1 or more"):
        Timing((0,))
    with pytest.raises(SpecError, match=r"prompt_tokens 31 .* context of 32; give 30 or less"):
        compare(plan_of(model, out, timing=Timing(prompt_tokens=31)))
    assert not out.exists()


class Coin:
    """A task of four items."""

    name = "coin"

    def score(self, model, params, tokenizer):
        assert tokenizer.decode(tokenizer.encode("a cafe")) == "a cafe"
        return [0.0, 1.0, 1.0, 0.5]


coin, wrong, none = Coin(), Coin(), object()
wrong.score = lambda *_: [2.0]


def test_tasks_of_the_user_are_scored(model, tmp_path):
    plan = plan_of(model, tmp_path / "out", tasks=(f"{__name__}:coin",))
    only = dataclasses.replace(plan, arms=plan.arms[:1])
    (row,) = compare(only).rows()
    assert row["task_coin"] == pytest.approx(0.625)
    assert row["task_coin_stderr"] == pytest.approx(np.std([0, 1, 1, 0.5], ddof=1) / 2)


def test_wrong_tasks_are_told(model, tmp_path):
    plan = plan_of(model, tmp_path / "out", tasks=(f"{__name__}:wrong",))
    (result,) = compare(dataclasses.replace(plan, arms=plan.arms[:1])).results
    assert result.error is not None
    assert "not one number in [0, 1] per item" in result.error
    with pytest.raises(SpecError, match="without name and score"):
        compare(dataclasses.replace(plan, tasks=(f"{__name__}:none",)))
    with pytest.raises(SpecError, match="name it as module:object"):
        compare(dataclasses.replace(plan, tasks=("module:",)))


def test_checkpoints_can_go(model, tmp_path):
    plan = plan_of(model, tmp_path / "out", ["int8"], keep_checkpoints=False)
    assert compare(plan).failed == ()
    assert sorted(p.name for p in (tmp_path / "out" / "arms").iterdir()) == [
        "int8.json", "int8.made.json", "original.json",
    ]  # fmt: skip
    assert HFCheckpoint(model).config.hidden_size == 64


@pytest.mark.slow
def test_processes_of_their_own_tell_their_peaks(model, tmp_path):
    plan = plan_of(model, tmp_path / "out", ["int8"], apart=True)
    found = compare(plan)
    assert found.failed == ()
    row = found.rows()[1]
    # Python and JAX alone take more than 100 MB.
    assert row["making_peak_host_bytes"] > 1e8
    assert row["peak_host_bytes"] > 1e8
    assert not list(plan.out.rglob("*.log"))  # its processes had nothing to say
    together = compare(plan_of(model, tmp_path / "other", ["int8"])).rows()[1]
    assert row["perplexity"] == pytest.approx(together["perplexity"], rel=1e-6)


def test_the_time_of_a_resumed_making_is_not_told(model, tmp_path, monkeypatch):
    real = stages.quantize_checkpoint
    monkeypatch.setattr(
        stages,
        "quantize_checkpoint",
        lambda *a, **k: dataclasses.replace(real(*a, **k), resumed=1),
    )
    plan = plan_of(model, tmp_path, ["int8"])
    (tmp_path / "arms").mkdir()
    job = stages.Job("make", plan.arms[1], model, tmp_path, None, None, 1, 32, None)
    assert stages.run_stage(job, lambda *_: None)["seconds"] is None
