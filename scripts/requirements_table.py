"""What quantizing large models needs, from the formulas of `jq.requirements`; nothing is run.

    python scripts/requirements_table.py [--csv scripts/results/requirements.csv]

Llama-3 with 8, 70 and 405 billion parameters, each method with hidden states on the device and
offloaded, 128 x 2048 tokens, bfloat16, as a table in markdown.  Times are for the rates of an
H200's data sheet (989 TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s), of which half is taken to be
reached, and leave out what offloaded states take to the host and back: they are estimates, and were
not measured.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find jq

from jq.advise.known import find_model
from jq.models import Decoder
from jq.models.hf_names import weight_table
from jq.presets import preset
from jq.recipe import needs_calibration, uniform
from jq.requirements import Rates, estimate, requirements, run_of

H200 = Rates(products=989e12, wide_products=67e12, moved=4.8e12)
COLUMNS: tuple[str, ...] = (
    "model",
    "method",
    "offload",
    "device_gb",
    "host_gb",
    "disk_gb",
    "hours_h200",
)
_HEADERS = ("model", "method", "hidden states on", "device", "host", "disk", "H200, estimate")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
        models: names that `jaxq advise` knows.
        methods: presets.
        samples, seq_len: of the calibration set.
        csv: a file to write, beside the table.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = (
        "llama-3-8b",
        "llama-3-70b",
        "llama-3.1-405b",
    )
    methods: tuple[str, ...] = ("rtn", "gptq", "awq")
    samples: int = 128
    seq_len: int = 2048
    csv: Path | None = None


def row(name: str, method: str, tokens: tuple[int, int], *, offload: bool) -> dict[str, Any]:
    """What one run needs, in GB and hours."""
    _, config = find_model(name)
    model, recipe = Decoder(config), uniform(*preset(method))
    run = run_of(
        model.block_names,
        model.linear_groups,
        {entry.path: entry.shape for entry in weight_table(config)},
        recipe,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        tokens=tokens if needs_calibration(recipe[0]) else None,
        offload=offload,
    )
    needed = requirements(run)
    seconds = estimate(needed.arithmetic, H200, needed.disk)
    sizes = (round(count / 1e9, 1) for count in (needed.device, needed.host, needed.disk))
    values = (name, method, offload, *sizes, round(seconds / 3600, 2))
    return dict(zip(COLUMNS, values, strict=True))


def table(options: Options) -> list[dict[str, Any]]:
    """Every model with every method; offloaded too, where there is something to offload."""
    tokens, rows = (options.samples, options.seq_len), []
    for name in options.models:
        for method in options.methods:
            calibrates = needs_calibration(uniform(*preset(method))[0])
            for offload in (False, True) if calibrates else (False,):
                rows.append(row(name, method, tokens, offload=offload))
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [f"| {' | '.join(_HEADERS)} |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for r in rows:
        where = "host" if r["offload"] else "device"
        where = "none" if r["method"] == "rtn" else where
        sizes = " | ".join(f"{r[key]} GB" for key in ("device_gb", "host_gb", "disk_gb"))
        lines.append(f"| {r['model']} | {r['method']} | {where} | {sizes} | {r['hours_h200']} h |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Print, and write."""
    rows = table(options)
    print(markdown(rows), end="")
    if options.csv is not None:
        with options.csv.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
