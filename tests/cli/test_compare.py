"""`jaxq compare`, as a user calls it."""

import json

import pytest

from jq.compare.arms import ARMS, DEFAULT_ARMS
from jq.compare.worker import ArmError

FEW = ("--no-apart", "--no-timing", "--group-size", 32, "--max-windows", 2)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("compared") / "out"


@pytest.fixture(scope="module")
def arguments(tiny, text, out):
    data = ("--text", text, "--calib-dataset", text, "--calib-samples", 2)
    return ("compare", tiny, "--out", out, *data, *FEW)


def test_a_table_and_a_decision_are_printed(call, arguments, out):
    done = call(*arguments, "--methods", "int8", "--max-ppl-increase", "50%")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ["method", "bits", "MB"]
    assert [line.split()[0] for line in lines[1:3]] == ["original", "int8"]
    assert "Take int8: weights of 0." in done.out
    assert done.out.endswith(f"report.html, report.md, results.csv, results.json are in {out}\n")
    assert "jaxq: note: [2/2] int8: done" in done.err
    report = (out / "report.md").read_text()
    assert "2 windows of 32 tokens of words.txt" in report
    assert "2 samples of 32 tokens of words.txt" in report
    value = json.loads((out / "results.json").read_text())
    assert value["spec"]["evaluation"]["words_per_token"] == pytest.approx(0.5, abs=0.3)


def test_a_failed_method_is_marked_and_the_exit_code_tells(call, arguments, monkeypatch):
    def no_luck(*_):
        raise ArmError("NonFiniteError: no luck")

    monkeypatch.setattr("jq.compare.run._stage", no_luck)
    done = call(*arguments, "--methods", "int8,fp8", "--json")
    assert done.code == 1
    assert "jaxq: note: [2/3] int8: was there" in done.err
    assert done.err.splitlines()[-1] == "jaxq: error: fp8 FAILED: NonFiniteError: no luck"
    rows = {row["arm"]: row for row in json.loads(done.out)["rows"]}
    assert [rows[name]["status"] for name in ("original", "int8", "fp8")] == [
        "done", "done", "failed",
    ]  # fmt: skip


def test_other_questions_are_refused(call, arguments):
    done = call(*arguments[:-1], 3, "--methods", "int8")
    assert (done.code, done.out) == (2, "")
    assert "evaluation.windows was 2, is 3" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "gptk"), "method 'gptk' is unknown here; known: rtn,"),
        (("--methods", ","), "nothing to compare"),
        (("--methods", "rtn", "--max-ppl-increase", "much"), "give a number like 0.2"),
        (("--methods", "rtn", "--objective", "decode"), "leave --no-timing out"),
        (("--methods", "rtn", "--max-task-drop", "0.1"), "--max-task-drop needs --tasks"),
        (("--methods", "rtn", "--current", "awq"), "--current awq is not among original, rtn"),
        (("--methods", "rtn", "--bits", "9"), "bits 9"),
        (("--methods", "rtn", "--text", "none.txt"), "none.txt"),
        (("--methods", "rtn", "--timing", "--batch-sizes", "1;8"), "1 or more, like 1,8"),
        (("--methods", "rtn", "--limit", "3"), "--limit is for tasks"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[-1],
)
def test_bad_options_are_refused(call, arguments, tmp_path, options, said):
    target = [tmp_path / "other" if a == arguments[3] else a for a in arguments]
    done = call(*target, *options)
    assert (done.code, done.out) == (2, "")
    assert said in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_texts_must_be_given(call, tiny, text, tmp_path):
    some = ("compare", tiny, "--out", tmp_path / "x", *FEW)
    assert "quality on which text?" in call(*some, "--methods", "rtn").refusal
    refusal = call(*some, "--text", text, "--methods", "rtn,awq,gptq").refusal
    assert refusal.startswith("awq, gptq learn from calibration text: give --calib-dataset")


def test_help_names_all_methods(call):
    text = " ".join(call("compare", "--help").out.replace("│", " ").split())
    assert all(name in text for name in ARMS)
    assert ",".join(DEFAULT_ARMS) in text.replace(" ", "")
