"""From a source (a file, a dataset's name, arrays) to calibration data or a stream of tokens.

data = calibration_data(config, encode=tokenizer.encode, vocab_size=4096)
data = calibration_from_tokens(ids, config, vocab_size=4096)
stream = token_stream("wikitext2", encode=tokenizer.encode, vocab_size=4096)   # evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jq.calib import text
from jq.calib.config import CalibrationConfig
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

if TYPE_CHECKING:
    from jaxtyping import Int32, Integer

Encode = Callable[[str], Sequence[int] | np.ndarray]

# Characters of a dataset to read per token needed.  Tokens are about four characters long, so there
# is an order of magnitude to choose windows from; WikiText-2 is read whole at the default knobs.
_CHARS_PER_TOKEN = 64
_UNLIMITED = 2**62


def calibration_data(
    config: CalibrationConfig, *, vocab_size: int, encode: Encode | None = None
) -> CalibrationData:
    """Read, tokenize and sample what `config.calib_dataset` names.

    A text is tokenized whole, its documents joined with a blank line, and cut into windows (see
    `jq.calib.tokens.sample_windows`).  A .npy file holds a stream `[N]` of token ids, treated
    likewise, or samples `[n, T]` (see `sample_rows`).

    Args:
        config: the knobs.
        vocab_size: of the model; ids outside it are refused.
        encode: text -> token ids; needed unless the source is a .npy file.

    Raises: CalibrationError for an empty, malformed or unreachable source, and for ids outside the
        vocabulary.
    """
    limit = _CHARS_PER_TOKEN * config.calib_samples * config.calib_seqlen
    name = _public_name(config.calib_dataset)
    ids = _read(config.calib_dataset, encode, config.calib_field, False, limit)
    return _sample(ids, None, config, vocab_size, name)


def calibration_from_tokens(
    tokens: Any, config: CalibrationConfig, *, vocab_size: int, mask: Any = None
) -> CalibrationData:
    """Sample token ids that are already in memory; `config.calib_dataset` is not read.

    Args:
        tokens: a stream `[N]`, samples `[n, T]` (any integer dtype, NumPy or JAX), or a sequence of
            samples of different lengths, which are padded on the right.
        config: the knobs.
        vocab_size: of the model; ids outside it are refused.
        mask: bool `[n, T]`, True for real tokens; only with samples `[n, T]`.

    Raises: CalibrationError as `calibration_data`.
    """
    name = "calibration tokens"
    if _is_ragged(tokens):
        if mask is not None:
            raise CalibrationError("samples of different lengths make their own mask; give no mask")
        tokens, mask = _pad_checked(tokens, vocab_size)
    ids = to_token_array(tokens, name)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != ids.shape or mask.ndim != 2 or mask.dtype != np.bool_:
            raise CalibrationError(
                f"the mask is {mask.dtype} {mask.shape}; tokens {ids.shape} take a bool mask of"
                " the same shape [n, T]"
            )
    return _sample(ids, mask, config, vocab_size, name)


def token_stream(
    source: str | Path,
    *,
    vocab_size: int,
    encode: Encode | None = None,
    field: str = "text",
    max_tokens: int | None = None,
) -> Int32[np.ndarray, "N"]:
    """All tokens of a source, one after another, for evaluation.

    Args:
        source: as `CalibrationConfig.calib_dataset`; "wikitext2" and "c4" mean their test and
            validation splits here.  Samples `[n, T]` of a .npy file follow one another.
        vocab_size, encode: as in `calibration_data`.
        field: the field that holds the text.
        max_tokens: how many are needed; large datasets are not read much further than that.

    Raises: CalibrationError as `calibration_data`.
    """
    limit = _UNLIMITED if max_tokens is None else _CHARS_PER_TOKEN * max_tokens
    ids = _read(source, encode, field, True, limit)
    check_vocabulary(ids, vocab_size, _public_name(source))
    return ids.reshape(-1)[:max_tokens].astype(np.int32)


def _read(
    source: str | Path, encode: Encode | None, field: str, evaluation: bool, max_chars: int
) -> Integer[np.ndarray, "..."]:
    """Token ids `[N]` or `[n, T]` of a source."""
    path = Path(source)
    if path.suffix.lower() == ".npy":
        return _read_npy(path)
    if encode is None:
        raise CalibrationError(
            f"{source} is text and there is no tokenizer; give one, or token ids in a .npy file"
        )
    content = text.read_text(source, field=field, evaluation=evaluation, max_chars=max_chars)
    ids = to_token_array(encode(content), f"the tokenized text of {source}")
    if ids.ndim != 1:
        raise CalibrationError(f"the tokenizer returned ids of shape {ids.shape} for one text")
    return ids


def _read_npy(path: Path) -> Integer[np.ndarray, "..."]:
    text.require_file(path)
    try:
        # Mapped: a header cannot ask for more memory than the file has bytes.  This reader knows no
        # pickles and no zip files, which `np.load` does.
        ids = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a malformed header also raises errors of Python's tokenizer
        raise CalibrationError(
            f"{path} cannot be read as a .npy file of plain integers (pickles never are): {error}"
        ) from error
    return to_token_array(ids, str(path))


def _sample(
    ids: Integer[np.ndarray, "..."],
    mask: np.ndarray | None,
    config: CalibrationConfig,
    vocab_size: int,
    name: str,
) -> CalibrationData:
    check_vocabulary(ids, vocab_size, name)
    knobs = (config.calib_seqlen, config.calib_samples, config.seed)
    if ids.ndim == 1:
        tokens, mask, warnings = sample_windows(ids, *knobs)
    else:
        tokens, mask, warnings = sample_rows(ids, mask, *knobs)
    data = CalibrationData(tokens, mask, {}, warnings)
    return CalibrationData(tokens, mask, _describe(data, config, name), warnings)


def _describe(data: CalibrationData, config: CalibrationConfig, name: str) -> Mapping[str, Any]:
    """Facts for the manifest.  batch_size stays out: it has no influence on the result."""
    samples, seq_len = data.tokens.shape
    return {
        "source": name,
        "calib_samples": config.calib_samples,
        "calib_seqlen": config.calib_seqlen,
        "seed": config.seed,
        "samples": samples,
        "seq_len": seq_len,
        "tokens": data.num_tokens,
        "sha256": digest(data.tokens, data.mask),
    }


def _is_ragged(tokens: Any) -> bool:
    """Whether this is a sequence of samples of different lengths."""
    if not isinstance(tokens, Sequence) or not all(hasattr(row, "__len__") for row in tokens):
        return False
    return len({len(row) for row in tokens}) > 1


def _pad_checked(rows: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`pad_rows`, ids checked before they are narrowed to int32."""
    for i, row in enumerate(rows):
        name = f"calibration sample {i}"
        check_vocabulary(to_token_array(row, name), vocab_size, name)
    return pad_rows(rows)


def _public_name(source: str | Path) -> str:
    """A file's own name, without the folders of the machine it was on; a dataset's full name."""
    path = Path(source)
    return path.name if path.exists() else str(source)
