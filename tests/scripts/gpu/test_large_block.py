"""The parts of the large block at a tiny shape, and the sum that is made of them."""

import json

import pytest

from scripts.gpu import large_block
from scripts.gpu_check import SECTIONS, unwanted

pytestmark = pytest.mark.loose_promotion  # on the GPU machine it runs under JAX's own rules
PARTS = {"transfer", "statistics", "factor", "forward", "solve", "report"}


def test_items_are_json_and_the_largest_come_last():
    for facts in ({}, {"gpu": True}):
        items = large_block.items(facts)
        keys = [item["key"] for item in items]
        assert len(set(keys)) == len(keys) == 1 + 2 * 2 + 3 * 4
        assert json.loads(json.dumps(items)) == items
        assert {item["part"] for item in items} == PARTS
        assert items[0]["hidden"] == (12288 if facts else 64)
        assert keys[-1] == "report fc2"


def test_the_section_runs_without_a_gpu():
    (section,) = (s for s in SECTIONS if s.name == "large_block")
    assert section.module == large_block.__name__
    assert unwanted(section, {}) is None


def test_every_part_runs_and_the_block_is_their_sum():
    found = {item["key"]: large_block.run(item, {}) for item in large_block.items({})}
    assert all(result["s"] > 0 for key, result in found.items() if key != "transfer")
    assert not found["factor 256"]["failed"]
    told = found["report fc1"]
    assert 0 < told["output_error"] < told["rtn_output_error"] < 0.2
    seconds = large_block.extrapolate(found, 64)
    assert seconds is not None
    assert seconds.keys() == PARTS | {"block", "model"}
    assert seconds["block"] == pytest.approx(sum(seconds[part] for part in PARTS))
    assert seconds["model"] == 96 * seconds["block"]


def test_by_hand():
    found = {"transfer": {"gbs_there": 50.0, "gbs_back": 25.0}}
    for k in (12288, 49152):
        found[f"statistics {k}"], found[f"factor {k}"] = {"s": 1.0}, {"s": 2.0}
    for name in large_block.LINEARS:
        found[f"forward {name}"], found[f"solve {name}"] = {"s": 0.5}, {"s": 3.0}
        found[f"report {name}"] = {"s": 4.0}
    seconds = large_block.extrapolate(found)
    assert seconds is not None
    assert (seconds["statistics"], seconds["factor"]) == (4.0, 8.0)
    assert (seconds["forward"], seconds["solve"], seconds["report"]) == (2.0, 12.0, 4.0)
    # (2 + 2 + 2 + 5) x 12288 numbers of 16 bits for each token, both ways
    assert seconds["transfer"] == pytest.approx(262144 * 11 * 12288 * 2 * (1 / 50e9 + 1 / 25e9))
    told = large_block.text({"sections": {"large_block": {"results": found}}})
    assert "96 blocks: 0.91 h" in told
    assert large_block.text({"sections": {}}) == ""
    del found["solve fc2"]
    assert large_block.extrapolate(found) is None
