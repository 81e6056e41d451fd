"""Tokens per second of a model of Llama-3-8B's shape, random weights, quantized and in bfloat16.

Four ways to run it: "loop", many steps in one program, which is what the device can do; "steps", a
program for each, timed one by one; "prefill", prompts of 1024 tokens; and "generate",
`jq.models.generate` as users call it, host and all.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq import tree
from jq.advise.known import find_model
from jq.models import Decoder, ModelConfig
from jq.models.cache import init_cache
from jq.models.generation import generate
from jq.models.hf_names import weight_table
from jq.prepare import prepare
from jq.prepared import PreparedTensor
from jq.qtensor import from_codes
from jq.spec import FP8, QuantSpec, w8a8
from scripts.gpu import timing
from scripts.gpu.problems import Problem, random_parts, seed
from scripts.gpu.problems8 import random_codes

KINDS = ("w4", "bf16", "int8", "fp8")
BATCHES = (1, 8, 32, 16)
STEPS = 32
PROMPT = 1024
CAPACITY = 512
LLAMA_3_8B = find_model("llama-3-8b")[1]
SPEC = QuantSpec("int4", 128, symmetric=False)
SPECS = {"w4": SPEC, "dequantize": SPEC, "int8": w8a8("int8"), "fp8": w8a8("float8_e4m3fn")}

_loaded: dict[str, tuple[Any, float]] = {}


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every kind with one sequence, as the ratios need; then prompts and batches; the int4 model as
    XLA runs it."""
    wanted = [(kind, "loop", 1) for kind in KINDS]
    wanted += [(kind, "prefill", 1) for kind in KINDS]
    wanted += [(kind, "generate", 1) for kind in ("w4", "bf16")]
    wanted += [(kind, "loop", b) for b in BATCHES for kind in KINDS]
    wanted += [(kind, "steps", b) for b in (1, 32) for kind in KINDS]
    wanted += [(kind, "prefill", b) for b in (8, 32) for kind in KINDS]
    wanted += [("dequantize", "loop", 1)]
    return [
        {"key": f"{kind} {way} batch {b}", "kind": kind, "way": way, "batch": b}
        for kind, way, b in dict.fromkeys(wanted)
    ]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make the model, unless an item before had it, and time it."""
    config = LLAMA_3_8B
    params, seconds = _model(config, item["kind"])
    model = Decoder(config, dtype=jnp.bfloat16)
    if item["way"] == "loop":
        told = loop(model, params, item["batch"], timer=facts.get("timer", "wall"))
    else:
        way = {"steps": by_steps, "prefill": prefill, "generate": by_generate}[item["way"]]
        told = way(model, params, item["batch"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {**told, **item, "bytes": size, "making_s": round(seconds, 2)}


def _model(config: ModelConfig, kind: str) -> tuple[Any, float]:
    if kind not in _loaded:
        start = time.perf_counter()
        params = jax.block_until_ready(parameters(config, kind))
        _loaded[kind] = (params, time.perf_counter() - start)
    return _loaded[kind]


def parameters(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Random parameters on the device.

    kind: "w4", "int8", "fp8" (8-bit activations too), "bf16", or "dequantize", int4 that is not
      prepared.
    """
    spec = SPECS.get(kind)
    params: dict[str, Any] = {}
    for entry in weight_table(config):
        shape, key = entry.shape, jax.random.key(seed(entry.path))
        linear = entry.path.startswith("layers_") and entry.path.endswith("/kernel")
        if linear and spec is not None:
            value = _quantized(tuple(shape), spec, key)
            if kind != "dequantize":
                value = prepare(value)
        else:
            value = _dense(tuple(shape), key)
        params = tree.replace(params, entry.path, value)
    kinds = {type(leaf) for _, leaf in tree.leaves(params)}
    if kind in ("w4", "int8", "fp8") and PreparedTensor not in kinds:
        raise RuntimeError("no linear was prepared: this device is not served")
    return params


@functools.partial(jax.jit, static_argnums=(0,))
def _dense(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.bfloat16)
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[0] ** -0.5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantized(shape: tuple[int, int], spec: QuantSpec, key: jax.Array) -> Any:
    k, n = shape
    if spec.activation is None:
        p = Problem(1, k, n, spec.group_size, spec.symmetric)
        codes, scale, zero, _ = random_parts(key, p)
        return from_codes(codes, scale, zero, spec)
    codes = random_codes(key, shape, spec.dtype)
    if spec.dtype != FP8:
        codes = (codes.astype(jnp.int32) + spec.zero_offset).astype(jnp.uint8)
    # Of weights with the variance 1 / K.
    scale = jnp.full(spec.scale_shape(k, n), 1 / (80 * k**0.5), jnp.float32)
    return from_codes(codes, scale, None, spec)


def loop(
    model: Decoder, params: Any, batch: int, steps: int = STEPS, timer: str = "wall"
) -> dict[str, Any]:
    """Greedy steps on a cache, all in one program; milliseconds per step, and what they go to."""

    @jax.jit  # the cache is not donated, so that one serves every call
    def run(params, token, cache):
        def step(carry, _):
            token, cache = carry
            output: Any = model.apply({"params": params}, token[:, None], cache=cache)
            logits, cache = output
            token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            return (token, cache), jnp.max(logits)

        (token, cache), tops = jax.lax.scan(step, (token, cache), length=steps)
        return token, cache, tops

    token = jnp.arange(1, batch + 1, dtype=jnp.int32)
    cache = init_cache(model.config, batch, CAPACITY, model.dtype)
    start = time.perf_counter()
    program = run.lower(params, token, cache).compile()
    compiled = time.perf_counter() - start
    times, finite = [], True
    for _ in range(6):
        start = time.perf_counter()
        out = jax.block_until_ready(program(params, token, cache))
        times.append(1e3 * (time.perf_counter() - start) / steps)
        finite = finite and bool(jnp.isfinite(out[2]).all())
    step_ms = statistics.median(times[1:])
    told = {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch / step_ms,
        "compile_s": round(compiled, 1),
        "finite": finite,
        **_memory(program),
    }
    if timer == "cupti":
        try:
            calls = timing.cupti_calls(program, (params, token, cache), 2)
            busy = sum(us for _, us in calls[0]) / steps / 1e3
            told |= {"busy_ms": busy, "kernels": timing.by_kernel(calls, steps)}
        except Exception as error:  # the times above stand without it
            told["profile_error"] = f"{type(error).__name__}: {error}"[:300]
    return told


def _memory(program: Any) -> dict[str, Any]:
    """Bytes that a compiled program holds at most: arguments, results and what it needs between."""
    told = program.memory_analysis()
    if told is None:
        return {}
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return {"peak_bytes": sum(getattr(told, part) for part in parts) - told.alias_size_in_bytes}


def by_steps(model: Decoder, params: Any, batch: int, steps: int = 2 * STEPS) -> dict[str, Any]:
    """Greedy steps on a cache, a program for each, waited for: the median and the slow end."""

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token, cache):
        output: Any = model.apply({"params": params}, token[:, None], cache=cache)
        logits, cache = output
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache

    token = jnp.arange(1, batch + 1, dtype=jnp.int32)
    cache = init_cache(model.config, batch, CAPACITY, model.dtype)
    program = step.lower(params, token, cache).compile()
    times = []
    for _ in range(steps + 4):
        start = time.perf_counter()
        token, cache = jax.block_until_ready(program(params, token, cache))
        times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times[4:], n=20)
    middle = statistics.median(times[4:])
    tokens = {"tokens_per_s": 1e3 * batch / middle, **_memory(program)}
    return {"step_ms": middle, "p50_ms": middle, "p95_ms": cuts[18], **tokens}


def prefill(model: Decoder, params: Any, batch: int, length: int = PROMPT) -> dict[str, Any]:
    """Prompts of equal length into an empty cache; tokens of the prompts per second."""

    @jax.jit
    def run(params, tokens, cache):
        output: Any = model.apply({"params": params}, tokens, cache=cache)
        logits, cache = output
        return jnp.argmax(logits[:, -1], axis=-1), cache

    tokens = jax.random.randint(jax.random.key(3), (batch, length), 1, model.config.vocab_size)
    cache = init_cache(model.config, batch, length, model.dtype)
    program = run.lower(params, tokens, cache).compile()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(params, tokens, cache))
        times.append(1e3 * (time.perf_counter() - start))
    step_ms = statistics.median(times[1:])
    rate = 1e3 * batch * length / step_ms
    return {"step_ms": step_ms, "tokens_per_s": rate, **_memory(program)}


def by_generate(model: Decoder, params: Any, batch: int, steps: int = STEPS) -> dict[str, Any]:
    """`generate`, its prefill of 16 tokens included once in each: the slope between two lengths."""
    prompts = [[7 * i + j + 1 for j in range(16)] for i in range(batch)]

    def seconds(new: int) -> float:
        start = time.perf_counter()
        rows = generate(model, params, prompts, new, eos_token_ids=())
        assert all(len(row) == new for row in rows)
        return time.perf_counter() - start

    first = seconds(steps)
    # Both lengths need the same capacity of the cache, and so the same programs.
    short = statistics.median([seconds(4) for _ in range(4)][1:])
    long = statistics.median([seconds(steps) for _ in range(3)])
    step_ms = 1e3 * (long - short) / (steps - 4)
    return {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch / step_ms,
        "first_call_s": round(first, 1),
        "short_s": short,
    }
