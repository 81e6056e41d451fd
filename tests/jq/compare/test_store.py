"""The folder of a comparison: what is reused, and what is refused."""

import json

import numpy as np
import pytest

from jq.calib.tokens import CalibrationData
from jq.compare.arms import find_arms
from jq.compare.store import Store, load_tokens, write_json, write_text
from jq.errors import OutputError
from tests.jq.compare import made_up
from tests.jq.compare.test_spec import spec

ORIGINAL, AWQ, RTN = find_arms(["awq", "rtn"], made_up.NUMBERS)


def test_a_result_comes_back(tmp_path):
    store = Store(tmp_path / "out", spec())
    assert store.result(AWQ) is None
    written = store.write_result(AWQ, made_up.done())
    again = Store(tmp_path / "out", spec())
    assert again.result(AWQ) == json.loads(json.dumps(written))
    assert again.result(RTN) is None
    assert {p.name for p in (tmp_path / "out" / "arms").iterdir()} == {"awq.json"}


def test_a_failed_arm_is_tried_again(tmp_path):
    store = Store(tmp_path, spec())
    store.write_result(AWQ, made_up.failed())
    assert store.result(AWQ) is None


def test_what_was_made_counts_while_its_checkpoint_is_there(tmp_path):
    store = Store(tmp_path, spec())
    store.write_made(AWQ, {"seconds": 1.0})
    assert store.made(AWQ) is None
    store.checkpoint(AWQ).mkdir()
    assert store.made(AWQ) == {"seconds": 1.0}
    store.discard(AWQ)
    assert store.made(AWQ) is None


def test_another_spec_is_refused(tmp_path):
    Store(tmp_path, spec())
    other = spec(evaluation={**made_up.SPEC["evaluation"], "seq_len": 64})
    with pytest.raises(OutputError, match=r"evaluation\.seq_len was 32, is 64"):
        Store(tmp_path, other)
    Store(tmp_path, spec())


def test_a_spec_changed_by_hand_is_refused(tmp_path):
    Store(tmp_path, spec())
    known = json.loads((tmp_path / "spec.json").read_text())
    write_json(tmp_path / "spec.json", known | {"hash": "0" * 64})
    with pytest.raises(OutputError, match="changed by hand"):
        Store(tmp_path, spec())


@pytest.mark.parametrize("key", ["spec_hash", "arm_hash", "format"])
def test_results_made_differently_are_not_merged(tmp_path, key):
    store = Store(tmp_path, spec())
    result = store.write_result(AWQ, made_up.done())
    write_json(tmp_path / "arms" / "awq.json", result | {key: "0" * 64})
    with pytest.raises(OutputError, match=rf"awq\.json has {key} 000000000000, .*not merged"):
        store.result(AWQ)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds no comparison"):
        Store(tmp_path, spec())
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_damaged_files_are_refused(tmp_path, content):
    store = Store(tmp_path, spec())
    (tmp_path / "arms" / "awq.json").write_text(content)
    with pytest.raises(OutputError, match="is damaged"):
        store.result(AWQ)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("masked", [True, False])
def test_tokens_come_back(tmp_path, masked):
    store = Store(tmp_path, spec())
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    mask = tokens < 6 if masked else None
    store.write_tokens(CalibrationData(tokens, mask, {}), tokens + 1)
    arrays = load_tokens(tmp_path)
    np.testing.assert_array_equal(arrays["calibration"], tokens)
    np.testing.assert_array_equal(arrays["evaluation"], tokens + 1)
    assert ("mask" in arrays) == masked
    assert arrays["calibration"].dtype == np.int32
