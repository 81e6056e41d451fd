"""Windows, rows and padding on plain arrays."""

import hashlib

import numpy as np
import pytest

from jq.calib.tokens import (
    CalibrationData,
    check_vocabulary,
    digest,
    pad_rows,
    sample_rows,
    sample_windows,
    to_token_array,
)
from jq.errors import CalibrationError


def test_windows_are_pieces_of_the_stream_at_random_starts():
    stream = np.arange(1000)
    tokens, mask, warnings = sample_windows(stream, 10, 50, seed=3)
    assert (tokens.shape, tokens.dtype, mask, warnings) == ((50, 10), np.int32, None, ())
    starts = np.random.default_rng(3).integers(0, 991, 50)
    assert (tokens == starts[:, None] + np.arange(10)).all()


def test_both_ends_of_the_stream_can_be_drawn():
    tokens, *_ = sample_windows(np.arange(40), 20, 2, seed=0)
    drawn = {int(sample_windows(np.arange(40), 20, 2, seed)[0][0, 0]) for seed in range(300)}
    assert tokens.shape == (2, 20)
    assert drawn == set(range(21))


def test_the_seed_decides():
    stream = np.arange(1000)
    first, again, other = (sample_windows(stream, 8, 5, seed)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("size", [16, 17, 31, 32, 100, 127])
def test_a_short_stream_is_covered_evenly_and_said_to_be_few(size):
    tokens, mask, warnings = sample_windows(np.arange(size), 16, 8, seed=0)
    assert mask is None
    assert len(tokens) == -(-size // 16)
    assert set(tokens.ravel().tolist()) == set(range(size))
    assert (np.diff(tokens, axis=1) == 1).all()
    if size <= 112:
        (few,) = warnings
        assert f"{len(tokens)} calibration samples instead of 8" in few
        assert f"rank {size} at most" in few
    else:  # all that were asked for, if barely
        assert (len(tokens), warnings) == (8, ())


def test_a_stream_shorter_than_a_window_is_padded_and_masked():
    tokens, mask, warnings = sample_windows(np.array([5, 6, 7]), 8, 4, seed=0)
    assert tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]]
    assert np.asarray(mask).tolist() == [[True] * 3 + [False] * 5]
    assert "3 tokens, a window 8" in warnings[0]
    assert "1 calibration samples instead of 4" in warnings[1]
    assert "rank 3 at most" in warnings[1]


def test_rows_are_drawn_without_replacement_in_their_order():
    rows = np.arange(100)[:, None] * 10 + np.arange(6)
    tokens, mask, warnings = sample_rows(rows, None, 6, 40, seed=0)
    assert (tokens.dtype, mask, warnings) == (np.int32, None, ())
    chosen = tokens[:, 0] // 10
    assert (np.diff(chosen) > 0).all()
    assert (tokens == rows[chosen]).all()
    assert (chosen != np.arange(40)).any()


def test_all_rows_where_there_are_no_more():
    rows = np.arange(12).reshape(3, 4)
    tokens, _, warnings = sample_rows(rows, None, 4, 3, seed=0)
    assert (tokens == rows).all()
    assert warnings == ()
    _, _, warnings = sample_rows(rows, None, 4, 5, seed=0)
    assert "3 calibration samples instead of 5: 12 tokens" in warnings[0]


@pytest.mark.parametrize(("seq_len", "said"), [(3, "cut to 3"), (9, "shorter than the 9")])
def test_rows_of_another_length(seq_len, said):
    rows = np.arange(12).reshape(3, 4)
    tokens, _, warnings = sample_rows(rows, None, seq_len, 3, seed=0)
    assert (tokens == rows[:, :seq_len]).all()
    assert len(warnings) == 1
    assert f"4 tokens, {said}" in warnings[0]


def test_the_mask_goes_with_its_rows():
    rows = np.arange(80).reshape(20, 4)
    mask = rows % 7 > 0
    tokens, got, warnings = sample_rows(rows, mask, 4, 5, seed=1)
    assert (got == (tokens % 7 > 0)).all()
    assert warnings == ()
    _, none, _ = sample_rows(rows, np.ones_like(mask), 4, 5, seed=1)
    assert none is None


def test_masked_tokens_do_not_count_in_the_rank():
    mask = np.array([[True, False, False, False], [True, True, False, False]])
    _, _, warnings = sample_rows(np.ones((2, 4), int), mask, 4, 9, seed=0)
    assert "rank 3 at most" in warnings[0]


def test_a_row_without_real_tokens_is_refused():
    mask = np.ones((3, 4), bool)
    mask[2, :2] = False
    assert sample_rows(np.ones((3, 4), int), mask, 4, 3, seed=0)[1] is not None
    with pytest.raises(CalibrationError, match="sample 2 has no real token within its first 2"):
        sample_rows(np.ones((3, 4), int), mask, 2, 3, seed=0)


def test_pad_rows():
    tokens, mask = pad_rows([[1, 2, 3], [4], np.array([5, 6], np.uint16)])
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    tokens, mask = pad_rows([[1, 2, 3], [4]], seq_len=2)
    assert tokens.tolist() == [[1, 2], [4, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("row", [[], [0.5], [[1, 2]]])
def test_bad_rows_are_named(row):
    with pytest.raises(CalibrationError, match="calibration sample 1"):
        pad_rows([[1], row])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "holds no tokens"),
        (np.zeros((0, 5), int), "holds no tokens"),
        ([1.0, 2.0], "float64"),
        ([True, False], "bool"),
        (["1"], "<U1"),
        (np.array([1, "a", None], object), "object"),
        (np.zeros((1, 2, 3), int), r"\(1, 2, 3\)"),
        ([[1, 2], [3, [4]]], "no array of token ids"),
        (5, r"shape \(\)"),
    ],
)
def test_only_integer_arrays_are_tokens(values, message):
    with pytest.raises(CalibrationError, match=message):
        to_token_array(values, "these")


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<i8", "u8"])
def test_every_integer_dtype_is_read(dtype):
    stream = to_token_array(np.arange(100).astype(dtype), "these")
    check_vocabulary(stream, 100, "these")
    tokens, *_ = sample_windows(stream, 100, 1, seed=0)
    assert tokens.tolist() == [list(range(100))]
    assert tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 2, 50]), "id 50 at 2 is outside the model's vocabulary of 50"),
        (np.array([1, -1, 3]), "id -1 at 1"),
        (np.array([[1, 2], [3, 99]]), r"id 99 at \(1, 1\)"),
        (np.array([2**32], np.int64), "id 4294967296"),  # would be 0 as int32
        (np.array([2**64 - 1], np.uint64), "id 18446744073709551615"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(tokens, message):
    with pytest.raises(CalibrationError, match=message):
        check_vocabulary(tokens, 50, "these")


def test_the_ends_of_the_vocabulary_are_inside():
    check_vocabulary(np.array([0, 49]), 50, "these")


def test_digest():
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    sha = hashlib.sha256(b"(2, 3)" + b"".join(i.to_bytes(4, "little") for i in range(6)))
    assert digest(tokens, None) == sha.hexdigest()
    mask = np.array([[True, False, True], [True, True, True]])
    others = (
        digest(tokens, mask),
        digest(tokens, ~mask),
        digest(tokens.reshape(3, 2), None),
        digest(tokens[::-1], None),
    )
    assert len({digest(tokens, None), *others}) == 5


def test_num_tokens():
    tokens = np.zeros((2, 3), np.int32)
    assert CalibrationData(tokens, None, {}).num_tokens == 6
    assert CalibrationData(tokens, np.eye(2, 3, dtype=bool), {}).num_tokens == 2
