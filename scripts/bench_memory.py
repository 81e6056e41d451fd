"""Peak host memory of quantizing, against the number of layers.

    python scripts/bench_memory.py [--layers 4 16] [--method gptq] [--hidden 1024]
    python scripts/bench_memory.py --shape llama-3-8b --layers 2 8 --csv scripts/results/memory.csv

Random Llama folders of several depths are quantized, each in a process of its own. Streaming means
that the peak stays while the weights grow: the last column is growth of the peak over growth of the
weights, 0 for streaming, 1 or more for a program that loads the model, and a quarter for one that
keeps 4-bit results.  Each block's own peak and seconds go to --csv, a line per block, beside what
`jq.requirements` expects.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq.advise.known import find_model
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
        shape: "llama-3-8b" takes that model's blocks and vocabulary instead.
        samples, seq_len: calibration tokens.
        csv: a file that gets a line per block; lines are added.
        scratch: where models and outputs stand meanwhile; a folder of the system's by default.
    """

    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (4, 16)
    method: str = "gptq"
    hidden: int = 1024
    shape: Literal["small", "llama-3-8b"] = "small"
    samples: int = 4
    seq_len: int = 128
    csv: Path | None = None
    scratch: Path | None = None

    def config(self, layers: int) -> ModelConfig:
        """The model of this depth."""
        if self.shape == "small":
            return model_config(self.hidden, layers)
        return LLAMA_3_8B.with_changes(num_hidden_layers=layers, layer_windows=())


COLUMNS = ("shape", "layers", "method", "tokens", "block", "peak_mb", "seconds")

LLAMA_3_8B = find_model("llama-3-8b")[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """Bytes of the model's blocks, and the most that the process held.

    blocks: of each, the bytes it held at most and the seconds it took; compilation is the first's.
    rest_bytes: the most that was held before the first block and after the last.
    """

    layers: int
    weight_bytes: int
    peak_bytes: int
    blocks: tuple[tuple[int, float], ...] = ()
    rest_bytes: int = 0


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
    out = np.empty(entry.stored_shape, ml_dtypes.bfloat16)
    rows = max(1, 2**22 // out.shape[1])  # at a time: an embedding in float32 would take gigabytes
    for start in range(0, len(out), rows):
        some = out[start : start + rows]
        some[:] = rng.standard_normal(some.shape, np.float32) / np.sqrt(entry.shape[0])
    return out


def measure(bench: Bench, layers: int) -> Result:
    """Quantize a model of this depth in a process of its own."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        folder = Path(scratch, "model")
        folder.mkdir()
        config = bench.config(layers)
        weight_bytes = write_model(folder, config)
        ids = np.random.default_rng(1).integers(
            0, config.vocab_size, (bench.samples, bench.seq_len)
        )
        np.save(Path(scratch, "tokens.npy"), ids)
        arguments = [sys.executable, __file__, "--child", scratch, bench.method]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode:
            raise SystemExit(f"{layers} layers failed:\n{done.stderr}")
        told = json.loads(done.stdout.splitlines()[-1])
        blocks = tuple((peak, seconds) for peak, seconds in told["blocks"])
        return Result(layers, weight_bytes, told["peak"], blocks, told["rest"])


def child(scratch: Path, method: str) -> None:
    """Quantize, and print the most memory this process held, in bytes: in all, and per block."""
    from jq.calib.source import calibration_data
    from jq.pipeline import quantize_checkpoint
    from jq.presets import preset
    from jq.recipe import uniform

    tokens = np.load(scratch / "tokens.npy")
    calibration = calibration_data(
        calibration_config(scratch, *tokens.shape),
        vocab_size=read_config(scratch).vocab_size,
    )
    recipe = uniform(*preset(method))
    watch = BlockWatch()
    report = quantize_checkpoint(
        scratch / "model", scratch / "out", recipe, calibration, progress=watch
    )
    peaks = watch.finish()
    seconds = [block.seconds for block in report.blocks]
    told = {
        "peak": max([*peaks, watch.rest]),
        "blocks": list(zip(peaks, seconds, strict=True)),
        "rest": watch.rest,
    }
    print(json.dumps(told))


def calibration_config(scratch: Path, samples: int, seq_len: int) -> Any:
    """All of the tokens that stand in the folder."""
    from jq.calib.config import CalibrationConfig

    return CalibrationConfig(
        str(scratch / "tokens.npy"), calib_samples=samples, calib_seqlen=seq_len
    )


def read_config(scratch: Path) -> ModelConfig:
    """Of the model in the folder."""
    return ModelConfig.from_hf(json.loads((scratch / "model" / "config.json").read_text()))


class BlockWatch:
    """A progress callback that notes the peak memory of each block.

    The kernel's high-water mark is read and set back after each group of linears; running a block
    to its end and writing it counts with the next one.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.rest = peak_bytes()
        forget_peak()

    def __call__(self, step: Any) -> None:
        self.peaks[step.block] = max(self.peaks.get(step.block, 0), peak_bytes())
        forget_peak()

    def finish(self) -> list[int]:
        """Peaks of the blocks, in order; `rest` is then the most outside them."""
        self.rest = max(self.rest, peak_bytes())
        return list(self.peaks.values())


def forget_peak() -> None:
    """Set the high-water mark of this process's memory to what it holds now, on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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
    print(f"{'layers':>6}  {'weights MB':>10}  {'peak MB':>8}  {'growth':>6}  {'s per block':>11}")
    first = None
    for layers in bench.layers:
        result = measure(bench, layers)
        ratio = "" if first is None else f"{growth(first, result):.3f}"
        first = first or result
        weights, peak = result.weight_bytes / 1e6, result.peak_bytes / 1e6
        seconds = np.median([seconds for _, seconds in result.blocks[1:] or result.blocks])
        print(
            f"{layers:>6}  {weights:>10.1f}  {peak:>8.1f}  {ratio:>6}  {seconds:>11.1f}", flush=True
        )
        if bench.csv is not None:
            add_lines(bench, result, bench.csv)


def add_lines(bench: Bench, result: Result, file: Path) -> None:
    """A line per block."""
    new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for number, (peak, seconds) in enumerate(result.blocks):
            name = bench.shape if bench.shape != "small" else f"hidden {bench.hidden}"
            where = (name, result.layers, bench.method, bench.samples * bench.seq_len)
            writer.writerow((*where, number, round(peak / 1e6), f"{seconds:.1f}"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
    else:
        main(tyro.cli(Bench, description=__doc__))
