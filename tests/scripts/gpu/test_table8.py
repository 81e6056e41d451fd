"""The 8-bit table's arithmetic, on numbers made up."""

import json

import pytest

from jq.pallas_kernels import tuning8
from scripts.gpu import table, table8, tune8
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.goals import ideal_us
from scripts.gpu.problems8 import FP8, Problem8
from scripts.gpu_check import SECTIONS, learn, unwanted


def result(method, m, us, dtype="int8", k=4096, n=28672, **more):
    size = {"k": k, "n": n, "m": m, "dtype": dtype, "block": False}
    return {"method": method, **size, "us": us, "us_wall": us, "rms": 1.2, **more}


def of_bf16(m, us):
    return {"method": "bf16", "k": 4096, "n": 28672, "m": m, "us": us, "rms": 1.0}


FACTS = {"copy_gbs": 4000.0, "bf16_tflops": 700.0, "bf16_us": {"4096x28672 m16": 60.0}}
DATA = {
    "facts": FACTS,
    "sections": {
        "benchmark8": {
            "status": "done",
            "results": {
                "a": result("kernel", 16, 35.0),
                "b": result("xla", 16, 70.0),
                "c": result("kernel", 4096, 700.0, FP8),
                "d": result("xla", 4096, 800.0, FP8),
                "e": result("scaled_matmul", 4096, 750.0, FP8),
                "f": result("rows", 4096, 35.0, FP8),
                "g": of_bf16(4096, 1260.0),
                "h": result("kernel", 1, 1.0, rms=0.01),
            },
            "errors": {},
            "not_run": [],
            "problems": [],
        },
        "correctness8": {
            "status": "done",
            "results": {"p": {"ok": True}, "q": {"ok": False, "error": 0.4}},
            "errors": {},
            "not_run": [],
            "problems": [],
        },
    },
}


def test_bytes_and_ideal_times():
    p = Problem8(16, 4096, 14336)
    codes, scales = 4096 * (14336 + 16), 4 * (14336 + 16)
    assert p.moved_bytes() == codes + scales + 2 * 16 * 14336
    assert ideal_us(p, FACTS, table8.SPEED) == pytest.approx(p.moved_bytes() / 4e6)
    many = Problem8(4096, 4096, 14336)
    assert ideal_us(many, FACTS, table8.SPEED) == pytest.approx(many.flops / 1400e6)
    assert ideal_us(p, {"copy_gbs": 4000.0}) is None


def test_rows_join_the_methods():
    found = {(r["m"], r["format"]): r for r in table8.rows(DATA)}
    assert set(found) == {(16, "int8"), (4096, "fp8")}  # implausible results are left out
    few, many = found[16, "int8"], found[4096, "fp8"]
    assert few["gbs"] == pytest.approx(Problem8(16, 4096, 28672).moved_bytes() / 35e3)
    assert (few["vs_bf16"], few["vs_xla"]) == (pytest.approx(60 / 35), 2.0)
    assert few["rows_share"] is None
    assert many["vs_bf16"] == pytest.approx(1.8)
    assert many["vs_xla"] == pytest.approx(750 / 700)  # the faster of XLA's two
    assert many["rows_share"] == pytest.approx(0.05)
    assert many["tflops"] == pytest.approx(2 * 4096 * 4096 * 28672 / 700e6)


def test_goals():
    told = {(g["goal"], g["place"]): g for g in table8.goals(table8.rows(DATA), DATA)}
    few, many = "4096x28672 m16 int8", "4096x28672 m4096 fp8"
    bandwidth = told["8-bit copy bandwidth", few]
    assert bandwidth["met"] is (bandwidth["got"] >= 0.8)
    assert told["8-bit speedup over bf16", many]["met"] is True
    assert told["8-bit speedup over XLA's 8-bit", many]["met"] is True
    assert told["float8 TFLOP/s", many]["met"] is (told["float8 TFLOP/s", many]["got"] >= 1350)
    assert told["quantization within a tenth", many]["got"] == pytest.approx(2.0)
    assert told["correct 8-bit variants", "everywhere"]["got"] == 0.5
    assert len(told) == 6


def test_goals_of_whole_models():
    results = {
        "w4 loop batch 1": {"step_ms": 3.0, "tokens_per_s": 330.0},
        "bf16 loop batch 1": {"step_ms": 8.0, "tokens_per_s": 110.0},
        "int8 loop batch 1": {"step_ms": 6.0, "tokens_per_s": 165.0},
    }
    data = {"facts": {}, "sections": {"decode": {"results": results}}}
    told = {g["place"]: (g["got"], g["met"]) for g in table8.goals([], data)}
    assert told["w4 batch 1"] == (3.0, True)
    assert told["int8 batch 1"] == (1.5, False)
    assert told["fp8 batch 1"] == (None, None)


def test_the_text_has_both_tables():
    text = table.text(DATA)
    assert "WRONG q" in text
    assert "correct, 8 bits: 1 of 2" in text
    assert "goal float8 TFLOP/s" in text
    assert "rows_share" in text


def test_the_best_of_what_was_tried():
    def tried(us, rms=1.2, split=1):
        config = config_json(config_of({"kind": "decode8", "split": split}))
        told = result("kernel", 16, us, k=4096, n=4096, rms=rms)
        return {**told, "problem": "p", "config": config}

    facts = {}
    learn("tune8", {"a": tried(5.0), "b": tried(4.0, split=2), "c": tried(1.0, rms=0.1)}, facts)
    entry = facts["tuned8"]["p"]
    assert (entry["us"], entry["of"]) == (4.0, 2)
    json.dumps(facts)
    fmt = (4096, 4096, 16, "int8", False)
    for xla in ({}, {fmt: 4.5}):
        (row,) = tune8.table_rows(facts["tuned8"], xla)
        (config,) = tuning8.table([row]).values()
        assert config == config_of(entry["config"])
    (row,) = tune8.table_rows(facts["tuned8"], {fmt: 3.5})
    assert tuple(tuning8.table([row]).values()) == (None,)
    (key,) = tuning8.table([row])
    assert (key.dtype, key.block, key.bucket) == ("int8", None, 16)
    (shown,) = table8.rows({"facts": facts, "sections": {}})
    assert (shown["us"], shown["us_best"]) == (None, 4.0)


def test_times_of_xla_are_those_of_the_benchmark():
    assert table8.xla_times(DATA) == {
        (4096, 28672, 16, "int8", False): 70.0,
        (4096, 28672, 4096, FP8, False): 800.0,
    }
    assert table8.xla_times({"sections": {}}) == {}


def test_bfloat16_is_learned_from_the_benchmark_before():
    facts = {}
    learn("benchmark", {"x": of_bf16(16, 60.0), "y": of_bf16(16, 9.0) | {"method": "w4"}}, facts)
    assert facts == {"bf16_us": {"4096x28672 m16": 60.0}}
    names = [s.name for s in SECTIONS]
    assert names.index("benchmark") < names.index("benchmark8") < names.index("tune8")
    section = next(s for s in SECTIONS if s.name == "benchmark8")
    assert unwanted(section, {"gpu": True}) is None
    assert unwanted(section, {"gpu": False})
