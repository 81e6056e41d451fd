"""Quantize the embedded model with every method, measure what each costs, and let one write text.

    ./scripts/demo --out demo-output

It is an example as well: load, calibrate, quantize, evaluate, save, load, generate.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

import jq
from jq import tree
from jq.calib import token_stream
from jq.demo_model import demo_model_path
from jq.evaluate import Evaluation
from jq.models import Sampling, Tokenizer, stream_text
from jq.pipeline import check_output
from jq.presets import preset
from jq.recipe import Method
from scripts import _report
from scripts._report import Column, GrowingTable, Point

# Name in the table and the plot -> (preset, its changes). 8-bit ones quantize activations as well.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RTN": ("rtn", {"symmetric": False}),
    "AWQ": ("awq", {"symmetric": False}),
    "GPTQ": ("gptq", {"symmetric": False}),
    "GPTQ act order": ("gptq-act-order", {"symmetric": False}),
    "int8": ("int8", {}),
    "SmoothQuant int8": ("smoothquant", {}),
    "fp8": ("fp8", {}),
}
EIGHT_BIT = ("int8", "SmoothQuant int8", "fp8")
SAVED = ("GPTQ", 4)

# Together 80 characters wide, as many terminals are.
COLUMNS = (
    Column("method", 19, "l"),
    Column("bits", 5),
    Column("MB", 4),
    Column("perplexity", 11),
    Column("increase", 13),
    Column("KL (mnat)", 11),
    Column("s", 5),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the demonstration.

    Attributes:
        out: the folder for the results and the quantized model.
        bits: of the weight-only methods.
        calib_samples: windows to calibrate on, each as long as the model's context.
        windows: held-out windows to measure on.
        prompt: what the quantized model continues.
        new_tokens: how many it writes.
    """

    out: Path = Path("demo-output")
    bits: tuple[int, ...] = (4, 3)
    calib_samples: int = 32
    windows: int = 40
    prompt: str = "list.append(object, /)\n    "
    new_tokens: int = 120


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the results.

    bits_per_weight: of the quantized linears, scales and zero points included.
    megabytes: of the whole model, embedding included.
    increase: of the perplexity over the unquantized model's; its error is that of the pairs of
      windows, and far smaller than the perplexities' own.
    kl: mean KL divergence from the unquantized model, nats per token.
    top1_agreement: share of tokens where both models' first choice is the same.
    seconds: to quantize, compilation included.
    """

    method: str
    weights: str
    bits_per_weight: float
    megabytes: float
    perplexity: float
    perplexity_stderr: float
    increase: float | None = None
    increase_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None

    def cells(self) -> list[str]:
        """The line as text, in the order of `COLUMNS`."""
        weights = self.weights.partition(" ")[0].replace("bfloat", "bf")
        return [
            self.method if self.method.endswith(weights) else f"{self.method} {weights}",
            f"{self.bits_per_weight:.2f}",
            f"{self.megabytes:.2f}",
            _plus_minus(self.perplexity, self.perplexity_stderr, ".2f"),
            _plus_minus(self.increase, self.increase_stderr, "+.3f"),
            "" if self.kl is None else _plus_minus(1e3 * self.kl, 1e3 * (self.kl_stderr or 0)),
            "" if self.seconds is None else f"{self.seconds:.1f}",
        ]


@dataclasses.dataclass(frozen=True)
class Run:
    """A method and a format to try; `name` is a key of `METHODS`."""

    name: str
    spec: jq.QuantSpec
    method: Method


def plan(options: Options) -> list[Run]:
    """What is tried, in the order of the table; SpecError for bits that do not exist."""
    weights = [name for name in METHODS if name not in EIGHT_BIT]
    runs = [(name, bits) for bits in options.bits for name in weights]
    runs += [(name, None) for name in METHODS if name in EIGHT_BIT]
    made = []
    for name, bits in runs:
        key, changes = METHODS[name]
        made.append(Run(name, *preset(key, bits=bits, **changes)))
    return made


class Demo:
    """The embedded model with its texts, and the options."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = demo_model_path()
        self.model, self.params = jq.load(self.folder)
        self.tokenizer = Tokenizer(self.folder)
        # The model's context, which is also what its texts are cut into.
        self.seq_len = self.model.config.max_position_embeddings
        knobs: dict[str, Any] = {
            "vocab_size": self.model.config.vocab_size,
            "encode": self.tokenizer.encode,
        }
        config = jq.CalibrationConfig(
            calib_dataset=str(self.folder / "calibration.txt"),
            calib_samples=options.calib_samples,
            calib_seqlen=self.seq_len,
        )
        self.calibration = jq.calibration_data(config, **knobs)
        self.held_out = token_stream(self.folder / "evaluation.txt", **knobs)

    def quantize(self, run: Run, status: Any) -> Any:
        """Parameters with QTensors in place of the linears' kernels."""
        params, _ = jq.quantize_model(
            self.model,
            self.params,
            jq.uniform(run.spec, run.method),
            self.calibration.tokens,
            mask=self.calibration.mask,
            batch_size=4,
            progress=lambda p: status(f"{run.name}: quantizing {p.block} ({p.done}/{p.total})"),
        )
        return params

    def measure(self, params: Any, reference: Any, status: Any, name: str) -> Evaluation:
        """Perplexity on text the model was not trained on, and how far it is from `reference`."""
        return jq.evaluate(
            self.model,
            params,
            self.held_out,
            reference_params=reference,
            seq_len=self.seq_len,
            max_windows=self.options.windows,
            batch_size=4,
            progress=lambda done, total: status(f"{name}: measuring, window {done}/{total}"),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    options = tyro.cli(Options, description="Every method on the embedded model.", args=arguments)
    try:
        return run(options)
    except (jq.JaxqError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2


def run(options: Options) -> int:
    """Quantize and measure everything, then generate."""
    start = time.perf_counter()
    runs, checkpoint = plan(options), options.out / "checkpoint"
    options.out.mkdir(parents=True, exist_ok=True)
    check_output(checkpoint, overwrite=True)
    demo = Demo(options)
    config = demo.model.config
    parameters = sum(leaf.size for _, leaf in tree.leaves(demo.params))
    print(
        f"The embedded model: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{parameters:,} parameters, on {machine()}.\n"
        f"Calibration: {demo.calibration.num_tokens:,} tokens. Groups of 128 with zero points, but "
        "per output at 8 bits,\nwhere activations are quantized as well.\n\n"
        f"perplexity  per token, on {options.windows} held-out windows of {demo.seq_len} at most; "
        "± is one standard error\n"
        "increase    over the unquantized model's, window by window\n"
        "KL          from the unquantized model, thousandths of a nat per token\n"
        "bits, MB    per weight of the linears, scales included; of the whole model\n"
        "s           seconds to quantize, compilation included\n"
    )
    results, (name, params) = compare(demo, runs)
    write_results(options, demo, results, time.perf_counter() - start)
    jq.save(checkpoint, demo.model, params, config_files_from=demo.folder, overwrite=True)
    print(f"\n{name}, saved as {checkpoint} and loaded again, continues a prompt:\n")
    write_text(checkpoint, options)
    seconds = time.perf_counter() - start
    print(f"\nDone in {seconds:.0f} s. {options.out} has results.md, results.csv, results.json,")
    print("perplexity.png and the checkpoint.")
    return 0


def compare(demo: Demo, runs: Sequence[Run]) -> tuple[list[Result], tuple[str, Any]]:
    """The results, the unquantized model first, and a quantized model to keep, with its name."""
    keep = next((run for run in runs if (run.name, run.spec.bits) == SAVED), runs[0])
    results, kept = [], ("", None)
    with GrowingTable(COLUMNS) as table:
        evaluation = demo.measure(demo.params, None, table.status, "unquantized")
        results.append(result("unquantized", demo.params, evaluation, None))
        table.add(results[-1].cells())
        for run in runs:
            start = time.perf_counter()
            params = demo.quantize(run, table.status)
            seconds = time.perf_counter() - start
            evaluation = demo.measure(params, demo.params, table.status, run.name)
            results.append(result(run.name, params, evaluation, seconds))
            table.add(results[-1].cells())
            if run is keep:
                kept = (f"{run.name}, {results[-1].weights}", params)
    return results, kept


def result(name: str, params: Any, evaluation: Evaluation, seconds: float | None) -> Result:
    """What was measured, as a line."""
    leaves = [leaf for _, leaf in tree.leaves(params)]
    linears = [leaf for leaf in leaves if isinstance(leaf, jq.QTensor)]
    bits, weights = 8.0 * leaves[0].dtype.itemsize, str(leaves[0].dtype)
    if linears:
        bits = 8 * sum(w.nbytes for w in linears) / sum(w.k * w.n for w in linears)
        spec = linears[0].spec
        group = "" if spec.group_size == -1 else f" g{spec.group_size}"
        weights = ("fp8" if spec.is_float else spec.dtype) + group
    increase, kl, agreement = (
        evaluation.perplexity_increase,
        evaluation.kl,
        evaluation.top1_agreement,
    )
    return Result(
        name,
        weights,
        bits,
        sum(leaf.nbytes for leaf in leaves) / 1e6,
        *evaluation.perplexity,
        *(increase or (None, None)),
        *(kl or (None, None)),
        None if agreement is None else agreement.value,
        seconds,
    )


def write_results(options: Options, demo: Demo, results: Sequence[Result], seconds: float) -> None:
    """results.csv, results.json, results.md and perplexity.png."""
    rows = [dataclasses.asdict(r) for r in results]
    _report.write_csv(options.out / "results.csv", rows)
    facts = {
        "machine": machine(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "calibration": dict(demo.calibration.description),
        "windows": options.windows,
        "seq_len": demo.seq_len,
        "seconds": seconds,
    }
    _report.write_json(options.out / "results.json", {**facts, "results": rows})
    table = _report.markdown_table(COLUMNS, [r.cells() for r in results])
    (options.out / "results.md").write_text(table, encoding="utf-8")
    plain, *quantized = results
    _report.plot_bits(
        options.out / "perplexity.png",
        [
            Point(r.method, r.bits_per_weight, r.perplexity, r.increase_stderr or 0.0)
            for r in quantized
        ],
        line=(plain.perplexity, f"unquantized, {plain.weights}"),
        title="The embedded model after quantization",
        ylabel="perplexity per token, held-out text",
        note="bars: one standard error of the difference from the unquantized model",
    )


def write_text(checkpoint: Path, options: Options) -> None:
    """Load a quantized model, and print a continuation as it comes."""
    model, params = jq.load(checkpoint)
    tokenizer = Tokenizer(checkpoint)
    print(options.prompt, end="", flush=True)
    sampling = Sampling(temperature=0.5, top_p=0.9)
    for piece in stream_text(
        model,
        params,
        tokenizer,
        options.prompt,
        options.new_tokens,
        sampling,
        jax.random.key(0),
    ):
        print(piece, end="", flush=True)
    print()


def machine() -> str:
    """What it runs on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{_report.usable_cores()} CPU cores"


def _plus_minus(value: float | None, error: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}} ±{error:{form.lstrip('+')}}"


if __name__ == "__main__":
    sys.exit(main())
