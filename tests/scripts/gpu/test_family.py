"""On Ampere and Ada the check of GPUs runs other kernels, and asks for no float8 where none is."""

import json

import pytest

from jq.pallas_kernels.ampere.config import SHARED_MEMORY, W4Config, W8Config
from jq.pallas_kernels.capability import HOPPER, told
from scripts.gpu import benchmark8, candidates, candidates8, correctness, correctness8, family
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.problems8 import FP8


@pytest.fixture(params=[(8, 0), (8, 6), (8, 9)])
def capability(request, monkeypatch):
    monkeypatch.setattr(family, "here", lambda: request.param)
    return request.param


def test_capabilities_as_devices_spell_them():
    assert told("8.6") == (8, 6)
    assert told("gfx942") is None
    assert told(None) is None
    # The tests run on CPUs.
    assert family.here() == HOPPER
    assert not family.ampere()


def test_every_config_is_tried_that_fits(capability):
    four, eight = list(candidates.every_config()), list(candidates8.every_config())
    assert {type(config) for _, config in four} == {W4Config}
    assert {type(config) for _, config in eight} == {W8Config}
    for _, config in (*four, *eight):
        assert config.shared_bytes() <= SHARED_MEMORY[capability]
    assert {p.symmetric for p, _ in four} == {True, False}
    assert {p.block for p, _ in eight} == {True, False}


def test_float8_is_asked_for_where_it_is(capability):
    for section in (correctness8, benchmark8):
        items = section.items({})
        assert items
        assert any(family._float8(item) for item in items) == (capability == (8, 9))
    assert any(item.get("problem8", {}).get("dtype") == "int8" for item in items)
    assert correctness.items({})
    assert family._float8({"rows": [1, 4096, FP8, None]})


def test_configs_as_json(capability):
    four, eight = W4Config(32, 1, 2, 3, split=2), W8Config(64, 128, 2, 3)
    assert config_of(json.loads(json.dumps(config_json(four)))) == four
    assert config_of(json.loads(json.dumps(config_json(eight)))) == eight
