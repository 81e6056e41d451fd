"""`jaxq bench`: latency of generation and of each linear, and how near the ceilings they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jq.cli.models import model_folder
from jq.cli.options import parse, split_counts
from jq.cli.output import print_json, print_table, size_text
from jq.cli.progress import Meter
from jq.errors import ModelError

ABOUT = """Time prefill, decode and each linear's product on this machine.

Compilation and warm-up are left out and given apart. The device's ceilings are measured in the same
run: whether memory or compute bounds a step, and how near it comes, is by these. Numbers of other
devices, versions and engines do not compare."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Options of the command.

    Attributes:
        model: a checkpoint or model folder, or "demo" for the embedded model.
        batch_sizes: sequences that run at once, such as 1,8,32.
        prompt_tokens: of each sequence.
        decode_steps: to time, per batch size.
        prefills: to time, per batch size.
        generation: time prefill and decode.
        linears: time each shape of linear, with as many rows as a decode step and a prefill have.
        seed: of the prompts.
        json: print JSON.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    batch_sizes: Annotated[str, tyro.conf.arg(metavar="N,N,...")] = "1,8"
    prompt_tokens: int = 128
    decode_steps: int = 200
    prefills: int = 10
    generation: bool = True
    linears: bool = True
    seed: int = 0
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Bench, "bench", ABOUT, arguments)
    sizes = split_counts(args.batch_sizes, "--batch-sizes")
    if not (args.generation or args.linears):
        raise ModelError("nothing to time: leave out --no-generation or --no-linears")
    folder = model_folder(args.model)

    from jq.api import load
    from jq.bench import Device, measure_ceilings, measure_decode, measure_linears
    from jq.prepare import prepare

    with Meter("load", every=5.0) as meter:
        model, params = load(folder, progress=meter.show)
    params = prepare(params, dtype=model.dtype)
    decoded, timings = None, ()
    if args.generation:
        with Meter("bench", every=5.0) as meter:
            decoded = measure_decode(
                model,
                params,
                batch_sizes=sizes,
                prompt_tokens=args.prompt_tokens,
                steps=args.decode_steps,
                prefills=args.prefills,
                seed=args.seed,
                progress=meter.show,
            )
    if args.linears:
        rows = dict.fromkeys((*sizes, args.prompt_tokens * max(sizes)))
        with Meter("linears", every=5.0) as meter:
            timings = measure_linears(
                params, dtype=model.dtype, rows=tuple(rows), progress=meter.show
            )
    ceilings = measure_ceilings(_dtypes(params, model.dtype))
    report = _report(args, Device.default(), model, params, decoded, timings, ceilings)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _dtypes(params: Any, dtype: Any) -> tuple[str, ...]:
    """Dtypes that the model multiplies, and the two that everybody compares."""
    from jq import tree
    from jq.bench.work import operand_dtype

    used = (operand_dtype(leaf, dtype) for _, leaf in tree.leaves(params))
    return tuple(dict.fromkeys(("float32", "bfloat16", *used)))


def _report(
    args: Bench,
    device: Any,
    model: Any,
    params: Any,
    decoded: Any,
    timings: Sequence[Any],
    ceilings: Any,
) -> dict[str, Any]:
    """Everything that was measured, as JSON has it."""
    from jq.bench import decode_work, prefill_work, roofline

    batches = []
    for batch in () if decoded is None else decoded.batches:
        sizes = (batch.batch_size, batch.padded_tokens, batch.cache_tokens)
        decode = roofline(decode_work(model, params, sizes[0], sizes[2]), ceilings)
        prefill = roofline(prefill_work(model, params, *sizes), ceilings)
        lines = {
            "prefill_roofline": prefill.to_dict(batch.prefill.p50),
            "decode_roofline": decode.to_dict(batch.decode.p50),
        }
        batches.append(batch.to_dict() | lines)
    linears = []
    for timing in timings:
        line = roofline(timing.work, ceilings).to_dict(timing.latency.p50)
        linears.append(timing.to_dict() | {"roofline": line})
    return {
        "model": args.model,
        "device": dataclasses.asdict(device) | {"label": device.label},
        "dtype": _name(model.dtype),
        "ceilings": ceilings.to_dict(),
        "batches": batches,
        "linears": linears,
    }


def _name(dtype: Any) -> str:
    import numpy as np

    return np.dtype(dtype).name


def _print(report: dict[str, Any]) -> None:
    device, ceilings = report["device"], report["ceilings"]
    print(
        f"{report['model']} in {report['dtype']} on {device['label']}, JAX {device['jax_version']}"
    )
    if device["platform"] == "cpu":
        print("numbers of a CPU: they say nothing about any GPU")
    rates = ceilings["products_per_second"].items()
    products = ", ".join(f"{dtype} {_rate(rate)}" for dtype, rate in rates)
    moved = (ceilings["copy_bytes_per_second"], ceilings["read_bytes_per_second"])
    print(f"ceilings: copy {size_text(moved[0])}/s, read {size_text(moved[1])}/s; {products}\n")
    if report["batches"]:
        _print_batches(report["batches"])
    if report["linears"]:
        _print_linears(report["linears"])


def _print_batches(batches: Sequence[dict[str, Any]]) -> None:
    bounds = ("ops/byte", "bound by", "of ceiling")
    headers = ("batch", "prefill p50", "p95", "p99", "tokens/s", *bounds, "first call")
    rows = [
        (
            str(b["batch_size"]),
            *_times(b["prefill_seconds"]),
            f"{b['prefill_tokens_per_second']:,.0f}",
            *_roofline(b["prefill_roofline"]),
            f"{b['first_call_seconds']:.1f} s",
        )
        for b in batches
    ]
    print_table(headers, rows, "rrrrrrlrr")
    count, padded = batches[0]["prefill_seconds"]["count"], batches[0]["padded_tokens"]
    prompt = batches[0]["prompt_tokens"]
    text = f"{count} prefills of {prompt} tokens"
    print(f"{text}, padded to {padded}; the first call compiles, and is not among them\n")
    headers = (
        "batch",
        "decode p50",
        "p95",
        "p99",
        "tokens/s",
        "ops/byte",
        "bound by",
        "of ceiling",
    )
    rows = [
        (
            str(b["batch_size"]),
            *_times(b["decode_seconds"]),
            f"{b['decode_tokens_per_second']:,.0f}",
            *_roofline(b["decode_roofline"]),
        )
        for b in batches
    ]
    print_table(headers, rows, "rrrrrrlr")
    count, cache = batches[0]["decode_seconds"]["count"], batches[0]["cache_tokens"]
    balance = batches[0]["decode_roofline"]["balance"]
    print(
        f"{count} steps with a cache of {cache} tokens; below {balance:.3g} operations per byte "
        "memory is the bound\n"
    )


def _print_linears(linears: Sequence[dict[str, Any]]) -> None:
    headers = ("linear", "format", "rows", "p50", "p95", "p99", "ops/byte", "bound by")
    rows = []
    for t in linears:
        names = [name.rpartition("/")[2] for name in t["names"]]
        shape = " x ".join(map(str, t["shape"]))
        line = t["roofline"]
        rows.append(
            (
                f"{shape} {','.join(names)}",
                t["format"],
                str(t["rows"]),
                *_times(t["latency"]),
                *_roofline(line),
                t["kernel"],
            )
        )
    print_table((*headers, "of ceiling", "kernel"), rows, "llrrrrrlrl")
    most = max(t["measured"] for t in linears)
    print(
        f"per product, from {linears[0]['latency']['count']} samples; up to {most} weights of a "
        "kind in turn: above 100 % they came from a cache"
    )


def _times(latency: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_time(latency[name]) for name in ("p50", "p95", "p99"))


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(per_second: float) -> str:
    if per_second < 1e12:
        return f"{per_second / 1e9:.1f} Gop/s"
    return f"{per_second / 1e12:.1f} Top/s"


def _roofline(line: dict[str, Any]) -> tuple[str, str, str]:
    share = 100 * line["fraction_of_ceiling"]
    return f"{line['intensity']:.3g}", line["bound"], f"{share:.{0 if share >= 10 else 1}f} %"
