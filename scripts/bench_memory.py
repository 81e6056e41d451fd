"""Peak host memory of quantizing, against the number of layers.

    python scripts/bench_memory.py [--layers 4 16] [--method gptq] [--hidden 1024]

Random Llama folders of several depths are quantized, each in a process of its own. Streaming means
that the peak stays while the weights grow: the last column is growth of the peak over growth of the
weights, 0 for streaming, 1 or more for a program that loads the model, and a quarter for one that
keeps 4-bit results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq.models import ModelConfig
from jq.models.hf_names import WeightEntry, block_table, outer_table
from jq.models.safetensors_file import write_safetensors

# By default glibc keeps freed blocks of up to 32 MB for itself, some 100 MB in all after a few
# layers: what is to be measured is what the program holds.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        layers: depths.
        method: a preset of `jq.presets`.
        hidden: size of the model; its MLP is 2.75 times as wide.
        samples, seq_len: calibration tokens.
    """

    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (4, 16)
    method: str = "gptq"
    hidden: int = 1024
    samples: int = 4
    seq_len: int = 128


@dataclasses.dataclass(frozen=True)
class Result:
    """Bytes of the model's blocks, and the most that the process held."""

    layers: int
    weight_bytes: int
    peak_bytes: int


def model_config(hidden: int, layers: int) -> ModelConfig:
    """A Llama of this size."""
    return ModelConfig(
        model_type="llama",
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
    )


def write_model(folder: Path, config: ModelConfig) -> int:
    """Random bfloat16 weights, a file per layer; returns the bytes of the blocks."""
    rng = np.random.default_rng(0)
    tables = [outer_table(config)]
    tables += [block_table(config, i) for i in range(config.num_hidden_layers)]
    weight_map, block_bytes = {}, 0
    for number, table in enumerate(tables):
        name = f"model-{number:05}.safetensors"
        tensors = {entry.key: _random(entry, rng) for entry in table}
        write_safetensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        block_bytes += sum(array.nbytes for array in tensors.values()) if number else 0
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return block_bytes


def _random(entry: WeightEntry, rng: np.random.Generator) -> np.ndarray:
    if len(entry.shape) == 1:
        return np.ones(entry.stored_shape, ml_dtypes.bfloat16)
    values = rng.standard_normal(entry.stored_shape, np.float32)
    return (values / np.sqrt(entry.shape[0])).astype(ml_dtypes.bfloat16)


def measure(bench: Bench, layers: int) -> Result:
    """Quantize a model of this depth in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        folder.mkdir()
        weight_bytes = write_model(folder, model_config(bench.hidden, layers))
        np.save(
            Path(scratch, "tokens.npy"),
            np.random.default_rng(1).integers(0, 1024, (bench.samples, bench.seq_len)),
        )
        arguments = [sys.executable, __file__, "--child", scratch, bench.method]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode:
            raise SystemExit(f"{layers} layers failed:\n{done.stderr}")
        return Result(layers, weight_bytes, int(done.stdout.split()[-1]))


def child(scratch: Path, method: str) -> None:
    """Quantize, and print the most memory this process held, in bytes."""
    from jq.calib.config import CalibrationConfig
    from jq.calib.source import calibration_data
    from jq.pipeline import quantize_checkpoint
    from jq.presets import preset
    from jq.recipe import uniform

    config = CalibrationConfig(str(scratch / "tokens.npy"))
    calibration = calibration_data(config, vocab_size=1024)
    recipe = uniform(*preset(method))
    quantize_checkpoint(scratch / "model", scratch / "out", recipe, calibration)
    print(peak_bytes())


def peak_bytes() -> int:
    """The most resident memory this process had."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the time of the fork
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def growth(smaller: Result, larger: Result) -> float:
    """Additional peak per additional byte of weights."""
    more = larger.weight_bytes - smaller.weight_bytes
    return (larger.peak_bytes - smaller.peak_bytes) / more


def main(bench: Bench) -> None:
    """Measure and print."""
    print(f"{'layers':>6}  {'weights MB':>10}  {'peak MB':>8}  {'growth':>6}")
    first = None
    for layers in bench.layers:
        result = measure(bench, layers)
        ratio = "" if first is None else f"{growth(first, result):.3f}"
        first = first or result
        weights, peak = result.weight_bytes / 1e6, result.peak_bytes / 1e6
        print(f"{layers:>6}  {weights:>10.1f}  {peak:>8.1f}  {ratio:>6}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
    else:
        main(tyro.cli(Bench, description=__doc__))
