"""Runs the clients in their environments, and ours beside them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jq
from jq import tree
from jq.models.hf_names import weight_table
from jq.qtensor import QTensor

CLIENTS = Path(__file__).with_name("clients")
# client -> (its environment, the program that loads)
LOADERS = {
    "transformers + compressed-tensors": ("llmcompressor", "load_transformers.py"),
    "GPTQModel, torch kernels (float16)": ("gptqmodel", "load_gptqmodel.py"),
    "AutoAWQ's dequantizer": ("autoawq", "load_autoawq.py"),
}
# environment -> the program with which the tool quantizes
MAKERS = {
    "llmcompressor": "make_llmcompressor.py",
    "gptqmodel": "make_gptqmodel.py",
    "autoawq": "make_autoawq.py",
}
TRANSFORMERS, GPTQMODEL, AUTOAWQ = LOADERS


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison: the largest difference of logits, and the largest logit; the largest difference
    of a weight of the first block, relative to the largest weight of its linear; whether
    activations were rounded to 8 bits."""

    folder: str
    direction: str
    client: str
    logits: float
    largest: float
    weights: float
    rounded: bool

    @property
    def relative(self) -> float:
        return self.logits / self.largest


def environments() -> Path | None:
    """The folder of the clients' environments, as tests/interop/run says."""
    folder = os.environ.get("JAXQ_INTEROP")
    return None if folder is None else Path(folder)


def run_client(environment: str, program: str, *arguments: object) -> None:
    """Run a client program; its output becomes the error message where it fails."""
    root = environments()
    assert root is not None
    command = [str(root.absolute() / environment / "bin" / "python"), str(CLIENTS / program)]
    with tempfile.TemporaryDirectory() as folder:  # some leave logs where they run
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
    assert done.returncode == 0, f"{program}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def client_of(folder: Path, quant_method: str) -> tuple[str, ...]:
    """Who opens a folder."""
    if quant_method == "compressed-tensors":
        return (TRANSFORMERS,)
    return (GPTQMODEL,) if quant_method == "gptq" else (GPTQMODEL, AUTOAWQ)


def compare(folder: Path, direction: str, client: str, tokens: np.ndarray, told: Path) -> list[Row]:
    """Our logits and weights of a folder against what a client saved of it.

    Where activations are quantized, that is done once with them and once without: rounding
    activations turns differences in the last bit into ones as large as the rounding itself.
    """
    model, params = jq.load(folder)
    modules = {e.key.removesuffix(".weight"): e.path for e in weight_table(model.config)}
    with np.load(told / f"{folder.name}.npz") as file:
        saved = dict(file)
    logits, plain = saved.pop("logits"), saved.pop("plain", None)
    differences = [_weight_difference(tree.get(params, modules[n]), w) for n, w in saved.items()]
    assert len(differences) == 7

    def row(name: str, params: dict[str, Any], theirs: np.ndarray, rounded: bool) -> Row:
        ours = np.asarray(model.apply({"params": params}, tokens), np.float32)
        assert np.isfinite(theirs).all()
        difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        return Row(name, direction, client, difference, largest, max(differences), rounded)

    if plain is None:
        return [row(folder.name, params, logits, False)]
    return [
        row(f"{folder.name}, activations in float32", _weights_only(params), plain, False),
        row(folder.name, params, logits, True),
    ]


def _weights_only(node: Any) -> Any:
    """Parameters whose linears do not quantize their inputs."""
    if isinstance(node, dict):
        return {name: _weights_only(child) for name, child in node.items()}
    if not isinstance(node, QTensor):
        return node
    spec = dataclasses.replace(node.spec, activation=None)
    return dataclasses.replace(node, spec=spec, input_scale=None)


def _weight_difference(w: QTensor | jax.Array, theirs: np.ndarray) -> float:
    """Theirs is [out, in]."""
    ours = np.asarray(w.dequantize() if isinstance(w, QTensor) else w, np.float32).T
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| folder | made by | opened by | largest logit difference | of logits up to | weights |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.folder} | {r.direction} | {r.client} | {r.logits:.2g} | {r.largest:.1f} "
        f"| {r.weights:.1g} |"
        for r in rows
    ]
    return "\n".join(lines)
