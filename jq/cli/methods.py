"""`jaxq methods`: the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from jq.cli.options import parse
from jq.cli.output import print_json, print_table
from jq.presets import DEFAULT, PRESETS, preset
from jq.recipe import needs_calibration, uniform


@dataclasses.dataclass(frozen=True)
class Methods:
    """Options of the command."""

    json: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="print JSON, with every option")
    ] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Methods, "methods", "List the methods that quantize knows.", arguments)
    if args.json:
        from jq.pipeline import recipe_json

        print_json({name: recipe_json(uniform(*preset(name)))[0] for name in PRESETS})
        return 0
    rows = []
    for name, entry in PRESETS.items():
        spec, method = preset(name)
        rule = uniform(spec, method)[0]
        group = "per output" if spec.group_size == -1 else str(spec.group_size)
        rows.append(
            (
                name + (" (default)" if name == DEFAULT else ""),
                spec.dtype,
                group,
                entry.activation,
                "yes" if needs_calibration(rule) else "no",
                entry.summary,
            )
        )
    headers = ("method", "weights", "group size", "activation", "calibration", "what it does")
    print_table(headers, rows, "llllll")
    print("\njaxq quantize MODEL --out DIR --method NAME --help lists a method's options.")
    return 0
