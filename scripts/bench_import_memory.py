"""Peak host memory of reading other tools' folders, above the size of the parameters.

    python scripts/bench_import_memory.py [--layers 4 16] [--format gptq] [--hidden 1024]

Random Llama folders, a weight file per layer, are loaded each in a process of its own. Converting
one linear at a time from mapped files means that the peak is that of the parameters, however many
there are, and at most one file and one linear more; the last two columns are what it was and what
it may be.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq.models import ModelConfig
from jq.models.hf_names import WeightEntry, block_table, outer_table
from jq.models.safetensors_file import write_safetensors
from scripts.bench_memory import MALLOC, model_config, peak_bytes

Format = Literal["gptq", "gptq-act-order", "awq", "compressed-tensors", "float8"]
_GROUP = 128
_WEIGHTS = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": _GROUP}
_FLOAT8 = {"type": "float", "num_bits": 8, "strategy": "channel"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        layers: depths.
        format: of the folders.
        hidden: size of the model; its MLP is 2.75 times as wide.
    """

    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (4, 16)
    format: Format = "gptq"
    hidden: int = 1024


@dataclasses.dataclass(frozen=True)
class Folder:
    """Bytes of the largest file and of the largest linear, as stored."""

    file_bytes: int
    linear_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """Bytes of the parameters, and what the process held above those it had before."""

    param_bytes: int
    peak_bytes: int


def write_folder(folder: Path, config: ModelConfig, form: Format) -> Folder:
    """A model of random codes; a file per layer and one for what is outside."""
    rng = np.random.default_rng(0)
    tables = [outer_table(config)]
    tables += [block_table(config, i) for i in range(config.num_hidden_layers)]
    weight_map, sizes, linears = {}, [], []
    for number, table in enumerate(tables):
        tensors: dict[str, np.ndarray] = {}
        for entry in table:
            if not number or len(entry.shape) == 1:
                tensors[entry.key] = np.ones(entry.stored_shape, ml_dtypes.bfloat16)
                continue
            linear = random_linear(entry, form, rng)
            tensors |= linear
            linears.append(sum(array.nbytes for array in linear.values()))
        name = f"model-{number:05}.safetensors"
        write_safetensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        sizes.append((folder / name).stat().st_size)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    raw = config.to_hf() | {"quantization_config": quantization(form)}
    (folder / "config.json").write_text(json.dumps(raw))
    return Folder(max(sizes), max(linears))


def random_linear(
    entry: WeightEntry, form: Format, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The tensors of one linear with 4-bit codes (or float8) of any value."""
    k, n = entry.shape
    groups = k // _GROUP
    module = entry.key.removesuffix(".weight")

    def words(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape, np.int32)

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float16)

    match form:
        case "gptq" | "gptq-act-order":
            g_idx = np.arange(k, dtype=np.int32) // _GROUP
            order = rng.permutation(k) if form == "gptq-act-order" else slice(None)
            stored = {"qweight": words(k // 8, n), "qzeros": words(groups, n // 8)}
            stored |= {"scales": ones(groups, n), "g_idx": g_idx[order]}
        case "awq":
            stored = {"qweight": words(k, n // 8), "qzeros": words(groups, n // 8)}
            stored |= {"scales": ones(groups, n)}
        case "compressed-tensors":
            stored = {"weight_packed": words(n, k // 8), "weight_scale": ones(n, groups)}
            stored |= {"weight_shape": np.array([n, k], np.int64)}
        case "float8":
            codes = np.full((n, k), 1.5, ml_dtypes.float8_e4m3fn)
            stored = {"weight": codes, "weight_scale": ones(n, 1)}
    return {f"{module}.{suffix}": array for suffix, array in stored.items()}


def quantization(form: Format) -> dict[str, Any]:
    """The quantization_config of a folder."""
    match form:
        case "gptq" | "gptq-act-order":
            order = form == "gptq-act-order"
            config = {"quant_method": "gptq", "bits": 4, "group_size": _GROUP}
            return config | {"sym": False, "desc_act": order}
        case "awq":
            return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": _GROUP}
        case "compressed-tensors" | "float8":
            packed = form == "compressed-tensors"
            group = {"targets": ["Linear"], "weights": _WEIGHTS if packed else _FLOAT8}
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized" if packed else "float-quantized",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head"],
            }


def measure(bench: Bench, layers: int) -> tuple[Folder, Result]:
    """Load a model of this depth in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        written = write_folder(folder, model_config(bench.hidden, layers), bench.format)
        arguments = [sys.executable, __file__, "--child", scratch]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode:
            raise SystemExit(f"{layers} layers failed:\n{done.stderr}")
        return written, Result(*map(int, done.stdout.split()[-2:]))


def child(folder: Path) -> None:
    """Load, and print the bytes of the parameters and those the peak was above the start."""
    import jax
    import jax.numpy as jnp

    from jq.api import load

    jnp.zeros(1).block_until_ready()  # the backend's own memory is there before
    before = peak_bytes()
    _, params = load(folder)
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), peak_bytes() - before)


def main(bench: Bench) -> None:
    """Measure and print."""
    titles = ("layers", "parameters MB", "peak MB", "above MB", "file + linear MB")
    print("  ".join(f"{title:>8}" for title in titles))
    for layers in bench.layers:
        written, result = measure(bench, layers)
        allowed = written.file_bytes + written.linear_bytes
        above = result.peak_bytes - result.param_bytes
        print(
            f"{layers:>8}  {result.param_bytes / 1e6:>13.1f}  {result.peak_bytes / 1e6:>8.1f}  "
            f"{above / 1e6:>8.1f}  {allowed / 1e6:>16.1f}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        main(tyro.cli(Bench, description=__doc__))
