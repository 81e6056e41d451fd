"""`jaxq inspect`: what a folder holds."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jq.checkpoint import Manifest, check_files, is_checkpoint, read_manifest
from jq.checkpoint.format import ArrayEntry, QTensorEntry
from jq.cli.models import model_folder
from jq.cli.options import parse
from jq.cli.output import print_facts, print_json, print_table, size_text
from jq.cli.summary import Tensor, Totals, checkpoint_tensors, hf_tensors, read_report, totals
from jq.kernels.choice import Choice, explain

ABOUT = """List the tensors of a checkpoint with their sizes and errors, and the totals.

Plain Hugging Face folders have no errors to show. Weights are not read here, and not verified;
eval and generate do. "products" says which kernel multiplies with the quantized linears on this
machine, and why."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Options of the command."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="DIR", help='a folder, or "demo" for the embedded model'),
    ]
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="print JSON")] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Inspect, "inspect", ABOUT, arguments)
    path = model_folder(args.model)
    manifest = None
    if is_checkpoint(path):
        manifest = read_manifest(path)
        check_files(path, manifest)
        tensors = checkpoint_tensors(manifest, read_report(path))
    else:
        tensors = hf_tensors(path)
    sums = totals(tensors, path)
    kernels = {} if manifest is None else _kernels(manifest)
    if args.json:
        print_json(_json(tensors, sums, manifest, kernels))
        return 0
    _print_tensors(tensors)
    print()
    print_facts(_facts(path, tensors, sums, manifest, kernels))
    return 0


def _kernels(manifest: Manifest) -> dict[str, Choice]:
    """Which kernel each quantized tensor gets on JAX's default device, by path."""
    from jq.api import compute_dtype

    entries = {path: e for part in manifest.parts.values() for path, e in part.tensors.items()}
    table = entries.get("embed/embedding")
    dtype = compute_dtype(table.dtype if isinstance(table, ArrayEntry) else "bfloat16")
    return {
        path: explain(entry, dtype=dtype)
        for path, entry in entries.items()
        if isinstance(entry, QTensorEntry)
    }


def _print_tensors(tensors: Sequence[Tensor]) -> None:
    headers = ["tensor", "shape", "dtype", "bits", "bytes"]
    align = "lllrr"
    reported = any(t.report for t in tensors)
    if reported:
        headers += ["weight error", "output error", "nearest", "warnings"]
        align += "rrrl"
    rows = []
    for t in tensors:
        shape = "x".join(map(str, t.shape))
        row = [t.path, shape, t.dtype, f"{t.bits:.3f}", str(t.nbytes)]
        if reported:
            names = ("weight_error", "output_error", "rtn_output_error")
            row += [_error(t.report.get(name)) for name in names]
            row.append("; ".join(map(str, t.report.get("warnings") or ())))
        rows.append(row)
    print_table(headers, rows, align)


def _error(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _facts(
    path: Path,
    tensors: Sequence[Tensor],
    sums: Totals,
    manifest: Manifest | None,
    kernels: Mapping[str, Choice],
) -> list[tuple[str, str]]:
    facts = [("weights", f"{sums.weights:,} in {len(tensors)} tensors")]
    if not math.isnan(sums.linear_bits):
        count = sum(t.quantized for t in tensors)
        facts.append(("linears", f"{count} quantized, {sums.linear_bits:.3f} bits per weight"))
    for choice, count in Counter(kernels.values()).most_common():
        facts.append(("products", f"{count} {choice.kernel}: {choice.reason}"))
    facts.append(("model", f"{sums.model_bits:.3f} bits per weight"))
    facts.append(("files", f"{size_text(sums.file_bytes)} in {path}"))
    if manifest is not None:
        facts += _manifest_facts(manifest)
    return facts


def _manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    meta, facts = manifest.meta, []
    if "model" in meta:
        facts.append(("made of", str(meta["model"])))
    rules = meta.get("recipe")
    for rule in rules if isinstance(rules, list) else ():
        facts.append(("rule", _rule_text(rule)))
    if isinstance(calibration := meta.get("calibration"), Mapping):
        shown = ("source", "samples", "seq_len", "tokens", "seed")
        text = ", ".join(f"{key} {calibration[key]}" for key in shown if key in calibration)
        facts.append(("calibration", text))
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [*facts, ("written with", versions)]


def _rule_text(rule: Any) -> str:
    """A line about a rule of the manifest's recipe, which may be anybody's JSON."""
    if not isinstance(rule, Mapping):
        return str(rule)
    method = rule.get("method")
    if not isinstance(method, Mapping):
        return f"{rule.get('pattern')}: full precision"
    spec = rule.get("spec")
    shown = ("dtype", "group_size", "symmetric", "activation")
    wanted = {} if not isinstance(spec, Mapping) else {k: spec[k] for k in shown if k in spec}
    return f"{rule.get('pattern')}: {_call({'name': 'QuantSpec', **wanted})}, {_call(method)}"


def _call(value: Any) -> str:
    """ "GPTQ(damp_percent=0.01, ...)"."""
    if not isinstance(value, Mapping):
        return repr(value)
    options = ", ".join(f"{k}={_call(v)}" for k, v in value.items() if k != "name")
    return f"{value.get('name', '')}({options})"


def _json(
    tensors: Sequence[Tensor],
    sums: Totals,
    manifest: Manifest | None,
    kernels: Mapping[str, Choice],
) -> dict[str, Any]:
    return {
        "tensors": [
            {
                "path": t.path,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "quantized": t.quantized,
                "bits_per_weight": t.bits,
                "bytes": t.nbytes,
                "report": dict(t.report) or None,
                "kernel": dataclasses.asdict(kernels[t.path]) if t.path in kernels else None,
            }
            for t in tensors
        ],
        "totals": dataclasses.asdict(sums),
        "meta": None if manifest is None else dict(manifest.meta),
        "versions": None if manifest is None else dict(manifest.versions),
    }
