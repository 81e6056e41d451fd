"""`jaxq doctor`: what this machine's devices run, tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jq.cli.options import parse
from jq.cli.output import print_facts, print_json, print_table

ABOUT = """Print versions and devices, which products run how on which GPUs, and try them here.

Every kind of product is multiplied on a small weight and compared with float64: by its kernel where
the device has one, by XLA elsewhere. The exit code is 1 where one fails."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Options of the command."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="print JSON")] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Doctor, "doctor", ABOUT, arguments)

    import jax

    from jq.checkpoint.manifest import library_versions
    from jq.doctor import trials
    from jq.kernels.choice import capability_of
    from jq.support import rows

    capability, device = capability_of(None)
    facts = {
        "versions": library_versions(),
        "device": device,
        "devices": len(jax.devices()),
        "matrix": [
            {
                "gpus": row.label,
                "this machine": row.capability == capability,
                **{product: dataclasses.asdict(cell) for product, cell in row.cells.items()},
            }
            for row in rows()
        ],
    }
    if not args.json:
        _print(facts)
    tried = list(trials())
    if args.json:
        print_json({**facts, "trials": [dataclasses.asdict(t) for t in tried]})
    else:
        _print_trials(tried)
    return 0 if all(trial.passed for trial in tried) else 1


def _print(facts: dict[str, Any]) -> None:
    from jq.support import PRODUCTS

    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    count = facts["devices"]
    print_facts(
        [
            ("versions", versions),
            ("device", facts["device"] + (f", one of {count}" if count > 1 else "")),
        ]
    )
    print()
    lines = [
        ["->" if row["this machine"] else "", row["gpus"]]
        + [row[product]["verdict"] for product in PRODUCTS]
        for row in facts["matrix"]
    ]
    print_table(["", "GPUs", *PRODUCTS.values()], lines, "ll" + "l" * len(PRODUCTS))
    if not any(row["this machine"] for row in facts["matrix"]):
        print(f"\n{facts['device']} is none of these: XLA multiplies")
    print()


def _print_trials(tried: Sequence[Any]) -> None:
    lines = []
    for trial in tried:
        error = "" if trial.error is None else f"{trial.error:.1e}"
        outcome = "ok" if trial.passed else f"FAILED: {trial.failure}"
        lines.append([trial.name, str(trial.rows), trial.kernel, error, outcome])
    print_table(["product", "rows", "ran on", "error", ""], lines, "lrlrl")
    reasons = dict.fromkeys(t.why for t in tried if t.kernel == "reference")
    kernels = sum(t.kernel != "reference" for t in tried)
    print(f"\n{kernels} of {len(tried)} ran on kernels")
    for reason in reasons:
        print(f"reference: {reason}")
