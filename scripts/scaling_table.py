"""How quantization scales over devices, by arithmetic: what each computes and sends for a block.

    python scripts/scaling_table.py [--models llama-3-8b llama-3-70b] [--devices 1 8 64]

Nothing is run: the numbers are those of `jq.communication`, whose bytes the tests compare with the
compiled programs.  The last columns turn them into time, at the rates that the options give and
with nothing overlapped.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq.advise.known import CONFIGS
from jq.communication import collectives, sent, share
from jq.methods.cholesky import products
from jq.models import Decoder, ModelConfig
from jq.models.hf_names import block_table
from jq.presets import default_recipe
from jq.requirements.workload import Block, Run, run_of

HEADER = (
    "| model | devices | 16-bit TFLOP | float32 TFLOP | of it factors | GB sent | ms | speedup |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What to tabulate.

    Attributes:
        models: names of `jq.advise.known`.
        devices: how many share the work.
        samples, seq_len: calibration tokens.
        products, wide_products: operations per second of a device, in 16 bits and in float32.
        link: bytes per second that a device sends.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = (
        "llama-3-8b",
        "llama-3-70b",
    )
    devices: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (1, 8, 64)
    samples: int = 128
    seq_len: int = 2048
    products: float = 500e12
    wide_products: float = 40e12
    link: float = 300e9


def block_of(model: str, samples: int, seq_len: int) -> tuple[Run, Block, int]:
    """A run of the default recipe on one block of a known model: (run, block, arrays in it)."""
    config = ModelConfig.from_hf(dict(CONFIGS[model]))
    decoder = Decoder(config)
    shapes = {entry.path: entry.shape for entry in block_table(config, 0)}
    run = run_of(
        ("layers_0",),
        decoder.linear_groups,
        shapes,
        default_recipe(),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        tokens=(samples, seq_len),
    )
    return run, run.blocks[0][0], len(shapes)


def rows(options: Scaling) -> list[str]:
    """The lines of the table."""
    out = []
    for model in options.models:
        run, block, arrays = block_of(model, options.samples, options.seq_len)
        sizes = [group.k for group in block.groups if group.uses_hessian]
        alone = 0.0
        for count in options.devices:
            work = share(run, block, count)
            factors = sum(products(k, count) for k in sizes)
            travel = sent(collectives(run, block, count, arrays=arrays), count)
            seconds = work.products / options.products + work.wide_products / options.wide_products
            seconds += travel / options.link
            alone = seconds if count == 1 else alone
            speedup = f"{alone / seconds:.1f}" if alone else ""
            out.append(
                f"| {model} | {count} | {work.products / 1e12:.1f} | "
                f"{work.wide_products / 1e12:.2f} | {factors / 1e12:.2f} | {travel / 1e9:.2f} | "
                f"{seconds * 1e3:.0f} | {speedup} |"
            )
    return out


def main(options: Scaling) -> int:
    """Print the table."""
    print(HEADER)
    print("\n".join(rows(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Scaling, description=__doc__)))
