"""`evaluate`: windows of tokens through a model, and through its reference beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.blockwise import BlockwiseModel, Params
from jq.errors import CalibrationError, ModelError, NonFiniteError
from jq.evaluate.forward import vocabulary_size
from jq.evaluate.result import Evaluation
from jq.evaluate.scores import paired_scores, token_log_probs

if TYPE_CHECKING:
    from jaxtyping import Int32


def evaluate(
    model: BlockwiseModel,
    params: Params,
    tokens: Any,
    *,
    reference_params: Params | None = None,
    reference_model: BlockwiseModel | None = None,
    seq_len: int,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Evaluation:
    """Token-level perplexity and, given a reference, KL divergence and agreement with it.

    The protocol is the GPTQ paper's (arXiv 2210.17323): the concatenated text is cut into
    non-overlapping windows of seq_len tokens, the incomplete one at the end is left out, and tokens
    1 .. seq_len-1 of each window are scored, each given those before it in its window.

    Args:
        model: see `jq.blockwise`; hashable.
        params: kernels may be QTensors; cut over a mesh (`jq.load(..., mesh=)`) or on one device.
        tokens: integers `[N]` (a stream) or `[n, T]` (rows follow one another).
        reference_params: parameters of the full-precision model; it runs beside the other on every
            batch, so that its distributions are never stored.
        reference_model: if its definition differs; otherwise `model`.
        seq_len: tokens of a window, 2 or more.
        max_windows: take only the first ones.
        batch_size: windows that run at once.
        progress: called with (windows done, windows in all) after every batch.
        observe: called with the scores of every batch, by name ("nll"; with a reference also
            "reference_nll", "kl", "top1"): `[B, T-1]`, position 0 being the second token.

    Raises:
        CalibrationError: not one full window; a token id outside the vocabulary; a knob below 1.
        ModelError: a reference model without parameters, with another vocabulary, or on other
            devices.
        NonFiniteError: logits with NaN or infinity, naming the window.
    """
    if reference_params is None and reference_model is not None:
        raise ModelError("a reference model is of no use without reference_params")
    windows = cut_windows(tokens, seq_len, max_windows)
    vocab_size = vocabulary_size(model, params)
    _check_ids(windows, vocab_size)
    if reference_params is None:
        score = _alone(model, params)
    else:
        reference_model = model if reference_model is None else reference_model
        other = vocabulary_size(reference_model, reference_params)
        if other != vocab_size:
            raise ModelError(
                f"the model has {vocab_size} logits, the reference {other}; KL divergence needs"
                " two models of one vocabulary"
            )
        _check_devices(params, reference_params)
        score = _beside(model, params, reference_model, reference_params)
    means: dict[str, list[np.ndarray]] = {}
    done = 0
    for batch, real in _batches(windows, batch_size):
        scores = {name: np.asarray(x)[:real] for name, x in score(batch).items()}
        _check_finite(scores, done, seq_len)
        if observe is not None:
            observe(scores)
        for name, x in scores.items():
            means.setdefault(name, []).append(x.astype(np.float64).mean(axis=1))
        done += real
        if progress is not None:
            progress(done, len(windows))
    joined = {name: np.concatenate(parts) for name, parts in means.items()}
    return Evaluation(
        seq_len=seq_len,
        tokens_sha256=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        window_nll=joined["nll"],
        reference_window_nll=joined.get("reference_nll"),
        window_kl=joined.get("kl"),
        window_top1=joined.get("top1"),
    )


def cut_windows(
    tokens: Any, seq_len: int, max_windows: int | None = None
) -> Int32[np.ndarray, "n T"]:
    """Non-overlapping windows from the start of a token stream; the rest is left out.

    Raises: CalibrationError for anything but integers, seq_len < 2, max_windows < 1, or fewer
        tokens than one window.
    """
    stream = np.asarray(tokens)
    if stream.dtype.kind not in "iu" and stream.size:
        raise CalibrationError(f"evaluation tokens have dtype {stream.dtype}, not an integer one")
    if seq_len < 2 or (max_windows is not None and max_windows < 1):
        raise CalibrationError(
            f"seq_len {seq_len} and max_windows {max_windows} leave nothing to score; they must be"
            " 2 and 1 or more"
        )
    count = stream.size // seq_len
    if count == 0:
        raise CalibrationError(
            f"{stream.size} evaluation tokens make no window of {seq_len}; give a longer text or a"
            " smaller seq_len"
        )
    count = count if max_windows is None else min(count, max_windows)
    windows = stream.reshape(-1)[: count * seq_len].reshape(count, seq_len)
    # Clipped only so that ids beyond int32 stay outside any vocabulary.
    return np.clip(windows, -1, np.iinfo(np.int32).max).astype(np.int32)


def _check_ids(windows: Int32[np.ndarray, "n T"], vocab_size: int) -> None:
    wrong = np.argwhere((windows < 0) | (windows >= vocab_size))
    if len(wrong):
        window, place = (int(i) for i in wrong[0])
        raise CalibrationError(
            f"evaluation token {place} of window {window} is {windows[window, place]}, outside the"
            f" model's vocabulary of {vocab_size}; use the tokenizer that belongs to this model"
        )


def _batches(windows: Int32[np.ndarray, "n T"], batch_size: int) -> Iterator[tuple[Any, int]]:
    """Batches of one shape, the last one filled up with its last window; how many are real."""
    if batch_size < 1:
        raise CalibrationError(f"batch_size is {batch_size}; it must be 1 or more")
    batch_size = min(batch_size, len(windows))
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        fill = ((0, batch_size - len(batch)), (0, 0))
        yield jnp.asarray(np.pad(batch, fill, mode="edge")), len(batch)


def _alone(model: BlockwiseModel, params: Params) -> Callable[[Any], dict[str, Any]]:
    return lambda batch: {"nll": -token_log_probs(model, params, batch)}


def _beside(
    model: BlockwiseModel, params: Params, reference_model: BlockwiseModel, reference: Params
) -> Callable[[Any], dict[str, Any]]:
    return lambda batch: paired_scores(model, params, reference_model, reference, batch)


def _check_devices(params: Params, reference: Params) -> None:
    """Both models' scores come from one program; what is tied to no device follows the other."""
    ours, theirs = _devices(params), _devices(reference)
    if ours and theirs and ours != theirs:
        raise ModelError(
            f"the model lies on devices {sorted(ours)}, the reference on {sorted(theirs)}; load"
            " both with one mesh"
        )


def _devices(params: Params) -> set[int]:
    leaves = jax.tree.leaves(params)
    tied = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and leaf.committed]
    return {device.id for leaf in tied for device in leaf.sharding.device_set}


def _check_finite(scores: dict[str, np.ndarray], first: int, seq_len: int) -> None:
    """Raise NonFiniteError, naming window, position and model, unless all scores are finite."""
    whose = {"nll": "the model's", "reference_nll": "the reference model's", "kl": "one model's"}
    for name, owner in whose.items():
        bad = np.argwhere(~np.isfinite(scores.get(name, np.zeros((0, 0)))))
        if len(bad):
            row, place = (int(i) for i in bad[0])
            window = first + row
            raise NonFiniteError(
                f"window {window} (tokens {window * seq_len} to {(window + 1) * seq_len - 1}):"
                f" {owner} logits at position {place} are NaN or infinite; check its weights and"
                " scales, or evaluate in a wider dtype"
            )
