"""`jaxq convert`: a quantized model from one format into another, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jq.cli.export_options import FORMATS, Export
from jq.cli.models import model_folder
from jq.cli.options import parse
from jq.cli.output import print_facts, size_text, time_text
from jq.cli.progress import Meter

ABOUT = """Convert a quantized model into another format.

Codes, scales and zero points stay what they are; what the new format cannot express is refused.
Reads jaxq checkpoints, and folders of GPTQ, AWQ and compressed-tensors; writes all of them."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Options of the command."""

    model: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN", help="a quantized model's folder")
    ]
    out: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT", help="the folder to make")
    ]
    format: Annotated[
        Literal[FORMATS],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(help="orbax is jaxq's own"),
    ] = "orbax"
    overwrite: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="replace an existing folder that jaxq has made"),
    ] = False
    export: Export = Export()


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Convert, "convert", ABOUT, arguments)
    options, shard_bytes = args.export.format_options(), args.export.shard_bytes()
    folder = model_folder(str(args.model))

    from jq.formats.convert import convert  # what --help need not wait for

    with Meter("convert") as meter:
        result = convert(
            folder,
            args.out,
            args.format,
            options=options,
            shard_bytes=shard_bytes,
            overwrite=args.overwrite,
            progress=meter.show,
        )
    files = [file for file in result.path.rglob("*") if file.is_file()]
    print_facts(
        [
            (args.format, str(result.path)),
            ("linears", f"{result.linears} quantized"),
            ("files", size_text(sum(file.stat().st_size for file in files))),
            ("time", time_text(result.seconds)),
        ]
    )
    return 0
