"""Calibration tokens as plain arrays: windows of a stream, rows of a table, padding.

Real tokens are marked by a mask; padding takes no part in any statistic.  What is worth telling the
user, but no error, comes back as strings: nothing here prints or logs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jq.errors import CalibrationError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32, Integer

# Causal models never look at padding behind the last real token, so any valid id will do.
PAD_ID = 0


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationData:
    """Tokens to calibrate on.

    Attributes:
        tokens: int32 `[n_samples, seq_len]`, every id within the model's vocabulary.
        mask: bool `[n_samples, seq_len]`, True for real tokens, at least one in every row; None
            when all are real.
        description: where they came from, how they were chosen and what they are (`sha256`), as
            JSON-ready values, for the manifest.
        warnings: sentences for the user.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    description: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.tokens.size if self.mask is None else self.mask.sum())


def to_token_array(values: Any, name: str) -> Integer[np.ndarray, "..."]:
    """Token ids as an integer array, of any integer dtype; `name` stands in the error.

    Raises: CalibrationError for anything but integers in 1 or 2 dimensions, or nothing at all.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # nested sequences of different lengths
        raise CalibrationError(f"{name} is no array of token ids: {error}") from error
    if array.size == 0:
        raise CalibrationError(f"{name} holds no tokens (shape {array.shape})")
    if array.dtype.kind not in "iu":
        raise CalibrationError(
            f"{name} has dtype {array.dtype}; token ids are integers (save them as int32)"
        )
    if array.ndim not in (1, 2):
        raise CalibrationError(
            f"{name} has shape {array.shape}; give a stream [N] or samples [n, T] of token ids"
        )
    return array


def check_vocabulary(tokens: Integer[np.ndarray, "..."], vocab_size: int, name: str) -> None:
    """Raise CalibrationError, naming the first one, if a token id is not in [0, vocab_size).

    An embedding lookup would clamp such an id or fill in NaN without a word.
    """
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size:
        return
    where = tuple(int(i[0]) for i in np.nonzero((tokens < 0) | (tokens >= vocab_size)))
    place = where[0] if len(where) == 1 else where
    raise CalibrationError(
        f"{name}: token id {tokens[where]} at {place} is outside the model's vocabulary of"
        f" {vocab_size}; use the tokenizer that belongs to this model"
    )


def sample_windows(
    stream: Integer[np.ndarray, "N"], seq_len: int, n_samples: int, seed: int
) -> tuple[Int32[np.ndarray, "n T"], Bool[np.ndarray, "n T"] | None, tuple[str, ...]]:
    """Windows of a token stream: (tokens, mask or None, warnings).

    A stream of at least n_samples * seq_len tokens gives n_samples windows at starts drawn
    uniformly, with replacement, by `numpy.random.default_rng(seed)` (the practice of the GPTQ and
    AWQ papers).  A shorter one gives ceil(N / seq_len) evenly spaced windows that together hold all
    of it, and a warning.  One shorter than seq_len gives a single window, padded and masked.
    """
    size = len(stream)
    if size < seq_len:
        tokens, mask = pad_rows([stream], seq_len)
        short = f"the calibration text has {size} tokens, a window {seq_len}: the rest is padding"
        return tokens, mask, (short, *few_samples(1, n_samples, size))
    if size >= n_samples * seq_len:
        n = n_samples
        starts = np.random.default_rng(seed).integers(0, size - seq_len + 1, size=n)
    else:
        n = -(-size // seq_len)
        starts = np.linspace(0, size - seq_len, n).round().astype(np.int64)
    tokens = np.stack([stream[start : start + seq_len] for start in starts]).astype(np.int32)
    return tokens, None, few_samples(n, n_samples, min(size, n * seq_len))


def sample_rows(
    rows: Integer[np.ndarray, "m S"],
    mask: Bool[np.ndarray, "m S"] | None,
    seq_len: int,
    n_samples: int,
    seed: int,
) -> tuple[Int32[np.ndarray, "n T"], Bool[np.ndarray, "n T"] | None, tuple[str, ...]]:
    """Rows of a table of samples: (tokens, mask or None, warnings).

    All rows in their order, or n_samples of them drawn without replacement, in their order.  Rows
    longer than seq_len are cut at the end; shorter ones stay as they are.

    Raises: CalibrationError naming a chosen row without any real token.
    """
    count, length = rows.shape
    chosen = np.arange(count)
    if count > n_samples:
        chosen = np.sort(np.random.default_rng(seed).choice(count, n_samples, replace=False))
    tokens = rows[chosen, :seq_len].astype(np.int32)
    if mask is not None:
        mask = mask[chosen, :seq_len]
        empty = np.flatnonzero(~mask.any(axis=1))
        if empty.size:
            raise CalibrationError(
                f"calibration sample {chosen[empty[0]]} has no real token within its first"
                f" {seq_len}; remove it"
            )
        if mask.all():
            mask = None
    warnings = ()
    if length != seq_len:
        what = "cut to" if length > seq_len else "shorter than the"
        warnings = (f"calibration samples have {length} tokens, {what} {seq_len} asked for",)
    real = tokens.size if mask is None else int(mask.sum())
    return tokens, mask, (*warnings, *few_samples(len(tokens), n_samples, real))


def pad_rows(
    rows: Sequence[Any], seq_len: int | None = None
) -> tuple[Int32[np.ndarray, "n T"], Bool[np.ndarray, "n T"]]:
    """Samples of different lengths (each integers `[t]`) -> (tokens, mask), padded on the right.

    T is seq_len, or the longest row's length; longer rows are cut.

    Raises: CalibrationError for a row without tokens or with anything but integers.
    """
    arrays = [to_token_array(row, f"calibration sample {i}") for i, row in enumerate(rows)]
    length = seq_len or max(a.size for a in arrays)
    tokens = np.full((len(arrays), length), PAD_ID, np.int32)
    mask = np.zeros((len(arrays), length), bool)
    for i, row in enumerate(arrays):
        if row.ndim != 1:
            raise CalibrationError(f"calibration sample {i} has shape {row.shape}, not [T]")
        size = min(length, row.size)
        tokens[i, :size] = row[:size]
        mask[i, :size] = True
    return tokens, mask


def few_samples(samples: int, asked: int, real_tokens: int) -> tuple[str, ...]:
    """The warning that a source has fewer samples than asked for, and what that limits."""
    if samples >= asked:
        return ()
    return (
        f"{samples} calibration samples instead of {asked}: {real_tokens} tokens, so the Hessian of"
        f" a linear with more inputs than that has rank {real_tokens} at most",
    )


def digest(tokens: Int32[np.ndarray, "n T"], mask: Bool[np.ndarray, "n T"] | None) -> str:
    """SHA-256 (hex) of the shape, the little-endian tokens and, where there is one, the mask."""
    sha = hashlib.sha256(repr(tokens.shape).encode())
    sha.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    if mask is not None:
        sha.update(np.packbits(mask).tobytes())
    return sha.hexdigest()
