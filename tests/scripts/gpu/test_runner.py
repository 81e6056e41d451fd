"""The runner keeps what was found, whatever the items do."""

import json
import time

import pytest

from scripts.gpu import worker
from scripts.gpu.runner import Results, Section, run
from tests.scripts.gpu import fakes


@pytest.fixture
def go(tmp_path):
    """Run fake sections; returns the JSON that was written."""

    def go(keys, *, sections=1, budget=60.0, resume=None, unwanted=None, **options):
        options = {"stall_s": 20.0, **options}
        made = [
            Section(f"s{i}", "tests.scripts.gpu.fakes", 1.0, **options) for i in range(sections)
        ]
        results = Results(tmp_path / "r.json", {"name": "test"})
        if resume is not None:
            results.take_over(resume)
        results.data["facts"] |= keys if isinstance(keys, dict) else {"keys": keys}

        def learn(name, found, facts):
            facts.setdefault("learned", []).append([name, len(found)])

        run(made, results, budget, learn, unwanted or (lambda s, f: None), lambda line: None)
        return json.loads((tmp_path / "r.json").read_text())

    return go


def test_every_end_of_an_item_costs_that_item_alone(go):
    keys = ["ok 2", "raises 0", "ok 3", "crashes 0", "ok 4", "hangs 0", "ok 5"]
    data = go(keys, stall_s=2.0)
    section = data["sections"]["s0"]
    assert {k: r["square"] for k, r in section["results"].items()} == {
        "ok 2": 4,
        "ok 3": 9,
        "ok 4": 16,
        "ok 5": 25,
    }
    errors = section["errors"]
    assert set(errors) == {"raises 0", "crashes 0", "hangs 0"}
    assert "wrong shape" in errors["raises 0"]["error"]
    assert "fakes.py" in errors["raises 0"]["traceback"]
    assert "code 7" in errors["crashes 0"]["error"]
    assert "illegal address" in errors["crashes 0"]["traceback"]
    assert "silent" in errors["hangs 0"]["error"]
    assert (section["status"], section["not_run"]) == ("done", [])
    assert data["facts"]["learned"] == [["s0", 4]]


def test_time_is_shared_and_what_is_left_passes_on(go):
    """Two sections of equal share; the first takes all of its half."""
    start = time.time()
    data = go([f"slow {i}" for i in range(40)], sections=2, budget=8.0)
    assert time.time() - start < 10
    first, second = (data["sections"][name] for name in ("s0", "s1"))
    assert first["status"] == second["status"] == "out of time"
    assert 2 <= len(first["results"]) <= 7
    assert len(first["results"]) + len(first["not_run"]) == 40
    assert first["errors"] == {}
    short = go(["ok 1"], sections=2, budget=8.0)
    assert {s["status"] for s in short["sections"].values()} == {"done"}


def test_an_item_cut_by_the_deadline_is_not_to_blame(go, monkeypatch):
    monkeypatch.setattr("scripts.gpu.runner._GRACE_S", 0.5)
    section = go(["ok 1", "hangs 1", "ok 2"], budget=2.5)["sections"]["s0"]
    assert section["errors"] == {}
    assert section["not_run"] == ["hangs 1", "ok 2"]
    assert section["status"] == "out of time"


def test_a_second_run_goes_on_where_the_first_ended(go):
    keys = ["ok 1", "raises 0", "ok 2"]
    first = go(keys)
    again = go([*keys, "ok 3"], resume=first)["sections"]["s0"]
    assert again["results"]["ok 1"] == first["sections"]["s0"]["results"]["ok 1"]  # same process id
    assert set(again["results"]) == {"ok 1", "ok 2", "ok 3"}
    assert set(again["errors"]) == {"raises 0"}  # errors are tried again


def test_results_of_sections_that_are_not_run_again_stay(go):
    first = go(["ok 1"], sections=2)
    again = go(["ok 1"], sections=1, resume=first)
    assert again["sections"]["s1"]["results"] == first["sections"]["s1"]["results"]
    assert again["sections"]["s1"]["status"] == "of an earlier run"


@pytest.mark.parametrize(("plan", "said"), [("broken", "no plan"), ("dies", "code 9")])
def test_a_section_that_cannot_start_is_given_up(go, plan, said):
    data = go({"plan": plan}, sections=2)
    for section in data["sections"].values():
        assert section["status"] == "failed"
        assert any(said in problem for problem in section["problems"])
        assert "given up" in section["problems"][-1]


def test_several_workers_share_the_items(go):
    keys = [f"slow {i}" for i in range(6)] + ["crashes 0"] + [f"ok {i}" for i in range(9)]
    section = go(keys, workers=3)["sections"]["s0"]
    assert section["status"] == "done"
    assert len(section["results"]) == 15
    assert set(section["errors"]) == {"crashes 0"}
    assert len({r["worker"] for r in section["results"].values()}) >= 3


def test_sections_may_be_skipped(go):
    def unwanted(section, facts):
        return "not today" if section.name == "s0" else None

    sections = go(["ok 1"], sections=2, unwanted=unwanted)["sections"]
    assert sections["s0"]["status"] == "skipped: not today"
    assert sections["s1"]["status"] == "done"


def test_results_are_written_while_a_section_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.gpu.runner._FLUSH_S", 0.0)
    results = Results(tmp_path / "r.json", {})
    results.data["facts"]["keys"] = ["ok 1", "slow 2", "slow 3"]
    seen = []
    flush = Results.flush

    def watched(self, *, now=True):
        flush(self, now=now)
        seen.append(len(json.loads(self.path.read_text())["sections"]["s"]["results"]))

    monkeypatch.setattr(Results, "flush", watched)
    section = Section("s", "tests.scripts.gpu.fakes", 1.0)
    run([section], results, 30.0, lambda *_: None, lambda *_: None, lambda line: None)
    assert {1, 2, 3} <= set(seen)


def test_what_learning_raises_is_written_down(tmp_path):
    results = Results(tmp_path / "r.json", {})
    results.data["facts"]["keys"] = ["ok 1"]
    section = Section("s", "tests.scripts.gpu.fakes", 1.0)
    run([section], results, 30.0, lambda *_: 1 / 0, lambda *_: None, lambda line: None)
    assert "ZeroDivisionError" in results.section("s")["problems"][0]


def test_repeated_keys_are_refused(tmp_path):
    journal = worker.Journal(tmp_path / "j")
    assert worker.work(fakes, {"keys": ["ok 1", "ok 1"]}, journal, time.time() + 9, (0, 1)) == 1
    assert "repeat" in json.loads((tmp_path / "j").read_text())["traceback"]


def test_a_worker_ends_where_its_device_does(tmp_path, monkeypatch):
    """After a fault every further item would fail: the rest is left to a fresh process."""
    monkeypatch.setattr(worker, "healthy", lambda: False)
    journal = worker.Journal(tmp_path / "j")
    keys = {"keys": ["ok 1", "raises 0", "ok 2"]}
    assert worker.work(fakes, keys, journal, time.time() + 9, (0, 1)) == worker.UNHEALTHY
    events = [json.loads(line)["event"] for line in (tmp_path / "j").read_text().splitlines()]
    assert events == ["plan", "start", "done", "start", "error"]


def test_this_device_is_healthy():
    assert worker.healthy()
