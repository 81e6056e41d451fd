"""One block of OPT-175B through GPTQ, part by part, and what 96 of them would take.

Hidden 12288, MLP 49152, 128 x 2048 tokens, int4 in groups of 128.  Parts are items of their own:
one that the device has no room for, or dies of, leaves the others.  Hidden states lie in host
memory (offloaded), so that the device holds one linear's Hessian, its weights and a sample; what
their way there and back takes is counted from the measured rate.  Without a GPU everything runs at
a tiny shape, and the times say nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import statistics
from jq.group import solve_group
from jq.methods.gptq import factor_hessian, gptq_solve
from jq.presets import preset

LAYERS = 96
_FULL = {"hidden": 12288, "samples": 128, "length": 2048, "group": 128}
_TINY = {"hidden": 64, "samples": 2, "length": 32, "group": 16}
_DISTINCT = 4  # samples that exist; they are read over and over
# name -> (inputs, outputs) as multiples of the hidden size
LINEARS = {"out": (1, 1), "qkv": (1, 3), "fc1": (1, 4), "fc2": (4, 1)}
# inputs, as a multiple of the hidden size -> how many groups of linears have as many
INPUTS = {1: 3, 4: 1}


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The smaller parts first, what fills the memory last."""
    shape = _FULL if facts.get("gpu") else _TINY
    found: list[dict[str, Any]] = [{"key": "transfer", "part": "transfer"}]
    for times in INPUTS:
        for part in ("statistics", "factor"):
            found.append({"key": f"{part} {times * shape['hidden']}", "part": part, "k": times})
    for part in ("forward", "solve", "report"):
        for name, (k, n) in LINEARS.items():
            found.append({"key": f"{part} {name}", "part": part, "k": k, "n": n})
    return [{**item, **shape} for item in found]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One part: "s", seconds of it for one block (of one linear, or of one input)."""
    parts = {
        "transfer": transfer,
        "statistics": gather,
        "factor": factor,
        "forward": forward,
        "solve": solve,
        "report": report,
    }
    result = parts[item["part"]](item)
    told = jax.local_devices()[0].memory_stats() or {}
    return {**result, "peak_bytes": told.get("peak_bytes_in_use")}


def transfer(item: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of a sample's way to the device and back."""
    sample = np.zeros((item["length"], 4 * item["hidden"]), np.uint16)
    device = jax.block_until_ready(jax.device_put(sample))
    start = time.perf_counter()
    for _ in range(4):
        device = jax.block_until_ready(jax.device_put(sample))
    there = (time.perf_counter() - start) / 4
    start = time.perf_counter()
    for _ in range(4):
        jax.device_get(device + jnp.uint16(1))  # an array that the host has no copy of
    back = (time.perf_counter() - start) / 4
    return {"gbs_there": sample.nbytes / there / 1e9, "gbs_back": sample.nbytes / back / 1e9}


def gather(item: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of one input, over all samples."""
    stats, some = statistics.init(item["k"] * item["hidden"]), _samples(item)
    add = jax.jit(statistics.update, donate_argnums=0)
    stats = jax.block_until_ready(add(stats, some[0]))
    start = time.perf_counter()
    for number in range(item["samples"]):
        stats = add(stats, some[number % len(some)])
    jax.block_until_ready(stats)
    return {"s": time.perf_counter() - start}


def factor(item: Mapping[str, Any]) -> dict[str, Any]:
    """The damped Hessian's factor."""
    gram, (spec, method) = _gram(item), _numbers(item)
    made, seconds = _timed(lambda: factor_hessian(gram, spec, method))
    return {"s": seconds, "damp": float(made.damp), "failed": bool(made.failed)}


def forward(item: Mapping[str, Any]) -> dict[str, Any]:
    """The linear's products with every sample, in bfloat16."""
    some, w = _samples(item), _weight(item).astype(jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(some[0], w))
    start = time.perf_counter()
    for number in range(item["samples"]):
        last = product(some[number % len(some)], w)
    jax.block_until_ready(last)
    return {"s": time.perf_counter() - start}


def solve(item: Mapping[str, Any]) -> dict[str, Any]:
    """The codes of one group of linears, its Hessian already factored."""
    spec, method = _numbers(item)
    hessian = factor_hessian(_gram(item), spec, method)
    w = _weight(item)
    (_, info), seconds = _timed(lambda: gptq_solve(w, hessian, spec, method))
    return {"s": seconds, "loss": float(info.loss)}


def report(item: Mapping[str, Any]) -> dict[str, Any]:
    """All that the library does with a group once its Hessian is factored: codes, packing, and the
    errors of the outputs beside those of rounding to nearest."""
    spec, method = _numbers(item)
    stats = statistics.init(item["k"] * item["hidden"])._replace(gram=_gram(item))
    hessian = factor_hessian(stats.gram, spec, method)
    w = _weight(item)
    made, seconds = _timed(lambda: solve_group((w,), stats, hessian, None, spec, method).report)
    errors = (float(made.output_error[0]), float(made.rtn_output_error[0]))
    return {"s": seconds, "output_error": errors[0], "rtn_output_error": errors[1]}


def _numbers(item: Mapping[str, Any]) -> tuple[Any, Any]:
    return preset("gptq", group_size=item["group"])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_samples(count: int, length: int, k: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(k), count + 1)
    size = jnp.exp(0.7 * jax.random.normal(keys[0], (k,), jnp.bfloat16))
    return [jax.random.normal(key, (length, k), jnp.bfloat16) * size[None] for key in keys[1:]]


def _samples(item: Mapping[str, Any]) -> list[jax.Array]:
    """bfloat16 [length, K] each; channels of uneven size."""
    return _random_samples(_DISTINCT, item["length"], item["k"] * item["hidden"])


def _gram(item: Mapping[str, Any]) -> jax.Array:
    """Of a few samples: damping fills the rank, and takes no other time than a full one's."""
    stats = statistics.init(item["k"] * item["hidden"])
    add = jax.jit(statistics.update, donate_argnums=0)
    for sample in _samples(item):
        stats = add(stats, sample)
    return jax.jit(statistics.finish, donate_argnums=0)(stats).gram


def _weight(item: Mapping[str, Any]) -> jax.Array:
    shape = item["k"] * item["hidden"], item["n"] * item["hidden"]
    return jax.random.normal(jax.random.key(1), shape) / np.sqrt(shape[0])


def _timed(call: Any) -> tuple[Any, float]:
    """(result, seconds of the second call): the first compiles."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def extrapolate(found: Mapping[str, Any], hidden: int = _FULL["hidden"]) -> dict[str, float] | None:
    """Seconds of one block by part, "block" their sum, "model" of all layers; None where a part is
    missing.

    Args:
      found: results by key.
      hidden: size of the hidden state that was measured.
    """
    seconds: dict[str, float] = {}
    try:
        for part in ("statistics", "factor"):
            times = INPUTS.items()
            seconds[part] = sum(n * found[f"{part} {k * hidden}"]["s"] for k, n in times)
        for part in ("forward", "solve", "report"):
            seconds[part] = sum(found[f"{part} {name}"]["s"] for name in LINEARS)
        rates = found["transfer"]
    except KeyError:
        return None
    shape = _FULL if hidden == _FULL["hidden"] else _TINY
    tokens = shape["samples"] * shape["length"]
    # Stage by stage the states go there and back, with the residual stream beside them.
    numbers = tokens * hidden * sum(k + 1 for k, _ in LINEARS.values())
    gbs = rates["gbs_there"], rates["gbs_back"]
    seconds["transfer"] = sum(2 * numbers / rate / 1e9 for rate in gbs)
    seconds["report"] -= seconds["solve"]  # which it contains
    seconds["block"] = sum(seconds.values())
    seconds["model"] = LAYERS * seconds["block"]
    return seconds


def text(data: Mapping[str, Any]) -> str:
    """Lines for the summary; "" where the block was not measured as a whole."""
    found = data["sections"].get("large_block", {}).get("results", {})
    seconds = extrapolate(found)
    if seconds is None:
        return ""
    parts = ", ".join(f"{name} {s:.1f}" for name, s in seconds.items() if name != "model")
    return (
        f"OPT-175B block, GPTQ int4 g128, 128 x 2048 tokens (seconds): {parts}\n"
        f"  {LAYERS} blocks: {seconds['model'] / 3600:.2f} h, reading and writing apart\n"
    )
