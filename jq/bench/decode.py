"""Latency of generation as a user meets it: prefill, and each step of the decode loop.

What is timed is `jq.models.stream` itself, greedy, until the tokens are on the host: sampling, the
cache's update and the loop's own work are part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.bench.result import BatchTiming, BenchResult, Device, Latency
from jq.bench.timing import Clock
from jq.errors import ModelError
from jq.models import stream
from jq.models.generation import bucket

Progress = Callable[[int, int, str], None]


def measure_decode(
    model: Any,
    params: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: int = 128,
    steps: int = 200,
    prefills: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> BenchResult:
    """Time prefill and decode on random prompts, for each batch size.

    Args:
      model, params: the decoder and its parameters, quantized or not; bring them into the layout of
        the device's kernels first (`jq.prepare`).
      batch_sizes: sequences that run at once.
      prompt_tokens: of each sequence; `stream` pads them to a bucketed length.
      steps: decode steps to measure per batch size. Where prompt and steps exceed the model's
        positions, several sequences are decoded one after the other.
      prefills: how many to measure per batch size.
      seed: of the prompts.
      progress: called with (batch sizes done, in all, text).
      clock: seconds.
    Returns: latencies; compilation and the first steps are apart, in `first_call_seconds`.
    Raises:
      ModelError: counts below 1, or a prompt that leaves no room for two new tokens.
      NonFiniteError: logits are NaN or infinite.
    """
    room = model.config.max_position_embeddings - prompt_tokens
    _check(batch_sizes, prompt_tokens, steps, prefills, room)
    new = min(steps + 1, room)
    rng = np.random.default_rng(seed)
    batches = []
    for done, size in enumerate(batch_sizes):
        if progress is not None:
            progress(done, len(batch_sizes), f"batch size {size}")
        prompts = rng.integers(0, model.config.vocab_size, (size, prompt_tokens)).tolist()

        def start(prompts: Any = prompts) -> Any:
            return stream(model, params, prompts, new, eos_token_ids=())

        first, prefill = _prefills(start, prefills, clock)
        decode = _steps(start, steps, clock)
        padded = bucket(prompt_tokens)
        batches.append(
            BatchTiming(size, prompt_tokens, padded, bucket(padded + new), first, prefill, decode)
        )
    if progress is not None:
        progress(len(batch_sizes), len(batch_sizes), "")
    return BenchResult(Device.default(), jnp.dtype(model.dtype).name, steps, tuple(batches))


def _prefills(start: Callable[[], Any], count: int, clock: Clock) -> tuple[float, Latency]:
    """Seconds of the first prefill and step, then the latency of `count` more prefills."""
    seconds = []
    first = 0.0
    for index in range(count + 1):
        began = clock()
        tokens = start()
        next(tokens)
        took = clock() - began
        # The stream has already sent off the first step; wait for it, or it runs into what follows.
        next(tokens)
        if index == 0:
            first = clock() - began
        else:
            seconds.append(took)
    return first, Latency(tuple(seconds))


def _steps(start: Callable[[], Any], count: int, clock: Clock) -> Latency:
    """Latency of `count` steps; as many sequences as needed, their prefills left out."""
    seconds: list[float] = []
    while len(seconds) < count:
        tokens = start()
        next(tokens)
        before = clock()
        for _ in tokens:
            now = clock()
            seconds.append(now - before)
            before = now
            if len(seconds) == count:
                break
    return Latency(tuple(seconds))


def _check(
    batch_sizes: Sequence[int], prompt_tokens: int, steps: int, prefills: int, room: int
) -> None:
    counts = {
        "batch size": min(batch_sizes, default=0),
        "prompt_tokens": prompt_tokens,
        "steps": steps,
        "prefills": prefills,
    }
    for name, count in counts.items():
        if count < 1:
            raise ModelError(f"{name} {count}: give at least 1")
    if room < 2:
        raise ModelError(
            f"prompt_tokens {prompt_tokens} leaves {max(room, 0)} of the model's "
            f"{room + prompt_tokens} positions; a step needs 2: give fewer"
        )
