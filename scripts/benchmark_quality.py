"""Every method on one model, one calibration set and one text: what each costs in quality.

    python scripts/benchmark_quality.py MODEL --calibration tokens.npy --text valid.txt --out DIR

Arms are kept in DIR/arms as they finish; the same command again goes on with the missing ones.
Differences between arms are paired, window by window.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq import tree
from jq.api import load
from jq.calib import CalibrationConfig, calibration_data, quantize_model, token_stream
from jq.errors import JaxqError
from jq.evaluate import evaluate, paired_difference
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.models import Tokenizer
from jq.qtensor import QTensor
from jq.recipe import Method, uniform
from jq.spec import FP8, QuantSpec, w8a8
from scripts import _report
from scripts._report import Column, GrowingTable

WIDTHS = ((4, 128), (3, 128), (2, 64))

WEIGHT_ONLY: dict[str, Method] = {
    "RTN": RTN(),
    "RTN, clipped": RTN(clip="output"),
    "AWQ, unclipped": AWQ(rounding=RTN()),
    "AWQ": AWQ(),
    "GPTQ": GPTQ(),
    "GPTQ, clipped": GPTQ(clip="mse"),
    "GPTQ group-aware": GPTQ(act_group_aware=True),
    "GPTQ group-aware, clipped": GPTQ(act_group_aware=True, clip="mse"),
    "GPTQ act order": GPTQ(desc_act=True),
    "GPTQ act order, clipped": GPTQ(desc_act=True, clip="mse"),
    "GPTQ static groups": GPTQ(desc_act=True, static_groups=True),
    "GPTQ static groups, clipped": GPTQ(desc_act=True, static_groups=True, clip="mse"),
    "AWQ + GPTQ": AWQ(rounding=GPTQ(act_group_aware=True, clip="mse")),
}

EIGHT_BIT: dict[str, tuple[QuantSpec, Method]] = {
    "int8": (w8a8("int8"), RTN()),
    "int8 SmoothQuant": (w8a8("int8"), SmoothQuant(alpha="auto")),
    "int8 SmoothQuant alpha 0.8": (w8a8("int8"), SmoothQuant(alpha=0.8)),
    "int8 static": (w8a8("int8", activation="tensor", static=True), RTN()),
    "int8 static SmoothQuant": (
        w8a8("int8", activation="tensor", static=True),
        SmoothQuant(alpha="auto", smooth="all"),
    ),
    "fp8": (w8a8(FP8), RTN()),
    "fp8 SmoothQuant": (w8a8(FP8), SmoothQuant(alpha="auto", smooth="all")),
}

COLUMNS = (
    Column("format", 9, "l"),
    Column("method", 27, "l"),
    Column("bits/weight", 11),
    Column("perplexity", 15),
    Column("KL (nats)", 20),
    Column("KL - RTN's", 21),
    Column("CPU s", 6),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        model: a model folder.
        calibration: text, or token ids in .npy.
        text: text to measure on.
        out: folder for the results.
        calib_samples, seq_len: calibration windows and their length, which is the evaluation's too.
        max_windows: windows of the text to measure on.
        only: arms to run, by a part of "int4 g128 GPTQ"; all when empty.
    """

    model: tyro.conf.Positional[Path]
    calibration: Path
    text: Path
    out: Path
    calib_samples: int = 128
    seq_len: int = 512
    max_windows: int = 100
    only: tuple[str, ...] = ()


def arms() -> Iterator[tuple[str, str, QuantSpec, Method]]:
    """(format, method's name, spec, method) of every arm."""
    for bits, group in WIDTHS:
        spec = QuantSpec(f"int{bits}", group, symmetric=False)
        for name, method in WEIGHT_ONLY.items():
            yield f"int{bits} g{group}", name, spec, method
    for name, (spec, method) in EIGHT_BIT.items():
        yield "W8A8", name, spec, method


class Benchmark:
    """The model, the tokens, and where results go."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, self.params = load(options.model)
        encode = Tokenizer(options.model).encode
        knobs: dict[str, Any] = {"vocab_size": self.model.config.vocab_size, "encode": encode}
        config = CalibrationConfig(
            calib_dataset=str(options.calibration),
            calib_samples=options.calib_samples,
            calib_seqlen=options.seq_len,
        )
        self.calibration = calibration_data(config, **knobs)
        self.tokens = token_stream(options.text, **knobs)
        self.folder = options.out / "arms"
        self.folder.mkdir(parents=True, exist_ok=True)

    def arm(self, spec: QuantSpec | None, method: Method | None) -> dict[str, Any]:
        """The result of an arm, from its file if this very arm was run before."""
        key = f"{spec} {method} {self.calibration.description['sha256']} {self.options.max_windows}"
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not file.exists():
            result = {"arm": key, **self._run(spec, method)}
            file.write_text(json.dumps(result), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def _run(self, spec: QuantSpec | None, method: Method | None) -> dict[str, Any]:
        params, seconds, before = self.params, 0.0, _cpu_seconds()
        start = time.perf_counter()
        if spec is not None and method is not None:
            params, _ = quantize_model(
                self.model,
                self.params,
                uniform(spec, method),
                self.calibration.tokens,
                mask=self.calibration.mask,
            )
            jax.block_until_ready(params)
            seconds = _cpu_seconds() - before
        wall = time.perf_counter() - start
        evaluation = evaluate(
            self.model,
            params,
            self.tokens,
            reference_params=self.params,
            seq_len=self.options.seq_len,
            max_windows=self.options.max_windows,
            batch_size=4,
        )
        linears = [leaf for _, leaf in tree.leaves(params) if isinstance(leaf, QTensor)]
        weights = sum(w.k * w.n for w in linears)
        return {
            "cpu_seconds": seconds,
            "wall_seconds": wall,
            "bits_per_weight": 8 * sum(w.nbytes for w in linears) / weights if linears else None,
            "window_kl": np.asarray(evaluation.window_kl).tolist(),
            "window_nll": np.asarray(evaluation.window_nll).tolist(),
            **evaluation.to_dict(),
        }


def main() -> int:
    """Run the missing arms and write the table; returns the exit code."""
    options = tyro.cli(Options, description=__doc__)
    try:
        benchmark = Benchmark(options)
    except JaxqError as error:
        print(f"benchmark_quality: error: {error}", file=sys.stderr)
        return 2
    rows, cells = [], []
    with GrowingTable(COLUMNS) as table:
        for row in _rows(benchmark, table.status):
            rows.append(row)
            cells.append(_cells(row))
            table.add(cells[-1])
    _report.write_csv(options.out / "quality.csv", rows)
    facts = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": options.model.name,
        "calibration": dict(benchmark.calibration.description),
        "text": options.text.name,
        "windows": options.max_windows,
        "seq_len": options.seq_len,
    }
    _report.write_json(options.out / "quality.json", {**facts, "results": rows})
    (options.out / "quality.md").write_text(_report.markdown_table(COLUMNS, cells))
    return 0


def _rows(benchmark: Benchmark, status: Any) -> Iterator[dict[str, Any]]:
    plain = benchmark.arm(None, None)
    yield _row("full", "none", plain, None)
    baseline: dict[str, dict[str, Any]] = {}
    for form, name, spec, method in arms():
        wanted = benchmark.options.only
        first = name in ("RTN", "int8", "fp8", "int8 static")
        if wanted and not first and not any(part in f"{form} {name}" for part in wanted):
            continue
        status(f"{form} {name}")
        result = benchmark.arm(spec, method)
        family = form if form != "W8A8" else " ".join(name.split(" SmoothQuant")[:1])
        if first:
            baseline[family] = result
        yield _row(form, name, result, None if first else baseline[family])


def _row(
    form: str, name: str, result: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    difference = None
    if baseline is not None:
        difference = paired_difference(
            np.asarray(result["window_kl"]), np.asarray(baseline["window_kl"])
        )
    kl = np.asarray(result["window_kl"])
    nll = np.asarray(result["window_nll"])
    return {
        "format": form,
        "method": name,
        "bits_per_weight": result["bits_per_weight"],
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_stderr": float(np.exp(nll.mean()) * nll.std(ddof=1) / len(nll) ** 0.5),
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std(ddof=1) / len(kl) ** 0.5),
        "kl_minus_rtn": None if difference is None else float(difference.value),
        "kl_minus_rtn_stderr": None if difference is None else float(difference.stderr),
        "cpu_seconds": result["cpu_seconds"],
        "wall_seconds": result["wall_seconds"],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    bits, difference = row["bits_per_weight"], row["kl_minus_rtn"]
    return [
        row["format"],
        row["method"],
        "" if bits is None else f"{bits:.3f}",
        f"{row['perplexity']:.3f} +- {row['perplexity_stderr']:.2f}",
        f"{row['kl']:.6f} +- {row['kl_stderr']:.6f}",
        "" if difference is None else f"{difference:+.6f} +- {row['kl_minus_rtn_stderr']:.6f}",
        f"{row['cpu_seconds']:.1f}",
    ]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
