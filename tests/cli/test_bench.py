"""`jaxq bench`: a report of everything that was measured, and where."""

import functools
import json

import pytest

from jq import bench

QUICK = ("--prompt-tokens", 4, "--decode-steps", 30, "--prefills", 2)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    quick = functools.partial(bench.measure_ceilings, buffer_bytes=1 << 16, largest=64)
    monkeypatch.setattr(bench, "measure_ceilings", quick)


def test_json_has_latencies_and_regimes(call, int8):
    done = call("bench", int8, *QUICK, "--batch-sizes", "1,3", "--json")
    assert done.code == 0
    told = json.loads(done.out)
    assert told["device"]["platform"] == told["device"]["label"] == "cpu"
    assert told["dtype"] == "float32"
    assert set(told["ceilings"]["products_per_second"]) == {"float32", "bfloat16", "int8"}
    assert [batch["batch_size"] for batch in told["batches"]] == [1, 3]
    for batch in told["batches"]:
        steps = batch["decode_seconds"]
        assert steps["count"] == 30  # more than the 32 positions leave: two sequences
        assert 0 < steps["p50"] <= steps["p95"] <= steps["p99"] <= steps["max"]
        assert batch["prefill_seconds"]["count"] == 2
        line = batch["decode_roofline"]
        assert line["bound"] in ("memory", "compute")
        assert batch["prefill_roofline"]["intensity"] > line["intensity"]
        assert line["fraction_of_ceiling"] == line["ceiling_seconds"] / steps["p50"]
    first, second = (batch["decode_roofline"]["intensity"] for batch in told["batches"])
    assert first < second < 3 * first
    rows = {timing["rows"] for timing in told["linears"]}
    assert rows == {1, 3, 12}
    assert {timing["format"] for timing in told["linears"]} == {"int8 x int8", "float32"}
    assert sum(t["count"] for t in told["linears"] if t["rows"] == 1) == 14 + 1


def test_the_table_says_that_it_is_a_cpu(call, tiny):
    done = call("bench", tiny, *QUICK, "--batch-sizes", "1", "--decode-steps", 2)
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{tiny} in float32 on cpu, JAX ")
    assert lines[1] == "numbers of a CPU: they say nothing about any GPU"
    assert lines[2].startswith("ceilings: copy ")
    assert "2 steps with a cache of 64 tokens" in done.out
    assert "q_proj" in done.out
    only = call("bench", tiny, *QUICK, "--no-generation", "--batch-sizes", "2").out
    assert "decode" not in only
    assert "lm_head" in only


def test_what_cannot_be_timed_is_refused(call, tiny):
    assert "--batch-sizes '1;8': give" in call("bench", tiny, "--batch-sizes", "1;8").refusal
    assert "--batch-sizes '0': give" in call("bench", tiny, "--batch-sizes", "0").refusal
    nothing = ("--no-generation", "--no-linears")
    assert "nothing to time" in call("bench", tiny, *nothing).refusal
    assert "leaves 0 of the model's 32 positions" in call("bench", tiny).err
