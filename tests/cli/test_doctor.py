"""`jaxq doctor`, and quantizing for a GPU."""

import json

from jq import doctor
from jq.support import rows


def test_the_matrix_and_every_product_on_this_machine(call, monkeypatch):
    monkeypatch.setattr(doctor, "ROWS", (3,))
    done = call("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    (here,) = [row for row in report["matrix"] if row["this machine"]]
    assert here["gpus"] == "CPUs, TPUs, others"
    assert len(report["matrix"]) == len(rows())
    assert report["matrix"][-3]["fp8"]["verdict"] == "kernel"
    assert "jax" in report["versions"]
    assert [trial["name"] for trial in report["trials"]] == list(doctor.FORMATS)
    for trial in report["trials"]:
        assert trial["kernel"] == "reference"
        assert "no CUDA device" in trial["why"]
        assert 1e-4 < trial["error"] < doctor.LARGEST_ERROR


def test_a_product_that_fails_is_told(call, monkeypatch):
    """Of two, one raises and one is wrong."""
    kinds = list(doctor.FORMATS)[:2]
    monkeypatch.setattr(doctor, "FORMATS", {name: doctor.FORMATS[name] for name in kinds})
    monkeypatch.setattr(doctor, "ROWS", (1, 2))
    errors = {1: RuntimeError("ptxas\nfailed"), 2: 0.5}

    def error(w, count, kernel):
        if isinstance(errors[count], Exception):
            raise errors[count]
        return errors[count]

    monkeypatch.setattr(doctor, "_error", error)
    done = call("doctor")
    assert done.code == 1
    assert "FAILED: RuntimeError: ptxas failed" in done.out
    assert "FAILED: the error 0.5 is larger than 0.005" in done.out
    assert "0 of 4 ran on kernels" in done.out
    (marked,) = [line for line in done.out.splitlines() if line.startswith("->")]
    assert "CPUs" in marked


def test_not_a_number_is_no_success(monkeypatch):
    monkeypatch.setattr(doctor, "_error", lambda *_: float("nan"))
    monkeypatch.setattr(doctor, "ROWS", (1,))
    assert not any(trial.passed for trial in doctor.trials())


def test_quantizing_for_a_gpu_that_lacks_the_arithmetic(call, tmp_path):
    options = ("quantize", "demo", "--out", tmp_path / "out", "--method", "fp8")
    refusal = call(*options, "--target-gpu", "a100").refusal
    assert "a100-40gb (sm_80) does not serve fp8" in refusal
    assert "--method gptq or awq" in refusal
    assert not (tmp_path / "out").exists()
    asked = call(*options, "--target-gpu", "a100", "--allow-reference", "--dry-run")
    assert asked.code == 0, asked
