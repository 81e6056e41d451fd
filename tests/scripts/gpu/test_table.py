"""The table's arithmetic, on numbers made up."""

import copy
import json

import pytest

from jq.pallas_kernels import tuning
from scripts.gpu import table, tune
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.goals import ideal_us
from scripts.gpu.problems import Problem
from scripts.gpu_check import SECTIONS, learn, unwanted


def result(method, k, n, m, us, **more):
    return {"method": method, "k": k, "n": n, "m": m, "us": us, "us_wall": us, "rms": 1.2, **more}


FACTS = {"copy_gbs": 4000.0, "bf16_tflops": 700.0, "device": "NVIDIA H200", "timer": "cupti"}
DATA = {
    "facts": FACTS,
    "sections": {
        "benchmark": {
            "status": "done",
            "results": {
                "a": result("w4", 4096, 14336, 16, 9.0),
                "b": result("bf16", 4096, 14336, 16, 31.5),
                "c": result("dequantize", 4096, 14336, 16, 90.0),
                "d": result("w4", 4096, 4096, 4096, 300.0),
                "e": result("bf16", 4096, 4096, 4096, 200.0),
                "f": result("w4", 4096, 4096, 1, 1.0, rms=0.01) | {"rms": 0.01},
            },
            "errors": {},
            "not_run": [],
            "problems": [],
        },
        "marlin": {
            "status": "done",
            "results": {"build": {"built": True}, "x": result("", 4096, 14336, 16, 10.0)},
            "errors": {},
            "not_run": [],
            "problems": [],
        },
        "correctness": {
            "status": "done",
            "results": {"p": {"ok": True, "error": 1e-3}, "q": {"ok": False, "error": 0.4}},
            "errors": {"r": {"error": "boom", "traceback": ""}},
            "not_run": [],
            "problems": [],
        },
    },
}


def test_bytes_and_ideal_times():
    p = Problem(16, 4096, 14336)
    codes, scales = 4096 * 14336 / 2, 32 * 14336 * 2
    assert p.moved_bytes() == codes + scales + 2 * 16 * (4096 + 14336)
    assert Problem(16, 4096, 14336, 128, False).moved_bytes() == p.moved_bytes() + scales / 4
    assert ideal_us(p, FACTS) == pytest.approx(p.moved_bytes() / 4e6)
    many = Problem(4096, 4096, 14336)
    assert ideal_us(many, FACTS) == pytest.approx(many.flops / 700e6)
    assert ideal_us(p, {"copy_gbs": 4000.0}) is None


def test_rows_join_the_methods():
    found = {(r["k"], r["n"], r["m"]): r for r in table.rows(DATA)}
    assert set(found) == {(4096, 14336, 16), (4096, 4096, 4096)}  # implausible results are left out
    row = found[4096, 14336, 16]
    p = Problem(16, 4096, 14336)
    assert row["gbs"] == pytest.approx(p.moved_bytes() / 9e3)
    assert row["copy_fraction"] == pytest.approx(row["gbs"] / 4000)
    assert row["tflops"] == pytest.approx(p.flops / 9e6)
    assert row["fraction"] == pytest.approx(row["us_ideal"] / 9)
    assert (row["vs_bf16"], row["vs_dequantize"]) == (3.5, 10.0)
    assert row["vs_marlin"] == pytest.approx(10 / 9)


def test_tuned_configs_count_where_they_are_faster():
    data = copy.deepcopy(DATA)
    data["facts"]["tuned"] = {
        "x": {"k": 4096, "n": 14336, "m": 16, "us": 8.0, "config": {"kind": "decode"}},
        "y": {"k": 4096, "n": 4096, "m": 4096, "us": 400.0, "config": {}},
        "z": {"k": 8192, "n": 8192, "m": 1, "us": 10.0, "config": {}},
    }
    found = {(r["k"], r["n"], r["m"]): r for r in table.rows(data)}
    assert found[4096, 14336, 16]["us_best"] == 8.0
    assert found[4096, 4096, 4096]["us_best"] == 300.0
    assert found[8192, 8192, 1]["us"] is None
    assert found[8192, 8192, 1]["vs_bf16"] is None


def test_goals():
    told = {(g["goal"], g["place"]): g for g in table.goals(table.rows(DATA), DATA)}
    decode, prefill = "4096x14336 m16", "4096x4096 m4096"
    bandwidth = told["copy bandwidth", decode]
    assert bandwidth["met"] == (bandwidth["got"] >= 0.85)
    assert told["speedup over bf16", decode]["met"] is True
    assert told["not slower than both", decode]["met"] is True
    assert told["speedup over bf16", prefill]["met"] is False
    # Slower than bfloat16, and the other way was not measured: not known.
    assert told["not slower than both", prefill]["met"] is None
    assert told["correct variants", "everywhere"]["got"] == pytest.approx(1 / 3)


def test_the_text_names_what_is_wrong():
    text = table.text(DATA)
    assert "NVIDIA H200" in text
    assert "WRONG q" in text
    assert "FAILED r: boom" in text
    assert "[benchmark] done: 6 done" in text
    assert table.text({"facts": {}, "sections": {}}).strip()


def test_the_best_of_what_was_tried():
    def tried(us, rms=1.2, stages=4):
        config = config_json(config_of({"kind": "decode", "stages": stages}))
        return {**result("w4", 64, 64, 1, us, rms=rms), "problem": "p", "config": config}

    best = tune.best([tried(5.0), tried(3.0, stages=3), tried(1.0, rms=0.1)])
    assert (best["p"]["us"], best["p"]["of"]) == (3.0, 2)
    config = config_of(best["p"]["config"])
    assert config is not None
    assert config.stages == 3
    facts = {}
    learn("tune", {"a": tried(5.0)}, facts)
    learn("refine", {"b": tried(6.0), "c": tried(4.0)}, facts)
    assert facts["tuned"]["p"]["us"] == 4.0
    json.dumps(facts)
    size = (64, 64, 1)
    for xla in ({}, {size: 4.5}):
        (row,) = tune.table_rows(facts["tuned"], xla)
        (config,) = tuning.table([row]).values()
        assert config == config_of(facts["tuned"]["p"]["config"])
    (row,) = tune.table_rows(facts["tuned"], {size: 3.5})
    assert tuple(tuning.table([row]).values()) == (None,)


def test_times_of_xla_are_those_of_the_benchmark():
    times = table.dequantize_times(DATA)
    assert times
    benchmark = DATA["sections"]["benchmark"]["results"].values()
    assert set(times.values()) <= {r["us"] for r in benchmark if r["method"] == "dequantize"}
    assert table.dequantize_times({"sections": {}}) == {}


def test_what_is_learned_of_the_machine():
    facts = {}
    device = {"platform": "gpu", "capability": "9.0", "kind": "NVIDIA H200"}
    learn("environment", {"device": device, "cupti": {"works": True}}, facts)
    learn("ceilings", {"copy": {"gbs": 4000.0}, "launch": {"us": 2.0}}, facts)
    assert facts == {
        "device": "NVIDIA H200",
        "gpu": True,
        "hopper": True,
        "timer": "cupti",
        "copy_gbs": 4000.0,
        "launch_us": 2.0,
    }
    by_name = {s.name: s for s in SECTIONS}
    assert unwanted(by_name["tune"], facts) is None
    assert "Marlin" in str(unwanted(by_name["marlin"], facts))
    assert unwanted(by_name["compile"], facts)
    other = {}
    learn("environment", {"device": {**device, "capability": "7.5"}}, other)
    assert (other["gpu"], other["timer"]) == (False, "wall")
    assert unwanted(by_name["tune"], other)
    assert unwanted(by_name["compile"], other) is None
    assert unwanted(by_name["environment"], other) is None
    ada = {}
    learn("environment", {"device": {**device, "capability": "8.9"}}, ada)
    assert unwanted(by_name["correctness8"], ada) is None
    assert "tile sizes are for compute capability 9.0" in str(unwanted(by_name["tune8"], ada))
