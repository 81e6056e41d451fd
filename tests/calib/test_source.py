"""From files, names and arrays to calibration data and streams."""

import io
import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from jq.calib import CalibrationConfig, calibration_data, calibration_from_tokens, token_stream
from jq.errors import CalibrationError

VOCAB = 256


def encode(text):
    """Bytes as tokens."""
    return list(text.encode())


def config(source="unused", **knobs):
    return CalibrationConfig(str(source), **{"calib_samples": 4, "calib_seqlen": 8, **knobs})


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(f"word {i} " for i in range(200)))
    return path


def test_defaults_are_those_of_lmdeploy():
    knobs = CalibrationConfig()
    assert (knobs.calib_dataset, knobs.calib_samples) == ("wikitext2", 128)
    assert (knobs.calib_seqlen, knobs.batch_size) == (2048, 1)


@pytest.mark.parametrize("name", ["calib_samples", "calib_seqlen", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(name, value):
    with pytest.raises(CalibrationError, match=f"{name} is {value}"):
        CalibrationConfig(**{name: value})


def test_a_negative_seed_is_refused():
    with pytest.raises(CalibrationError, match="seed is -1"):
        CalibrationConfig(seed=-1)


def test_text(text_file):
    data = calibration_data(config(text_file, seed=5), encode=encode, vocab_size=VOCAB)
    content = text_file.read_text()
    starts = np.random.default_rng(5).integers(0, len(content) - 7, 4)
    want = [encode(content[start : start + 8]) for start in starts]
    assert data.tokens.tolist() == want
    assert (data.tokens.dtype, data.mask, data.warnings) == (np.int32, None, ())


def test_the_description_is_json_and_names_no_folder(text_file, tmp_path):
    data = calibration_data(config(text_file), encode=encode, vocab_size=VOCAB)
    description = json.loads(json.dumps(data.description))
    assert description.pop("sha256") != ""
    assert description == {
        "source": "words.txt",
        "calib_samples": 4,
        "calib_seqlen": 8,
        "seed": 0,
        "samples": 4,
        "seq_len": 8,
        "tokens": 32,
    }


def test_the_digest_is_that_of_the_tokens(text_file):
    def sha(**knobs):
        data = calibration_data(config(text_file, **knobs), encode=encode, vocab_size=VOCAB)
        return data.description["sha256"]

    assert sha() == sha(batch_size=4)
    assert len({sha(), sha(seed=1), sha(calib_samples=3), sha(calib_seqlen=9)}) == 4


def test_npy_stream_is_as_text(text_file, tmp_path):
    np.save(tmp_path / "ids.npy", np.array(encode(text_file.read_text()), np.uint16))
    from_ids = calibration_data(config(tmp_path / "ids.npy"), vocab_size=VOCAB)
    from_text = calibration_data(config(text_file), encode=encode, vocab_size=VOCAB)
    assert (from_ids.tokens == from_text.tokens).all()
    assert from_ids.description["sha256"] == from_text.description["sha256"]


def test_npy_samples(tmp_path):
    rows = np.arange(40).reshape(5, 8)
    np.save(tmp_path / "ids.npy", rows)
    data = calibration_data(config(tmp_path / "ids.npy", calib_samples=5), vocab_size=VOCAB)
    assert (data.tokens == rows).all()
    data = calibration_data(config(tmp_path / "ids.npy", calib_samples=9), vocab_size=VOCAB)
    assert "5 calibration samples instead of 9" in data.warnings[0]


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("wrap", ["object array", "bare pickle"])
def test_npy_is_never_unpickled(tmp_path, wrap):
    canary, path = tmp_path / "canary", tmp_path / "ids.npy"
    if wrap == "object array":
        np.save(path, np.array([Canary(canary)], object), allow_pickle=True)
        np.load(path, allow_pickle=True)
        canary.rmdir()  # the bait works
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CalibrationError, match=r"ids\.npy cannot be read as a \.npy file"):
        calibration_data(config(path), vocab_size=VOCAB)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(50, np.float32), "float32"),
        (np.zeros((2, 3, 4), np.int32), r"\(2, 3, 4\)"),
        (np.zeros((0, 8), np.int32), "no tokens"),
        (np.zeros(50, [("a", "i4")]), "dtype"),
        (np.full(50, VOCAB), "id 256 at 0 is outside"),
    ],
)
def test_bad_npy(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(CalibrationError, match=message):
        calibration_data(config(tmp_path / "ids.npy"), vocab_size=VOCAB)


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zip_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, ids=np.arange(50))
    return buffer.getvalue()


GOOD_NPY = npy_bytes(np.arange(50))


@pytest.mark.parametrize(
    "content",
    [
        GOOD_NPY[:-9],
        GOOD_NPY.replace(b"(50,), }" + b" " * 14, b"(800000000000000,), }" + b" "),
        GOOD_NPY.replace(b"}", b" "),
        GOOD_NPY.replace(b"NUMPY", b"BUMPY"),
        zip_bytes(),
        b"",
    ],
    ids=["truncated", "petabytes", "broken header", "magic", "zip", "empty"],
)
def test_malformed_npy(tmp_path, content):
    assert content != GOOD_NPY
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"ids\.npy cannot be read as a \.npy file"):
        calibration_data(config(path), vocab_size=VOCAB)


def test_missing_npy(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist"):
        calibration_data(config(tmp_path / "ids.npy"), vocab_size=VOCAB)


def test_a_text_shorter_than_a_window_is_padded(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    data = calibration_data(config(tmp_path / "a.txt"), encode=encode, vocab_size=VOCAB)
    assert data.tokens.tolist() == [[*b"abc", 0, 0, 0, 0, 0]]
    assert data.mask.tolist() == [[True] * 3 + [False] * 5]
    assert (data.num_tokens, data.description["tokens"], len(data.warnings)) == (3, 3, 2)


def test_a_foreign_tokenizer_is_noticed(text_file):
    with pytest.raises(CalibrationError, match=r"words\.txt: token id .* vocabulary of 100"):
        calibration_data(config(text_file), encode=encode, vocab_size=100)


def test_text_without_a_tokenizer(text_file):
    with pytest.raises(CalibrationError, match="no tokenizer"):
        calibration_data(config(text_file), vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("result", "message"), [([], "no tokens"), ([0.5], "float64"), ([[1, 2]], r"\(1, 2\)")]
)
def test_a_tokenizer_that_returns_no_ids(text_file, result, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_data(config(text_file), encode=lambda text: result, vocab_size=VOCAB)


def test_large_datasets_are_read_as_far_as_needed(monkeypatch):
    seen = {}

    def read_text(source, **kwargs):
        seen.update(kwargs)
        return "x" * 100

    monkeypatch.setattr("jq.calib.text.read_text", read_text)
    calibration_data(config("org/set"), encode=encode, vocab_size=VOCAB)
    assert (seen["max_chars"], seen["evaluation"]) == (64 * 4 * 8, False)
    token_stream("org/set", encode=encode, vocab_size=VOCAB, max_tokens=50)
    assert (seen["max_chars"], seen["evaluation"]) == (64 * 50, True)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, np.ndarray.tolist])
def test_arrays(as_array):
    rows = np.arange(32).reshape(4, 8)
    data = calibration_from_tokens(as_array(rows), config(), vocab_size=VOCAB)
    assert (data.tokens == rows).all()
    assert (data.mask, data.warnings) == (None, ())
    stream = calibration_from_tokens(as_array(np.arange(200)), config(), vocab_size=VOCAB)
    assert (np.diff(stream.tokens, axis=1) == 1).all()


def test_samples_of_different_lengths_are_padded():
    rows = [[1, 2, 3], [4], list(range(10, 20))]
    data = calibration_from_tokens(rows, config(calib_samples=3), vocab_size=VOCAB)
    assert data.tokens.tolist() == [
        [1, 2, 3, 0, 0, 0, 0, 0],
        [4, 0, 0, 0, 0, 0, 0, 0],
        list(range(10, 18)),
    ]
    assert data.mask.sum(axis=1).tolist() == [3, 1, 8]
    assert data.num_tokens == 12


def test_given_masks():
    rows, mask = np.arange(32).reshape(4, 8), np.ones((4, 8), bool)
    mask[1, 5:] = False
    data = calibration_from_tokens(rows, config(), vocab_size=VOCAB, mask=mask)
    assert (data.mask == mask).all()
    unmasked = calibration_from_tokens(rows, config(), vocab_size=VOCAB)
    assert data.description["sha256"] != unmasked.description["sha256"]


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((2, 8), int), np.ones((2, 7), bool), r"\(2, 7\); tokens \(2, 8\)"),
        (np.zeros((2, 8), int), np.ones((2, 8), int), "the mask is int64"),
        (np.zeros(8, int), np.ones(8, bool), "same shape"),
        ([[1, 2], [3]], np.ones((2, 2), bool), "their own mask"),
        ([[1, 2], []], None, "sample 1 holds no tokens"),
        ([], None, "no tokens"),
        ([[1, 2], [3, 4, 2**32]], None, "sample 1: token id 4294967296"),
        (np.zeros((2, 8)), None, "float64"),
    ],
)
def test_bad_arrays(tokens, mask, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_from_tokens(tokens, config(), vocab_size=VOCAB, mask=mask)


def test_token_stream(text_file, tmp_path):
    want = encode(text_file.read_text())
    stream = token_stream(text_file, encode=encode, vocab_size=VOCAB)
    assert stream.dtype == np.int32
    assert stream.tolist() == want
    assert (
        token_stream(text_file, encode=encode, vocab_size=VOCAB, max_tokens=7).tolist()
        == (want[:7])
    )
    np.save(tmp_path / "rows.npy", np.arange(40).reshape(5, 8))
    assert token_stream(tmp_path / "rows.npy", vocab_size=VOCAB).tolist() == list(range(40))
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 39"):
        token_stream(tmp_path / "rows.npy", vocab_size=39)
