"""The frozen spec: equal ones have equal hashes, and what differs is named."""

import copy
import dataclasses

import pytest

from jq.compare.spec import ComparisonSpec, device_facts, differences, model_digest, versions
from jq.errors import ModelError, OutputError
from tests.jq.compare.made_up import SPEC

PLACES = [(part, key) for part, value in SPEC.items() if isinstance(value, dict) for key in value]


def spec(**changes):
    return ComparisonSpec(**{**copy.deepcopy(SPEC), **changes})


def test_the_order_of_keys_does_not_matter():
    turned = {k: dict(reversed(v.items())) for k, v in SPEC.items() if isinstance(v, dict)}
    assert spec(**turned).hash == spec().hash
    assert len(spec().hash) == 64


@pytest.mark.parametrize(("part", "key"), PLACES, ids=lambda x: str(x))
def test_every_value_counts(part, key):
    changed = spec(**{part: {**SPEC[part], key: "something else"}})
    assert changed.hash != spec().hash
    with pytest.raises(OutputError, match=rf"{part}\.{key} was .*, is \"something else\""):
        changed.check_same(spec().to_dict(), "out")


def test_a_spec_agrees_with_itself_after_json():
    spec().check_same(spec().to_dict(), "out")


def test_many_differences_are_counted():
    with pytest.raises(OutputError, match=r"and \d+ more\. Choose another folder"):
        spec().check_same({}, "out")


def test_differences_name_what_came_and_what_went():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "d": 3}}) == [
        "a.d was null, is 3",
        "c was 2, is null",
    ]
    assert differences([1, 2], [1, 2]) == []


def test_digests_follow_names_and_contents(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    (tmp_path / "notes.md").write_text("of no account")
    first = model_digest(tmp_path)
    seen = []
    assert model_digest(tmp_path, lambda *step: seen.append(step)) == first
    assert seen[-1] == (6, 6, "a.safetensors")
    (tmp_path / "notes.md").write_text("other")
    assert model_digest(tmp_path) == first
    (tmp_path / "a.safetensors").write_bytes(b"1235")
    assert model_digest(tmp_path) != first
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert model_digest(tmp_path)["sha256"] != first["sha256"]


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        model_digest(tmp_path)


def test_facts_of_this_machine():
    facts = device_facts()
    assert facts["platform"] == "cpu"
    assert facts["cores"] >= 1
    assert facts["kind"]
    assert set(versions()) == {"jaxq", "jax", "jaxlib", "numpy", "python"}
    assert dataclasses.replace(spec(), versions=versions()).hash != spec().hash
