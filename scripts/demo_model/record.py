"""The README of a trained model: what it is, how it was made, what it scores."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax

from jq import tree
from jq.methods.rtn import rtn_quantize
from jq.models import ModelConfig
from jq.models.hf_names import weight_table
from jq.spec import QuantSpec
from scripts.demo_model.training import Settings

THREE_BITS = QuantSpec("int3", 128, symmetric=False)


def round_to_nearest(params: Mapping[str, Any], spec: QuantSpec = THREE_BITS) -> dict[str, Any]:
    """The parameters with the kernels of all blocks rounded to the nearest grid points, in the
    kernels' own dtype."""
    out = dict(params)
    for path, leaf in tree.leaves(params):
        if path.startswith("layers_") and path.endswith("/kernel"):
            rounded = rtn_quantize(leaf, spec).dequantize(spec)
            out = tree.replace(out, path, rounded.astype(leaf.dtype))
    return out


def readme(
    config: ModelConfig,
    settings: Settings,
    log: Sequence[Mapping[str, Any]],
    train_tokens: int,
    held_out_tokens: int,
    loss: float,
    rounded_loss: float,
) -> str:
    """Markdown.

    Args:
        settings: of the last run.
        log: entries with step, loss, held_out, seconds and settings, in order.
        loss, rounded_loss: held-out loss in nats a token of the saved model, and of it after
            3-bit rounding.
    """
    rows = "\n".join(
        f"| {e['step']} | {e['loss']:.3f} | {e['held_out']:.3f} |" for e in _thinned(log, 12)
    )
    shape = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, intermediate size "
        f"{config.intermediate_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} key-value heads, vocabulary {config.vocab_size}, tied "
        f"embeddings, context {config.max_position_embeddings}"
    )
    tokens = settings.steps * settings.batch_size * settings.seq_len
    return f"""# The demonstration model

A Llama-architecture language model of Python's own documentation: {shape}.
{parameters(config):,} parameters, bfloat16. It is small enough to ship and to quantize in seconds,
and it writes text that looks like Python's help; it is no source of facts about Python.

    python scripts/train_demo_model.py --out jq/demo_model

made every file here, from the text that Python {platform.python_version()} carries: the topics of
`help()` and the docstrings of its standard library and built-ins.

| file | what it is |
| --- | --- |
| `config.json`, `model.safetensors` | the model, in Hugging Face layout |
| `tokenizer.json`, `tokenizer_config.json` | byte-level BPE, trained on the training text |
| `evaluation.txt` | held-out documents, {held_out_tokens:,} tokens; no run of ten words of a \
paragraph is in the training text |
| `calibration.txt` | some of the training text |

The texts are parts of Python's documentation, copyright Python Software Foundation, under the
[PSF License](https://docs.python.org/3/license.html).

## Quality
Perplexity on `evaluation.txt`, token level, float32 arithmetic; non-overlapping windows of
{config.max_position_embeddings} tokens, all but the first of each scored:

| weights | perplexity |
| --- | --- |
| bfloat16, as shipped | {math.exp(loss):.3f} |
| 3 bits, groups of 128, asymmetric, rounded to nearest | {math.exp(rounded_loss):.3f} |

## Training
{train_tokens:,} tokens of text; {tokens:,} tokens seen, {tokens / train_tokens:.1f} epochs.
Muon for the kernels, AdamW for embedding and norms.

{settings_text(settings, log)}

Run on {datetime.date.today():%d %B %Y}, {sum_of_runs(log):.0f} seconds on \
{jax.devices()[0].platform.upper()}, JAX {jax.__version__}, optax {version("optax")}, \
tokenizers {version("tokenizers")}.

| step | training loss | held-out loss |
| --- | --- | --- |
{rows}

Losses are in nats a token, of the float32 weights.
"""


def settings_text(settings: Settings, log: Sequence[Mapping[str, Any]]) -> str:
    """A list of the settings, and of which steps ran under others (a run that was resumed)."""
    last = dataclasses.asdict(settings)
    ends: list[tuple[int, Mapping[str, Any]]] = []
    for entry in log:
        used = entry.get("settings", {})
        if ends and ends[-1][1] == used:
            ends.pop()
        ends.append((entry["step"], used))
    text = ", ".join(f"{k} {v}" for k, v in last.items())
    lines = [f"* {text}"]
    for step, used in ends:
        changed = {k: used[k] for k in last if k in used and used[k] != last[k]}
        if changed:
            others = ", ".join(f"{k} {v}" for k, v in changed.items())
            lines.append(f"* up to step {step} with {others}, then resumed")
        elif not used:
            lines.append(f"* up to step {step} the settings were not recorded")
    return "\n".join(lines)


def parameters(config: ModelConfig) -> int:
    """Number of weights."""
    return sum(math.prod(entry.shape) for entry in weight_table(config))


def sum_of_runs(log: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all runs that made the log: each starts to count at 0."""
    ends = [
        entry["seconds"]
        for entry, after in zip(log, [*log[1:], {"seconds": 0}], strict=True)
        if after["seconds"] < entry["seconds"]
    ]
    return float(sum(ends))


def _thinned(log: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    every = -(-len(log) // most)
    return list(log[::-1][::every][::-1])
